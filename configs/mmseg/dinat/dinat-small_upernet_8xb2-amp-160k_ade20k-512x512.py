_base_ = "./dinat-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="dinat_small", drop_path_rate=0.5, init_cfg=dict(checkpoint="dinat_small")),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
