_base_ = "../../_base_/upernet-160k_ade20k-512x512.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT_s",
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        kernel_size=7,
        dilations=[[1, 16], [1, 8], [1, 2, 1, 3, 1, 4], [1, 2]],
        mlp_ratio=4.0,
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth",
        ),
    )
)
