# What the demos share: a small DiNAT trained from scratch on the drawings of tools/make_shapes.py, within minutes on
# two CPU cores. None of the names is one that a framework's own base file sets.
custom_imports = dict(imports=["dinat_backbones.adapters.openmmlab"], allow_failed_imports=False)

small_dinat = dict(
    type="DiNAT",
    embed_dim=32,
    depths=[2, 2, 2, 2],
    num_heads=[2, 4, 8, 16],
    kernel_size=5,
    dilations=[[1, 4], [1, 4], [1, 2], [1, 1]],
    mlp_ratio=2.0,
    drop_path_rate=0.0,
    # larger than the backbone's own start, which suits long schedules
    init_cfg=dict(type="Xavier", layer="Linear", distribution="uniform"),
)
normalization = dict(mean=[127.5, 127.5, 127.5], std=[64.0, 64.0, 64.0])  # of the drawings
things = ("circle", "triangle", "ring")
shapes_root = "work_dirs/demo/shapes-{}/"  # by the size of the images
# reading takes 1 ms an image, and the cores have enough to do
loading = dict(num_workers=0, persistent_workers=False)

# No exceptions from the decay, which is next to nothing in so short a run: mmengine would make every parameter a group
# of its own, which takes a tenth of the time.
adamw = dict(
    type="AdamW",
    betas=(0.9, 0.95),
    weight_decay=0.05,
    fused=not __import__("torch").__version__.startswith("2.3."),  # torch 2.3 has it on GPUs alone
)
clipping = dict(max_norm=5.0)
warmup = dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=60)
decay = dict(type="CosineAnnealingLR", eta_min=0.0, by_epoch=True, convert_to_iter_based=True)
hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=1, max_keep_ckpts=2))
randomness = dict(seed=0)
custom_hooks = [dict(type="SeedStepsHook")]  # a resumed run gives what an uninterrupted one does
