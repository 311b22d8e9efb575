# What all Mask2Former configs share: the backbone, with 11x11 windows, and the learning rates and decays of parameters.
dinat_large = dict(
    type="DiNAT",
    arch="dinat_large",
    dilations="mask2former",
    drop_path_rate=0.3,
    init_cfg=dict(type="Pretrained", checkpoint="dinat_large_21k_11x11"),
)
# Of several keys in a parameter's name the longest decides. Norms have no decay; rpb has, as in the original trainer,
# whose list of exceptions does not know it.
backbone_norm = dict(lr_mult=0.1, decay_mult=0.0)
embedding = dict(lr_mult=1.0, decay_mult=0.0)
parameter_keys = {
    "backbone": dict(lr_mult=0.1, decay_mult=1.0),
    "backbone.norm": backbone_norm,
    "patch_embed.norm": backbone_norm,
    "downsample.norm": backbone_norm,
    **{f"blocks.{block}.norm": backbone_norm for block in range(18)},
    "query_embed": embedding,
    "query_feat": embedding,
    "level_embed": embedding,
}
