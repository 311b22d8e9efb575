_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py",
    "../_base_/dinat-tiny.py",
]
model = dict(
    pretrained=None,
    backbone=dict(_delete_=True, out_indices=[0, 1, 2, 3], **_base_.dinat_tiny_ade20k),
    decode_head=dict(kernel_generate_head=dict(in_channels=[64, 128, 256, 512])),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(paramwise_cfg=_base_.no_decay)
