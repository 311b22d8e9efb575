_base_ = "./cascade-mask-rcnn_nat-tiny_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="nat_small", init_cfg=dict(checkpoint="nat_small")),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
