_base_ = ["mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "../_base_/dinat-tiny.py"]
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(_delete_=True, out_indices=[1, 2, 3], **_base_.dinat_tiny_coco),
    neck=dict(in_channels=[128, 256, 512], start_level=0),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, **_base_.adamw_coco), paramwise_cfg=dict(_delete_=True, **_base_.no_decay)
)
