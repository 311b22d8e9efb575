_base_ = "./nat-mini_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        depths=[3, 4, 18, 5],
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth"),
    )
)
