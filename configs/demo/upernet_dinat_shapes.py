# A slim UPerNet on the shapes: every pixel is one of them or background. `make demo-seg` runs it.
_base_ = [
    # spelled out for the reason that ../_base_/upernet-160k.py gives
    *(
        __import__("mmseg").__path__[0] + f"/.mim/configs/_base_/{name}.py"
        for name in ("models/upernet_r50", "default_runtime")
    ),
    "_base_/dinat_shapes.py",
]

epochs = 6
width = 64  # channels of the decoder
balance = dict(loss_weight=1.0, class_weight=[1.0] * len(_base_.things) + [0.7])  # most pixels are background
data_root = _base_.shapes_root.format(96)
classes = (*_base_.things, "background")

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(96, 96), **_base_.normalization),
    backbone=dict(_delete_=True, out_indices=(1, 2, 3), **_base_.small_dinat),
    decode_head=dict(
        in_channels=[64, 128, 256],
        in_index=[0, 1, 2],
        channels=width,
        pool_scales=(2, 3),  # single pixels would be normalized over the batch alone
        num_classes=len(classes),
        dropout_ratio=0.0,
        loss_decode=balance,
    ),
    # weighs as much as the decoder: it is what teaches a backbone from scratch the classes
    auxiliary_head=dict(
        in_channels=128,
        in_index=1,
        channels=width,
        num_classes=len(classes),
        dropout_ratio=0.0,
        loss_decode=balance,
    ),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomFlip", prob=[0.25, 0.25], direction=["horizontal", "vertical"]),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes),
    img_suffix=".jpg",
    seg_map_suffix=".png",
    reduce_zero_label=True,
)
train_dataloader = dict(
    batch_size=8,
    **_base_.loading,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    **_base_.loading,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=2e-3, **_base_.adamw), clip_grad=_base_.clipping)
param_scheduler = [dict(_base_.warmup, end=200), dict(T_max=epochs, **_base_.decay)]
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", **_base_.hooks.logger),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", **_base_.hooks.checkpoint),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
log_processor = dict(by_epoch=True)
