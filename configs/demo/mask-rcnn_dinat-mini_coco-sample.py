# The published DiNAT-Mini recipe on any few images in COCO format, which it trains on and is evaluated on:
#     COCO_SAMPLE=path/to/coco python tools/train.py configs/demo/mask-rcnn_dinat-mini_coco-sample.py
# needs annotations/instances_val2017.json and val2017/ there. Random weights to start from and fp32, to run offline and
# on a CPU.
_base_ = "../mmdet/dinat/mask-rcnn_dinat-mini_fpn_amp-ms-crop-3x_coco.py"

root = "{{$COCO_SAMPLE:data/coco}}/"
images = dict(
    data_root=root, ann_file="annotations/instances_val2017.json", data_prefix=dict(img="val2017/"), backend_args=None
)
model = dict(backbone=dict(init_cfg=None))
train_dataloader = dict(
    batch_size=1,
    num_workers=1,
    dataset=dict(
        _delete_=True,
        type="RepeatDataset",
        times=5,
        dataset=dict(type="CocoDataset", pipeline={{_base_.train_pipeline}}, **images),
    ),
)
val_dataloader = dict(num_workers=1, dataset=images)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
param_scheduler = [dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=5)]  # there are 10 steps
optim_wrapper = dict(type="OptimWrapper")
default_hooks = dict(logger=dict(interval=1))
