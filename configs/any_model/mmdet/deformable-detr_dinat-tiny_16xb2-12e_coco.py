_base_ = ["mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py", "../_base_/dinat-tiny.py"]
model = dict(
    backbone=dict(_delete_=True, out_indices=[1, 2, 3], **_base_.dinat_tiny_coco),
    neck=dict(in_channels=[128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=_base_.no_decay_at_a_tenth)
# 12 epochs instead of 50
train_cfg = dict(max_epochs=12)
param_scheduler = [dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[11], gamma=0.1)]
