_base_ = "./dinat-tiny_upernet_8xb2-amp-80k_cityscapes-512x1024.py"
model = dict(
    backbone=dict(arch="dinat_large", init_cfg=dict(checkpoint="dinat_large_21k")),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(type="OptimWrapper")
