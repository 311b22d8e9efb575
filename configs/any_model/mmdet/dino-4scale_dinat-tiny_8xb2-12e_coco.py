_base_ = ["mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py", "../_base_/dinat-tiny.py"]
model = dict(
    backbone=dict(_delete_=True, out_indices=[1, 2, 3], **_base_.dinat_tiny_coco),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=_base_.no_decay_at_a_tenth)
