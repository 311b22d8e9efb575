_base_ = "./cascade-mask-rcnn_dinat-tiny_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="dinat_small", drop_path_rate=0.5, init_cfg=dict(checkpoint="dinat_small")),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
