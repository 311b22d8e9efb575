_base_ = "./mask-rcnn_dinat-s-tiny_fpn_amp-ms-crop-3x_coco.py"
model = dict(
    backbone=dict(
        depths=[2, 2, 18, 2],
        dilations=[[1, 28], [1, 14], [1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7, 1, 3, 1, 5, 1, 7], [1, 3]],
        drop_path_rate=0.35,
        init_cfg=dict(
            type="Pretrained",
            checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet1k/dinat_s_small_in1k_224.pth",
        ),
    )
)
