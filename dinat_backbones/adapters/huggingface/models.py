"""The models that transformers published: bare, with a classifier, and as a backbone of other models."""

import copy
import re
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from ...checkpoint.fitting import RGB, adapt_image_channels
from ...layers import normed
from .configuration import DinatConfig, NatConfig
from .layers import NatEmbeddings, NatEncoder, NatLayer, NatSelfAttention

logger = logging.get_logger(__name__)
# Arguments of from_pretrained that say where the files are
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


@dataclass
class NatModelOutput(BaseModelOutputWithPooling):
    """Output of NatModel and DinatModel: `last_hidden_state` ``[B, H/32, W/32, C]`` (sizes rounded up), `pooler_output`
    ``[B, C]``, `hidden_states` of the embeddings and after every stage with its downsampler ``[B, H_i, W_i, C_i]``,
    `attentions` of every stage's last layer ``[B, heads, H_i, W_i, K * K]``, `reshaped_hidden_states`
    ``[B, C_i, H_i, W_i]``."""

    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class NatImageClassifierOutput(ImageClassifierOutput):
    """`loss` and `logits` ``[B, num_labels]``; the others as in `NatModelOutput`."""

    reshaped_hidden_states: tuple[torch.Tensor, ...] | None = None


def _output_or_tuple(output, return_dict: bool):
    """The output, or the tuple that transformers returned: without the reshaped maps, but with a pooler's None."""
    if return_dict:
        return output
    values = {field.name: getattr(output, field.name) for field in fields(output)}
    del values["reshaped_hidden_states"]
    return tuple(value for name, value in values.items() if value is not None or name == "pooler_output")


