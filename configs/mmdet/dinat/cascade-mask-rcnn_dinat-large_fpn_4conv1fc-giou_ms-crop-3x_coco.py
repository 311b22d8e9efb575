_base_ = "./cascade-mask-rcnn_dinat-small_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(arch="dinat_large", drop_path_rate=0.6, init_cfg=dict(checkpoint="dinat_large_21k")),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=7.5e-05))
