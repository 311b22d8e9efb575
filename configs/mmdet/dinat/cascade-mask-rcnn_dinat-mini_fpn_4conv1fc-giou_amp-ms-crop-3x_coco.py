_base_ = ["../../_base_/cascade-mask-rcnn_fpn_4conv1fc-giou.py", "../../_base_/ms-crop-3x_coco.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT",
        arch="dinat_mini",
        dilations="coco",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
