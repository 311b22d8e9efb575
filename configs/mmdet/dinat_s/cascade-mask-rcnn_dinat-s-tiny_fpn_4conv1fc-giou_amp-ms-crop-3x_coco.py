_base_ = ["../../_base_/cascade-mask-rcnn_fpn_4conv1fc-giou.py", "../../_base_/ms-crop-3x_coco.py"]
model = dict(
    backbone=dict(
        _delete_=True,
        type="DiNAT_s",
        embed_dim=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        kernel_size=7,
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7], [1, 3]],
        mlp_ratio=4.0,
        drop_path_rate=0.3,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_tiny_in1k_224.pth",
        ),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
