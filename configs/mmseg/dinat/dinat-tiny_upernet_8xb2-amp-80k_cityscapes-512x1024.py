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
        embed_dim=64,
        depths=[3, 4, 18, 5],
        num_heads=[2, 4, 8, 16],
        kernel_size=7,
        dilations=[[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4] * 3, [1, 2, 1, 2, 1]],
        mlp_ratio=3.0,
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_tiny_in1k_224.pth",
        ),
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
