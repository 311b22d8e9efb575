_base_ = "./mask2former_dinat-large_8xb2-160k_ade20k-instance.py"

crop_size = (512, 1024)
pad = dict(type="BatchFixedSizePad", size=crop_size, pad_mask=True, mask_pad_value=0, pad_seg=False)
model = dict(
    data_preprocessor=dict(batch_augments=[pad]),
    panoptic_head=dict(num_things_classes=8, loss_cls=dict(class_weight=[1.0] * 8 + [0.1])),
    panoptic_fusion_head=dict(num_things_classes=8),
)

data_root = "data/cityscapes/"
annotations = "annotations/instancesonly_filtered_gtFine_{}.json"
train_pipeline = _base_.train_pipeline
train_pipeline[2].scales = [(4096, int(1024 * tenths * 0.1)) for tenths in range(5, 21)]
train_pipeline[3].crop_size = crop_size
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (2048, 1024)
cityscapes = dict(type="CityscapesDataset", data_root=data_root)
train_files = dict(ann_file=annotations.format("train"), data_prefix=dict(img="leftImg8bit/train/"))
val_files = dict(ann_file=annotations.format("val"), data_prefix=dict(img="leftImg8bit/val/"))
train_dataloader = dict(dataset=dict(**cityscapes, **train_files, pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(**cityscapes, **val_files, pipeline=test_pipeline))
test_dataloader = val_dataloader
# AP over thresholds and classes as Cityscapes defines it is CityScapesMetric's; COCO's needs no extra package
val_evaluator = dict(ann_file=data_root + annotations.format("val"))
test_evaluator = val_evaluator

param_scheduler = dict(end=90_000)
train_cfg = dict(max_iters=90_000)
