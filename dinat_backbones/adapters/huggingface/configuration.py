"""Configurations of the Nat and Dinat models of transformers."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin

from ... import zoo


class NatConfig(BackboneConfigMixin, PreTrainedConfig):
    """Configuration of the Nat models; the defaults are those of NAT-Mini.

    Args:
        patch_size: stride of the tokenizer; 4 is the only one.
        num_channels: channels of the image.
        embed_dim, depths, num_heads, kernel_size, mlp_ratio, qkv_bias: the architecture, as for `NAT`.
        hidden_dropout_prob: dropout after the tokenizer and the MLPs.
        attention_probs_dropout_prob: dropout on the attention weights and after the projection of the attention.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        hidden_act: activation of the MLPs: a name in `ACT2FN` of transformers, or a callable (which cannot be saved).
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: of the norms of the blocks, and of the last one.
        layer_scale_init_value: initial layer scale; 0 for models without.
        out_features, out_indices: the maps that a backbone returns, by name ("stem", "stage1", ...) or by index into
            these names; the last stage by default.

    Raises:
        ValueError: `out_features` or `out_indices` that are not among the stages, or contradict each other.
    """

    model_type = "nat"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}

    patch_size: int = 4
    num_channels: int = 3
    embed_dim: int = 64
    depths: list[int] | tuple[int, ...] = (3, 4, 6, 5)
    num_heads: list[int] | tuple[int, ...] = (2, 4, 8, 16)
    kernel_size: int = 7
    mlp_ratio: float = 3.0
    qkv_bias: bool = True
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.1
    hidden_act: Any = "gelu"
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    layer_scale_init_value: float = 0.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.num_layers = len(self.depths)
        self.hidden_size = self.embed_dim * 2 ** (len(self.depths) - 1)  # read by VisionEncoderDecoderModel
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(self.depths)))]
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)


class DinatConfig(NatConfig):
    """Configuration of the Dinat models; the defaults are those of DiNAT-Mini at 224.

    Args, besides those of `NatConfig`:
        dilations: one list per stage with one dilation per block; None for those of DiNAT-Mini, with its depths only.

    Raises:
        ValueError: other depths without `dilations`, and what `NatConfig` raises.
    """

    model_type = "dinat"
    dilations: list | tuple | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.dilations, str):
            raise ValueError(
                f"dilations={self.dilations!r}: expected one list per stage with one dilation per block, such as "
                "dinat_backbones.zoo.dilations(ARCH, SETTING) returns"
            )
        if not self.dilations and list(self.depths) != list(zoo.ARCHS["dinat_mini"].depths):
            raise ValueError(
                f"depths={list(self.depths)} need dilations: one list per stage with one dilation per block, such as "
                f"dinat_backbones.zoo.dilations(ARCH, SETTING) returns. Settings: "
                f"{', '.join(map(str, zoo.settings_of('DiNAT')))}"
            )
        if not self.dilations:
            self.dilations = [list(stage) for stage in zoo.dilations("dinat_mini", "imagenet-224") or ()]
        super().__post_init__(**kwargs)


def published_config(name: str, **overrides: Any) -> NatConfig:
    """The configuration of a published ImageNet classifier, which cannot be read from its weights alone.

    Args:
        name: of a NAT or DiNAT in `zoo.CLASSIFICATION`: "nat_mini", "dinat_large_384_11x11", ...
        overrides: further arguments of `NatConfig` or `DinatConfig`; without `num_labels` there are 1000 classes, which
            have ImageNet's names (`id2label`) where timm is installed, which has them.

    Raises:
        ValueError: there is no such model, or transformers has no class for it (DiNAT_s and the isotropic models).
    """
    families = {"nat": NatConfig, "dinat": DinatConfig}  # by the names of architectures, NAT_SIZE and DINAT_SIZE
    known = [key for key, row in zoo.CLASSIFICATION.items() if row.arch.rpartition("_")[0] in families]
    if name not in known:
        raise ValueError(f"name={name!r}: expected a NAT or DiNAT classifier, one of {', '.join(known)}")
    row = zoo.CLASSIFICATION[name]
    arch = zoo.arch(row.arch)
    kwargs: dict[str, Any] = dict(
        embed_dim=arch.embed_dim,
        depths=list(arch.depths),
        num_heads=list(arch.num_heads),
        kernel_size=row.kernel_size,
        mlp_ratio=arch.mlp_ratio,
        layer_scale_init_value=arch.layer_scale or 0.0,
        num_labels=row.num_classes,
    )
    if row.dilations:
        kwargs["dilations"] = [list(stage) for stage in zoo.dilations(row.arch, row.dilations) or ()]
    if not overrides.keys() & {"num_labels", "id2label", "label2id"}:
        kwargs |= _imagenet_names(row.num_classes)
    return families[row.arch.rpartition("_")[0]](**(kwargs | overrides))


def _imagenet_names(classes: int) -> dict[str, Any]:
    """`id2label` and `label2id` of ImageNet-1k ("tabby, tabby cat" is 281); empty without a timm that has them."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return {}
    info = ImageNetInfo()
    names = [info.index_to_description(index) for index in range(classes)]
    # two classes are called crane, two maillot: the last ones count in label2id, as in transformers' own files
    return dict(id2label=dict(enumerate(names)), label2id={name: index for index, name in enumerate(names)})