class NatPreTrainedModel(PreTrainedModel):
    """Base class of the models: configuration, initial weights, checkpoint layout."""

    config_class = NatConfig
    base_model_prefix = "nat"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NatLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NatSelfAttention) and module.rpb is not None:
            init.trunc_normal_(module.rpb, std=self.config.initializer_range)
        elif isinstance(module, NatLayer) and module.layer_scale_parameters is not None:
            init.constant_(module.layer_scale_parameters, self.config.layer_scale_init_value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. With a `num_channels` (an argument, or of a `config`) that is not that of the file's RGB
        model, its first convolution is adapted to these images by `checkpoint.fitting.adapt_image_channels`."""
        config = kwargs.get("config")
        given = config.num_channels if isinstance(config, NatConfig) else None
        wanted = kwargs.get("num_channels", given)
        if wanted in (None, RGB):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        where = {key: kwargs[key] for key in _WHERE if key in kwargs}
        if cls.config_class.from_pretrained(pretrained_model_name_or_path, **where).num_channels != RGB:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if given is not None:
            kwargs["config"] = copy.deepcopy(config)
            kwargs["config"].num_channels = RGB
        if "num_channels" in kwargs or given is None:
            kwargs["num_channels"] = RGB
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        model._adapt_image_channels(wanted)
        logger.warning(
            "the first convolution of %s is adapted from RGB to images of %d channels",
            pretrained_model_name_or_path,
            wanted,
        )
        return loaded

    def _adapt_image_channels(self, channels: int) -> None:
        patches: Any = self.get_input_embeddings()
        old = patches.projection[0]
        new = nn.Conv2d(channels, old.out_channels, 3, stride=2, padding=1).to(old.weight)
        with torch.no_grad():
            new.weight.copy_(adapt_image_channels(old.weight, channels))
            new.bias.copy_(old.bias)  # type: ignore[union-attr]
        patches.projection[0] = new.train(old.training)
        patches.num_channels = channels
        for module in self.modules():
            if isinstance(module, NatPreTrainedModel):
                module.config.num_channels = channels

    def get_input_embeddings(self) -> nn.Module:
        model: Any = getattr(self, self.base_model_prefix, self)
        return model.embeddings.patch_embeddings

    def _given_or_configured(self, **given: bool | None) -> tuple[bool, ...]:
        return tuple(getattr(self.config, name) if value is None else value for name, value in given.items())


class NatModel(NatPreTrainedModel):
    """The backbone, a norm of the last map and a mean over it.

    Raises:
        ValueError: depths, num_heads, dilations or patch_size of `config` that do not fit together.
    """

    def __init__(self, config: NatConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.num_levels = len(config.depths)
        self.num_features = config.embed_dim * 2 ** (self.num_levels - 1)
        self.embeddings = NatEmbeddings(config)
        self.encoder = NatEncoder(config)
        self.layernorm = nn.LayerNorm(self.num_features, eps=config.layer_norm_eps)
        self.pooler = nn.AdaptiveAvgPool1d(1) if add_pooling_layer else None
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NatModelOutput | tuple:
        """Images ``[B, num_channels, H, W]`` of any size to a `NatModelOutput`; the other arguments are
        those of all transformers models.

        Raises:
            ValueError: no `pixel_values`, or ones of another shape.
        """
        attentions, hidden, as_dict = self._given_or_configured(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states, return_dict=return_dict
        )
        if pixel_values is None:
            raise ValueError("pixel_values are missing; expected images [B, num_channels, H, W]")
        states, _, weights = self.encoder(self.embeddings(pixel_values), attentions)
        last = normed(self.layernorm, states[-1])
        output = NatModelOutput(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last.flatten(1, 2).mT).flatten(1),
            hidden_states=states if hidden else None,
            attentions=weights,
            reshaped_hidden_states=tuple(state.permute(0, 3, 1, 2) for state in states) if hidden else None,
        )
        return _output_or_tuple(output, as_dict)


class NatForImageClassification(NatPreTrainedModel):
    """A linear classifier on the pooled output.

    The loss is the mean squared error with one label and the cross-entropy with several, unless `config.problem_type`
    says otherwise.
    """

    model_class: type[NatModel] = NatModel

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        model = self.model_class(config)
        setattr(self, self.base_model_prefix, model)
        self.classifier = nn.Linear(model.num_features, self.num_labels) if self.num_labels else nn.Identity()
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> NatImageClassifierOutput | tuple:
        """As `NatModel`; `labels` ``[B]`` are class indices (int64) or, for a regression, values."""
        (as_dict,) = self._given_or_configured(return_dict=return_dict)
        model = getattr(self, self.base_model_prefix)
        outputs = model(pixel_values, output_attentions, output_hidden_states, return_dict=True)
        logits = self.classifier(outputs.pooler_output)
        output = NatImageClassifierOutput(
            loss=None if labels is None else self.loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            reshaped_hidden_states=outputs.reshaped_hidden_states,
        )
        return _output_or_tuple(output, as_dict)


class NatBackbone(BackboneMixin, NatPreTrainedModel):
    """Feature maps ``[B, C_i, H_i, W_i]`` of `config.out_features`, each after its own norm, for detection and
    segmentation models; `channels` lists the C_i. Strides are 4 for "stem" and "stage1", then 8, 16, 32.

    Stages after the last of `out_features` are neither built nor computed: without a gradient they would stop
    DistributedDataParallel. Their tensors in a file or state dict of the whole architecture are not unexpected."""

    def __init__(self, config: NatConfig):
        super().__init__(config)
        self.embeddings = NatEmbeddings(config)
        self.built_stages = max(map(self.stage_names.index, self.out_features))  # 0 is the stem
        self.encoder = NatEncoder(config, self.built_stages)
        self.num_features = [config.embed_dim, *(config.embed_dim * 2**i for i in range(len(config.depths)))]
        norms = zip(self.out_features, self.channels, strict=True)
        self.hidden_states_norms = nn.ModuleDict({stage: nn.LayerNorm(channels) for stage, channels in norms})
        self._keys_to_ignore_on_load_unexpected = self._left_out()
        self.post_init()

    def _left_out(self) -> set[str]:
        """Patterns of the names of tensors that belong to the architecture, but to a part that `out_features` leaves
        out: later stages, the way there, and the norms of outputs that nobody asked for."""
        stages = [f"{i}.downsample" for i in range(self.built_stages)[-1:] if i + 1 < len(self.config.depths)]
        stages += [str(i) for i in range(self.built_stages, len(self.config.depths))]
        parts = [f"encoder.levels.{stage}." for stage in stages]
        parts += [f"hidden_states_norms.{stage}." for stage in self.stage_names if stage not in self.out_features]
        return {rf"(^|\.){re.escape(part)}" for part in parts}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        patterns = self._left_out()
        for key in [key for key in state_dict if key.startswith(prefix)]:
            if any(re.match(pattern, key[len(prefix) :]) for pattern in patterns):
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput:
        """Images ``[B, num_channels, H, W]`` of any size; the `hidden_states` are ``[B, H_i, W_i, C_i]`` of the
        stem and every built stage."""
        attentions, hidden = self._given_or_configured(
            output_attentions=output_attentions, output_hidden_states=output_hidden_states
        )
        _, states, weights = self.encoder(self.embeddings(pixel_values), attentions)
        maps = zip(self.stage_names[: len(states)], states, strict=True)
        return BackboneOutput(
            feature_maps=tuple(  # type: ignore[arg-type]  # declared as a tuple of one
                normed(self.hidden_states_norms[stage], state).permute(0, 3, 1, 2).contiguous()
                for stage, state in maps
                if stage in self.out_features
            ),
            hidden_states=states if hidden else None,
            attentions=weights,
        )


class DinatPreTrainedModel(NatPreTrainedModel):
    """`NatPreTrainedModel` with dilations."""

    config_class = DinatConfig
    base_model_prefix = "dinat"


class DinatModel(DinatPreTrainedModel, NatModel):
    """`NatModel` with dilations."""


class DinatForImageClassification(DinatPreTrainedModel, NatForImageClassification):
    """`NatForImageClassification` with dilations."""

    model_class = DinatModel


class DinatBackbone(DinatPreTrainedModel, NatBackbone):
    """`NatBackbone` with dilations."""
