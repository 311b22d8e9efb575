# What all Mask2Former configs share: the backbone, with 11x11 neighborhoods, and which of its parameters are trained how.
dinat_large = dict(
    type="DiNAT",
    embed_dim=192,
    depths=[3, 4, 18, 5],
    num_heads=[6, 12, 24, 48],
    kernel_size=11,
    dilations=[[1, 14, 1], [1, 4, 1, 7], [1, 2, 1, 3] * 4 + [1, 3], [1] * 5],
    mlp_ratio=2.0,
    drop_path_rate=0.3,
    init_cfg=dict(
        type="Pretrained",
        checkpoint="https://shi-labs.com/projects/dinat/checkpoints/imagenet22k/dinat_large_in22k_224_11x11interp.pth",
    ),
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
