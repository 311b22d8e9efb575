_base_ = "./cascade-mask-rcnn_dinat-s-tiny_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(arch="dinat_s_small", drop_path_rate=0.5, init_cfg=dict(checkpoint="dinat_s_small")))
