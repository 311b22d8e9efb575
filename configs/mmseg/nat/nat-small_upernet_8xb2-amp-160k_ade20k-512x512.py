_base_ = "./nat-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        embed_dim=96,
        num_heads=[3, 6, 12, 24],
        mlp_ratio=2.0,
        layer_scale=1e-05,
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_small.pth"),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
