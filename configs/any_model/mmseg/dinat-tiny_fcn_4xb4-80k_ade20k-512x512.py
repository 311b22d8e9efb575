# The head reads the last stage at stride 32, where the original has a dilated ResNet at stride 8.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py",
    "../_base_/dinat-tiny.py",
]
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, out_indices=[2, 3], **_base_.dinat_tiny_ade20k),
    decode_head=dict(in_channels=512, in_index=1),
    auxiliary_head=dict(in_channels=256, in_index=0),
)
# the learning rate of the published segmentors, and the least one as much smaller
optim_wrapper = dict(optimizer=dict(_delete_=True, **_base_.adamw_ade20k), paramwise_cfg=_base_.no_decay)
param_scheduler = [dict(_base_.param_scheduler[0], eta_min=_base_.param_scheduler[0].eta_min * 6e-5 / 0.01)]
