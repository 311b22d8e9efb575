_base_ = "./mask-rcnn_nat-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(
        embed_dim=96,
        num_heads=[3, 6, 12, 24],
        mlp_ratio=2.0,
        layer_scale=1e-05,
        drop_path_rate=0.35,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_small.pth"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
