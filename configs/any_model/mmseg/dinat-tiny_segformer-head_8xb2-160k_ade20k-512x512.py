_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py",
    "../_base_/dinat-tiny.py",
]
model = dict(
    backbone=dict(_delete_=True, out_indices=[0, 1, 2, 3], **_base_.dinat_tiny_ade20k),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(paramwise_cfg=_base_.no_decay)
