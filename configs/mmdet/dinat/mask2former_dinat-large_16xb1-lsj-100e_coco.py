_base_ = [
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py",
    "../../_base_/mask2former_dinat-large.py",
]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
model = dict(
    backbone=dict(_delete_=True, **_base_.dinat_large),
    panoptic_head=dict(in_channels=[192, 384, 768, 1536], num_queries=200),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=_base_.parameter_keys))

train_dataloader = dict(batch_size=1, num_workers=1)
max_iters = 737_500
param_scheduler = dict(end=max_iters, milestones=[655_556, 710_184])
# every 5000 iterations, and at the end
train_cfg = dict(max_iters=max_iters, dynamic_intervals=[(max_iters // 5000 * 5000 + 1, max_iters)])
