_base_ = "./dinat-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        embed_dim=96,
        num_heads=[3, 6, 12, 24],
        mlp_ratio=2.0,
        drop_path_rate=0.5,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_small_in1k_224.pth",
        ),
    ),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
