_base_ = "./dinat-s-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        depths=[2, 2, 18, 2],
        dilations=[[1, 16], [1, 8], [1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4, 1, 2, 1, 3, 1, 4], [1, 2]],
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth",
        ),
    )
)
