_base_ = ["mmdet::retinanet/retinanet_r50_fpn_1x_coco.py", "../_base_/dinat-tiny.py"]
model = dict(
    backbone=dict(_delete_=True, out_indices=[1, 2, 3], **_base_.dinat_tiny_coco),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(optimizer=dict(_delete_=True, **_base_.adamw_coco), paramwise_cfg=_base_.no_decay)
