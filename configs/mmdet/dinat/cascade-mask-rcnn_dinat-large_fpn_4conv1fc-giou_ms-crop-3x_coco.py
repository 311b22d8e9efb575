_base_ = "./cascade-mask-rcnn_dinat-small_fpn_4conv1fc-giou_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(
        embed_dim=192,
        num_heads=[6, 12, 24, 48],
        drop_path_rate=0.6,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224.pth",
        ),
    ),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(lr=7.5e-05))
