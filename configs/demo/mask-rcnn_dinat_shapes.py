# Mask R-CNN with a small DiNAT, trained from scratch on the drawings of tools/make_shapes.py within minutes on two CPU
# cores. `make demo` runs it; it differs from mmdet's Mask R-CNN in being slim, in its small anchors, and in levels that
# begin at stride 8: the shapes are large.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "_base_/dinat_shapes.py",
]

epochs = 4
width = 64  # channels of the FPN and the heads
levels = dict(out_channels=width, featmap_strides=[8, 16, 32], finest_scale=56)
classes = _base_.things
data_root = _base_.shapes_root.format(160)

model = dict(
    data_preprocessor=_base_.normalization,
    backbone=dict(_delete_=True, out_indices=(1, 2, 3), **_base_.small_dinat),
    neck=dict(in_channels=[64, 128, 256], out_channels=width, num_outs=3, norm_cfg=dict(type="GN", num_groups=8)),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[5], ratios=[0.7, 1.4], strides=[8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(**levels, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=len(classes), reg_class_agnostic=True),
        mask_roi_extractor=dict(**levels, roi_layer=dict(output_size=10, sampling_ratio=1)),
        mask_head=dict(
            num_convs=2, in_channels=width, conv_out_channels=width, num_classes=len(classes), class_agnostic=True
        ),
    ),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=300, max_per_img=100),
        rcnn=dict(mask_size=20, sampler=dict(num=32, pos_fraction=0.5), assigner=dict(match_low_quality=False)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=100), rcnn=dict(max_per_img=30)),
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 160), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(type="CocoDataset", data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(
    batch_size=2,  # more steps serve better than larger ones here
    **_base_.loading,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    **_base_.loading,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **dataset,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file=data_root + "annotations/instances_val.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=epochs)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=7e-4, **_base_.adamw), clip_grad=_base_.clipping)
param_scheduler = [_base_.warmup, dict(T_max=epochs, **_base_.decay)]
default_hooks = _base_.hooks
