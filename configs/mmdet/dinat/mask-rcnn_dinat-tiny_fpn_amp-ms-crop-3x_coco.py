_base_ = "./mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py"
model = dict(backbone=dict(arch="dinat_tiny", init_cfg=dict(checkpoint="dinat_tiny")))
