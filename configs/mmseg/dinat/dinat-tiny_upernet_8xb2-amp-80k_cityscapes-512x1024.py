# No published row: the recipe and the dilations of ADE20K at 512 on half as many iterations.
_base_ = [
    "../../_base_/upernet-160k.py",
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/datasets/cityscapes.py",
]
model = dict(
    data_preprocessor=dict(size=(512, 1024)),
    backbone=dict(
        _delete_=True,
        type="DiNAT",
        arch="dinat_tiny",
        dilations="ade20k-512",
        drop_path_rate=0.3,
        init_cfg=dict(type="Pretrained", checkpoint="dinat_tiny"),
    ),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
train_cfg = dict(max_iters=80_000, val_interval=8000)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=80_000),
]
default_hooks = dict(checkpoint=dict(interval=8000))
