_base_ = "./cascade-mask-rcnn_nat-small_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(
        embed_dim=128,
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.5,
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_base.pth"),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
