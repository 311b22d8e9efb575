_base_ = ["./upernet-160k.py", __import__("mmseg").__path__[0] + "/.mim/configs/_base_/datasets/ade20k_640x640.py"]
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
# the published scales are relative to the size of the single-scale test, mmseg's to that of the image
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(int(2560 * ratio), int(640 * ratio)), keep_ratio=True) for ratio in _base_.img_ratios
]
