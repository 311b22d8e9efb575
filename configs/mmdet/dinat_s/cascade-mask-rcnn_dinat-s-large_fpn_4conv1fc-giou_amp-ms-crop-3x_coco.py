_base_ = "./cascade-mask-rcnn_dinat-s-base_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="dinat_s_large", init_cfg=dict(checkpoint="dinat_s_large_21k")),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(optimizer=dict(lr=5e-05))
