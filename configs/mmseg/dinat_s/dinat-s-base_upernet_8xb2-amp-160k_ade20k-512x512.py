_base_ = "./dinat-s-small_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        embed_dim=128,
        num_heads=[4, 8, 16, 32],
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_base_in1k_224.pth",
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
