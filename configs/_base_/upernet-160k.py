# Every segmentation row of the table was trained this way, whatever the crop: UPerNet with an FCN head on the third
# stage, AdamW without decay on rpb and norms, 160k iterations of 16 images in all, fp16.
#
# The paths are spelled out because mmengine resolves "mmseg::" through the distribution mmsegmentation; the maintained
# continuation has another name.
_base_ = [
    __import__("mmseg").__path__[0] + "/.mim/configs/_base_/" + name
    for name in ("models/upernet_swin.py", "schedules/schedule_160k.py", "default_runtime.py")
]
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
    optimizer=dict(_delete_=True, type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
)
# both from the start: the warm-up is a factor on the polynomial
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160_000),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
