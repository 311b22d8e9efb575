_base_ = "./cascade-mask-rcnn_nat-small_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="nat_base", drop_path_rate=0.5, init_cfg=dict(checkpoint="nat_base")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
