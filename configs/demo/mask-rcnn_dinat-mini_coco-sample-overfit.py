# Learn a few images by heart at a short side of 400: a quick check that everything trains, on two CPU cores.
#     COCO_SAMPLE=path/to/coco python tools/train.py configs/demo/mask-rcnn_dinat-mini_coco-sample-overfit.py
_base_ = "./mask-rcnn_dinat-mini_coco-sample.py"

steps = 180
resize = dict(type="Resize", scale=(720, 400), keep_ratio=True)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    resize,
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    resize,
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
model = dict(
    backbone=dict(drop_path_rate=0.0),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128)),
    ),
)
train_dataloader = dict(batch_size=1, dataset=dict(times=steps // 2, dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="CosineAnnealingLR", by_epoch=False, begin=20, end=steps, eta_min_ratio=0.02),
]
optim_wrapper = dict(optimizer=dict(lr=5e-4), clip_grad=dict(max_norm=5.0))
default_hooks = dict(logger=dict(interval=10))
