_base_ = [
    __import__("mmseg").__path__[0]
    + "/.mim/configs/mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-90k_cityscapes-512x1024.py",
    "../../_base_/mask2former_dinat-large.py",
]
custom_imports = dict(imports=["mmdet.models", "dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, **_base_.dinat_large))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **_base_.parameter_keys)))
