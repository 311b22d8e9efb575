_base_ = "./dinat-s-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(backbone=dict(arch="dinat_s_small", init_cfg=dict(checkpoint="dinat_s_small")))
