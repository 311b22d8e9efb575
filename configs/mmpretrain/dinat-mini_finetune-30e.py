# Fine-tunes an ImageNet classifier on classes of your own, images in FOLDER/train/CLASS and FOLDER/val/CLASS:
#
#     python tools/train.py configs/mmpretrain/dinat-mini_finetune-30e.py --cfg-options model.head.num_classes=10 \
#         train_dataloader.dataset.data_root=FOLDER val_dataloader.dataset.data_root=FOLDER
#
# The schedule is the released one of fine-tuning at 384 pixels: 30 epochs of 512 images a step (8 GPUs with 64), from
# 5e-5 linearly to 0, hardly any weight decay, no mixup. Another model is another `arch` and `checkpoint`; the head's
# `in_channels` are the width of its last stage.
_base_ = [__import__("mmpretrain").__path__[0] + "/.mim/configs/_base_/default_runtime.py"]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)

model = dict(
    type="ImageClassifier",
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True),
    backbone=dict(
        type="DiNAT",
        arch="dinat_mini",
        dilations="imagenet-224",
        out_indices=[3],  # alone: its norm is then loaded, too
        init_cfg=dict(type="Pretrained", checkpoint="dinat_mini"),
    ),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(
        type="LinearClsHead", num_classes=10, in_channels=512, loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1)
    ),
)

image = dict(type="LoadImageFromFile")
bicubic = dict(backend="pillow", interpolation="bicubic")
train_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="CustomDataset",
        data_root="data/images",
        data_prefix="train",
        pipeline=[
            image,
            dict(type="RandomResizedCrop", scale=224, **bicubic),
            dict(type="RandomFlip", prob=0.5, direction="horizontal"),
            dict(type="PackInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=64,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="CustomDataset",
        data_root="data/images",
        data_prefix="val",
        pipeline=[
            image,
            dict(type="ResizeEdge", scale=256, edge="short", **bicubic),
            dict(type="CenterCrop", crop_size=224),
            dict(type="PackInputs"),
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="Accuracy", topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(by_epoch=True, max_epochs=30, val_interval=1)
val_cfg = {}
test_cfg = {}
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=5e-5, betas=(0.9, 0.999), weight_decay=1e-10))
param_scheduler = dict(type="LinearLR", start_factor=1.0, end_factor=0.0, begin=0, end=30, convert_to_iter_based=True)
auto_scale_lr = dict(enable=False, base_batch_size=512)
