# DiNAT-Tiny as the published detectors and segmentors have it, and how they were trained: AdamW without decay on rpb
# and norms.
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)
imagenet = dict(type="Pretrained", checkpoint="dinat_tiny")
dinat_tiny_coco = dict(type="DiNAT", arch="dinat_tiny", dilations="coco", drop_path_rate=0.2, init_cfg=imagenet)
dinat_tiny_ade20k = dict(type="DiNAT", arch="dinat_tiny", dilations="ade20k-512", drop_path_rate=0.3, init_cfg=imagenet)
adamw_coco = dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
adamw_ade20k = dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01)
no_decay = dict(custom_keys=dict(rpb=dict(decay_mult=0.0), norm=dict(decay_mult=0.0)))
# For recipes that have a tenth of the learning rate for "backbone": the longest key in a parameter's name decides.
tenth = dict(lr_mult=0.1, decay_mult=0.0)
no_decay_at_a_tenth = dict(
    custom_keys={
        **{f"{name}.norm": tenth for name in ("patch_embed", "downsample", "backbone")},
        **{f"blocks.{block}.{name}": tenth for block in range(18) for name in ("norm", "attn.rpb")},
    }
)
