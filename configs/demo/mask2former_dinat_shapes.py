# A slim panoptic Mask2Former on the shapes, which are things before a stuff background. `make demo-mask2former` runs
# it. It differs from mmdet's in its size, in a larger learning rate, and in training the backbone at that rate, too.
_base_ = ["mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py", "_base_/dinat_shapes.py"]

epochs = 10
width = 64  # channels of both decoders
heads = 4
data_root = _base_.shapes_root.format(96)
things, stuff = _base_.things, ("background",)
count = dict(num_things_classes=len(things), num_stuff_classes=len(stuff))
attention = dict(embed_dims=width, num_heads=heads)
feed_forward = dict(embed_dims=width, feedforward_channels=4 * width)

model = dict(
    data_preprocessor=dict(batch_augments=None, **_base_.normalization),
    backbone=dict(_delete_=True, **_base_.small_dinat),
    panoptic_head=dict(
        **count,
        in_channels=[32, 64, 128, 256],
        feat_channels=width,
        out_channels=width,
        num_queries=20,
        pixel_decoder=dict(
            norm_cfg=dict(num_groups=8),
            encoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=attention, ffn_cfg=feed_forward)),
            positional_encoding=dict(num_feats=width // 2),
        ),
        positional_encoding=dict(num_feats=width // 2),
        transformer_decoder=dict(
            num_layers=3, layer_cfg=dict(self_attn_cfg=attention, cross_attn_cfg=attention, ffn_cfg=feed_forward)
        ),
        loss_cls=dict(class_weight=[1.0] * (len(things) + len(stuff)) + [0.1]),
    ),
    panoptic_fusion_head=count,
    train_cfg=dict(num_points=600),  # as large a part of a map as published
    test_cfg=dict(instance_on=False, max_per_image=20),
)

dataset = dict(
    data_root=data_root,
    metainfo=dict(classes=things + stuff, thing_classes=things, stuff_classes=stuff, palette=None),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations"),
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadPanopticAnnotations"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_files = dict(
    ann_file="annotations/panoptic_train.json", data_prefix=dict(img="train/", seg="annotations/panoptic_train/")
)
val_files = dict(
    ann_file="annotations/panoptic_val.json", data_prefix=dict(img="val/", seg="annotations/panoptic_val/")
)
train_dataloader = dict(batch_size=8, **_base_.loading, dataset=dict(**dataset, **train_files, pipeline=train_pipeline))
val_dataloader = dict(batch_size=1, **_base_.loading, dataset=dict(**dataset, **val_files, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(
    _delete_=True,
    type="CocoPanopticMetric",
    ann_file=data_root + val_files["ann_file"],
    seg_prefix=data_root + val_files["data_prefix"]["seg"],
)
test_evaluator = val_evaluator

train_cfg = dict(_delete_=True, type="EpochBasedTrainLoop", max_epochs=epochs, val_interval=epochs)
embedding = dict(decay_mult=0.0)
optim_wrapper = dict(
    optimizer=dict(lr=7e-4, betas=(0.9, 0.95)),
    paramwise_cfg=dict(
        custom_keys=dict(
            _delete_=True, query_embed=embedding, query_feat=embedding, level_embed=embedding, rpb=embedding
        )
    ),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [_base_.warmup, dict(T_max=epochs, **_base_.decay)]
log_processor = dict(by_epoch=True)
default_hooks = dict(
    checkpoint=dict(by_epoch=True, save_last=True, **_base_.hooks.checkpoint), logger=_base_.hooks.logger
)
