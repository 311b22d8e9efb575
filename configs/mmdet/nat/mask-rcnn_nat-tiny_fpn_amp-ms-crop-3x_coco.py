_base_ = "./mask-rcnn_nat-mini_fpn_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(
        depths=[3, 4, 18, 5],
        init_cfg=dict(type="Pretrained", checkpoint="https://shi-labs.com/projects/nat/checkpoints/CLS/nat_tiny.pth"),
    )
)
