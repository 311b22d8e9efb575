_base_ = "./dinat-tiny_upernet_8xb2-amp-80k_cityscapes-512x1024.py"
model = dict(
    backbone=dict(
        embed_dim=192,
        num_heads=[6, 12, 24, 48],
        mlp_ratio=2.0,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth",
        ),
    ),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(type="OptimWrapper")
