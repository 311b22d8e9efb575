_base_ = ["../../_base_/cascade-mask-rcnn_fpn_4conv1fc-giou.py", "../../_base_/ms-crop-3x_coco.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT_s",
        arch="dinat_s_tiny",
        dilations="coco",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_s_tiny"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
