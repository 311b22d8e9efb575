# Mask R-CNN with a small DiNAT, trained from scratch on the drawings of tools/make_shapes.py within minutes on two CPU
# cores. `make demo` runs it; it differs from mmdet's Mask R-CNN in being slim and in its small anchors.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)

classes = ("circle", "square", "triangle", "star", "ring")
data_root = "work_dirs/demo/shapes/"
image_size = 160
epochs = 3
width = 64  # channels of the FPN and the heads

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[64.0, 64.0, 64.0]),  # of the drawings
    backbone=dict(
        _delete_=True,
        type="DiNAT",
        embed_dim=32,
        depths=[2, 2, 2, 2],
        num_heads=[2, 4, 8, 16],
        kernel_size=5,
        dilations=[[1, 4], [1, 4], [1, 2], [1, 1]],
        mlp_ratio=2.0,
        drop_path_rate=0.0,
        # larger than the trunk's own start, which suits long schedules
        init_cfg=dict(type="Xavier", layer="Linear", distribution="uniform"),
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4, norm_cfg=dict(type="GN", num_groups=8)),
    rpn_head=dict(
        in_channels=width,
        feat_channels=width,
        anchor_generator=dict(scales=[5], ratios=[0.7, 1.4], strides=[4, 8, 16, 32]),
    ),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=28, roi_layer=dict(sampling_ratio=1)),
        bbox_head=dict(in_channels=width, fc_out_channels=256, num_classes=len(classes), reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=width, finest_scale=28, roi_layer=dict(output_size=10, sampling_ratio=1)),
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
    dict(type="Resize", scale=(image_size, image_size), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4,  # more steps serve better than larger ones here
    num_workers=0,  # reading takes 1 ms an image, and the cores have enough to do
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_train.json",
        data_prefix=dict(img="train/"),
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CocoDataset",
        data_root=data_root,
        ann_file="annotations/instances_val.json",
        data_prefix=dict(img="val/"),
        metainfo=dict(classes=classes),
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
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-3, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(rpb=dict(decay_mult=0.0))),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=60),
    dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, T_max=epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
