_base_ = ["mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py", "../_base_/dinat-tiny.py"]
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(_delete_=True, out_indices=[1, 2, 3], **_base_.dinat_tiny_coco),
    neck=dict(in_channels=[128, 256, 512]),
)
# 12 epochs instead of 300, of 16 images a step instead of 256, with the augmentation of the last ones alone
base_lr = 1e-4
optim_wrapper = dict(optimizer=dict(lr=base_lr, betas=(0.9, 0.999)), paramwise_cfg=_base_.no_decay)
train_cfg = dict(max_epochs=12, val_interval=1, dynamic_intervals=None)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, by_epoch=False, begin=0, end=1000),
    dict(
        type="CosineAnnealingLR",
        eta_min=base_lr * 0.05,
        begin=6,
        end=12,
        T_max=6,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(pipeline=_base_.train_pipeline_stage2))
custom_hooks = [_base_.custom_hooks[0]]
auto_scale_lr = dict(base_batch_size=16)
