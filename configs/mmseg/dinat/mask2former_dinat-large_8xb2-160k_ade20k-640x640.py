_base_ = [
    __import__("mmseg").__path__[0]
    + "/.mim/configs/mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py",
    "../../_base_/mask2former_dinat-large.py",
]
custom_imports = dict(imports=["mmdet.models", "dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, **_base_.dinat_large))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **_base_.parameter_keys)))
# the published scales are relative to the size of the single-scale test, mmseg's to that of the image
tta_pipeline = _base_.tta_pipeline
tta_pipeline[1].transforms[0] = [
    dict(type="Resize", scale=(int(2560 * ratio), int(640 * ratio)), keep_ratio=True) for ratio in _base_.img_ratios
]
