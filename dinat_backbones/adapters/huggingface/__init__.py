"""NAT and DiNAT for Hugging Face transformers, with the class names and checkpoints that it published.

    from dinat_backbones.adapters.huggingface import DinatForImageClassification
    model = DinatForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")

Importing this file also registers the models with AutoConfig, AutoModel, AutoBackbone, AutoModelForImageClassification
and AutoImageProcessor, which is how the segmentation models of transformers find them: with a `DinatConfig` as
`backbone_config` of UperNetConfig, MaskFormerConfig, Mask2FormerConfig or OneFormerConfig.

The modules are the backbone's (`dinat_backbones.layers`) with their children under the names of the `shi-labs/*`
files, so that these are the names in state dicts and `named_modules`, and for tools that replace modules by name
(adapters of PEFT, quantization).
"""

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
    AutoModel.register(_config, _model, exist_ok=True)
    AutoModelForImageClassification.register(_config, _classifier, exist_ok=True)
    AutoBackbone.register(_config, _backbone, exist_ok=True)
    _processors: dict[str, type] = {"torchvision": ViTImageProcessor, "pil": ViTImageProcessorPil}
    AutoImageProcessor.register(_config, image_processor_classes=_processors, exist_ok=True)
