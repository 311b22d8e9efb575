"""Layer-wise learning rates for mmdet, mmseg and mmpretrain, whose own constructors know only backbones of theirs."""

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ...optim import has_weight_decay, layer_scales


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(force=True)
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """mmengine's constructor with learning rates that decay from the heads down to the tokenizer of a NAT, DiNAT or
    DiNAT_s, and without weight decay of norms, biases and rpb.

        optim_wrapper = dict(
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            constructor="LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay_rate=0.8),
        )

    `layer_decay_rate` (mmpretrain's word; mmdet's and mmseg's, `decay_rate`, is understood) is `layer_decay` of
    `optim.layer_scales`. What else mmengine's constructor knows in `paramwise_cfg` (`custom_keys`, ...) applies, too.

    Raises:
        ValueError: no rate, ``decay_type="stage_wise"``, and whatever `optim.layer_scales` raises.
    """

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """Fills `params`; mmengine's method calls it for each module in the model."""
        super().add_params(params, module, prefix, **kwargs)
        if prefix:
            return
        cfg = self.paramwise_cfg
        rate = cfg.get("layer_decay_rate", cfg.get("decay_rate"))
        if rate is None:
            raise ValueError(f"paramwise_cfg={dict(cfg)}: {type(self).__name__} needs layer_decay_rate, such as 0.8")
        if cfg.get("decay_type", "layer_wise") != "layer_wise":
            raise ValueError(
                f"decay_type={cfg['decay_type']!r}: expected 'layer_wise', the only one for these backbones"
            )
        scales = layer_scales(module, rate)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        merged: dict[str, dict[str, Any]] = {}
        for group in params:
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                name = names[id(parameter)]
                settings = {key: value for key, value in group.items() if key != "params"}
                settings["lr_scale"] = scales[name]
                base_lr: Any = settings.get("lr", self.base_lr)
                settings["lr"] = base_lr * scales[name]
                if not has_weight_decay(name, parameter):
                    settings["weight_decay"] = 0.0
                found = merged.setdefault(repr(sorted(settings.items())), dict(params=[], param_names=[], **settings))
                found["params"].append(parameter)
                found["param_names"].append(name)
        params[:] = merged.values()
