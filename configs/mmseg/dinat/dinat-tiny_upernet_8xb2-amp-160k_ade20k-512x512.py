_base_ = "./dinat-mini_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(backbone=dict(arch="dinat_tiny", drop_path_rate=0.3, init_cfg=dict(checkpoint="dinat_tiny")))
