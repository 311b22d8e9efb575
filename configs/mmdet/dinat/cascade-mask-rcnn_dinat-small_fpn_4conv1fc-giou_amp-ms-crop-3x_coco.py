_base_ = "./cascade-mask-rcnn_dinat-tiny_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
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
    neck=dict(in_channels=[96, 192, 384, 768]),
)
