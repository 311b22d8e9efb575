_base_ = "./cascade-mask-rcnn_dinat-small_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="dinat_base", drop_path_rate=0.6, init_cfg=dict(checkpoint="dinat_base")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(optimizer=dict(lr=7.5e-05))
