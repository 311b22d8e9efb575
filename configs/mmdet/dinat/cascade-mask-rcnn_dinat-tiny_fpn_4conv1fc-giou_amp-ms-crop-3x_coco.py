_base_ = "./cascade-mask-rcnn_dinat-mini_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(arch="dinat_tiny", drop_path_rate=0.3, init_cfg=dict(checkpoint="dinat_tiny")))
