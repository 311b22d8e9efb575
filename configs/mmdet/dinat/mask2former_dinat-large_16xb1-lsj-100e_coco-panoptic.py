_base_ = [
    "mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py",
    "../../_base_/mask2former_dinat-large.py",
]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
model = dict(backbone=dict(_delete_=True, **_base_.dinat_large))
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **_base_.parameter_keys)))
