_base_ = "./nat-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(arch="nat_small", drop_path_rate=0.5, init_cfg=dict(checkpoint="nat_small")),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
