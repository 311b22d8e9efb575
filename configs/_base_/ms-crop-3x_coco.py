# Every detection row of the table was trained this way: half of the images resized to a random short side, the others
# cropped in between; AdamW without decay on rpb and norms; 36 epochs, 16 images a step in all, fp16.
_base_ = [
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/schedules/schedule_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)

any_size = dict(type="RandomChoiceResize", scales=[(short, 1333) for short in range(480, 801, 32)], keep_ratio=True)
crop = [
    dict(type="RandomChoiceResize", scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
]
train_pipeline = [
    dict(type="LoadImageFromFile", backend_args={{_base_.backend_args}}),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="RandomChoice", transforms=[[any_size], [*crop, any_size]]),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=True, begin=0, end=36, milestones=[27, 33], gamma=0.1),
]
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
)

# Multi-scale and flip test, of boxes alone: mmdet's DetTTAModel merges no masks. So it is
# `dinat test CONFIG CHECKPOINT --tta --boxes-only`.
tta_model = dict(type="DetTTAModel", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100))
tta_pipeline = [
    dict(type="LoadImageFromFile", backend_args={{_base_.backend_args}}),
    dict(
        type="TestTimeAug",
        transforms=[
            [dict(type="Resize", scale=(1333, short), keep_ratio=True) for short in (480, 640, 800, 960, 1120)],
            [dict(type="RandomFlip", prob=prob) for prob in (0.0, 1.0)],
            [dict(type="LoadAnnotations", with_bbox=True)],
            [
                dict(
                    type="PackDetInputs",
                    meta_keys=(
                        *("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
                        *("flip", "flip_direction"),
                    ),
                )
            ],
        ],
    ),
]
