_base_ = "./mask-rcnn_nat-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="nat_small", drop_path_rate=0.35, init_cfg=dict(checkpoint="nat_small")),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
