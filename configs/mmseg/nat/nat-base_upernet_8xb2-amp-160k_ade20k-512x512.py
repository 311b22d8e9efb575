_base_ = "./nat-small_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        embed_dim=128,
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_base.pth"),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
