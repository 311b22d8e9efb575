"""NAT and DiNAT for Hugging Face transformers, with the class names and checkpoints that it published.

    from dinat_backbones.adapters.huggingface import DinatForImageClassification
    model = DinatForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")

Importing this file also registers the models with AutoConfig, AutoModel, AutoBackbone, AutoModelForImageClassification
and AutoImageProcessor, which is how the segmentation models of transformers find them: with a `DinatConfig` as
`backbone_config` of UperNetConfig, MaskFormerConfig, Mask2FormerConfig or OneFormerConfig, be it ours or
`transformers.DinatConfig`, and how `transformers.pipeline` does.

The modules are the backbone's (`dinat_backbones.layers`) with their children under the names of the `shi-labs/*`
files, so that these are the names in state dicts and `named_modules`, and for tools that replace modules by name
(adapters of PEFT, quantization).
"""

import sys
from importlib.metadata import PackageNotFoundError, version

try:
    from transformers import (
        AutoBackbone,
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
        ViTImageProcessor,
        ViTImageProcessorPil,
    )
    from transformers import DinatConfig as TheirDinatConfig

    # an older transformers lacks some of the names that these two import
    from .configuration import DinatConfig, NatConfig, published_config
    from .models import (
        DinatBackbone,
        DinatForImageClassification,
        DinatModel,
        DinatPreTrainedModel,
        NatBackbone,
        NatForImageClassification,
        NatModel,
        NatPreTrainedModel,
    )
except ImportError as error:
    if (error.name or "").split(".")[0] != "transformers":
        raise
    raise ModuleNotFoundError(
        'dinat_backbones.adapters.huggingface needs transformers 5: pip install "dinat_backbones[huggingface]"',
        name="transformers",
    ) from error

__all__ = [
    "DinatBackbone", "DinatConfig", "DinatForImageClassification", "DinatModel", "DinatPreTrainedModel",
    "NatBackbone", "NatConfig", "NatForImageClassification", "NatModel", "NatPreTrainedModel",
    "published_config",
]  # fmt: skip

# exist_ok: transformers has its own Dinat, which needs functions that NATTEN has removed
for _config, _model, _classifier, _backbone in (
    (NatConfig, NatModel, NatForImageClassification, NatBackbone),
    (DinatConfig, DinatModel, DinatForImageClassification, DinatBackbone),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    # configs of transformers' own class, which has the same fields, get our models, too
    for _known in (_config, *([TheirDinatConfig] if _config is DinatConfig else [])):
        AutoModel.register(_known, _model, exist_ok=True)
        AutoModelForImageClassification.register(_known, _classifier, exist_ok=True)
        AutoBackbone.register(_known, _backbone, exist_ok=True)
    _processors: dict[str, type] = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}
    AutoImageProcessor.register(_config, image_processor_classes=_processors, exist_ok=True)


def _replace_unusable_classes() -> None:
    """`pipeline` looks models up in transformers itself, by the names in a config's `architectures`. Importing its own
    Dinat fails beside a NATTEN of 0.20 or later, and without any it cannot be built."""
    try:
        usable = tuple(map(int, version("natten").split(".")[:2])) < (0, 20)
    except (PackageNotFoundError, ValueError):
        usable = False
    if not usable:
        for ours in (DinatBackbone, DinatForImageClassification, DinatModel, DinatPreTrainedModel):
            setattr(sys.modules["transformers"], ours.__name__, ours)  # a lazy module, which replaced the imported one


_replace_unusable_classes()
