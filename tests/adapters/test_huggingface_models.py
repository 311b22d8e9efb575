"""The backbones of adapters/huggingface in transformers' detectors and segmentors, which find them by their config."""

import copy
import importlib
from typing import NamedTuple

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="transformers 5 is not installed: pip install 'dinat_backbones[huggingface]'"
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # noqa: E402

import dinat_backbones.adapters.huggingface as hf  # noqa: E402


def config_of_backbone(stages, **entries):
    return hf.DinatConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], kernel_size=3, dilations=[[2], [1], [1], [1]],
        drop_path_rate=0.0, out_features=stages, **entries,
    )  # fmt: skip


def segmentation_models():
    backbone = config_of_backbone(["stage1", "stage2", "stage3", "stage4"])
    width, queries = 64, 4
    small = dict(num_queries=queries, num_attention_heads=2, dim_feedforward=16, train_num_points=64, num_labels=2)
    small |= dict(hidden_dim=width, encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2)
    text = dict(width=width, context_length=7, num_layers=1, vocab_size=20, n_ctx=1, proj_layers=1)
    detr = transformers.DetrConfig(
        d_model=width, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=queries, backbone_config=backbone,
    )  # fmt: skip
    return {
        "UperNetForSemanticSegmentation": transformers.UperNetConfig(
            backbone_config=backbone, hidden_size=16, auxiliary_in_channels=32, auxiliary_channels=8, num_labels=2
        ),
        "MaskFormerForInstanceSegmentation": transformers.MaskFormerConfig(
            backbone_config=backbone, fpn_feature_size=width, mask_feature_size=width, decoder_config=detr, num_labels=2
        ),
        "Mask2FormerForUniversalSegmentation": transformers.Mask2FormerConfig(
            backbone_config=backbone, feature_size=width, mask_feature_size=width, **small
        ),
        "OneFormerForUniversalSegmentation": transformers.OneFormerConfig(
            backbone_config=backbone, conv_dim=width, mask_dim=width, is_training=True, task_seq_len=7,
            **small, **{f"text_encoder_{key}": value for key, value in text.items()},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", segmentation_models())
def test_segmentation_models_train(name):
    torch.manual_seed(0)
    model = getattr(transformers, name)(segmentation_models()[name])
    assert [type(module) for module in model.modules()].count(hf.DinatBackbone) == 1
    masks = torch.zeros(2, 64, 96)
    masks[0, :, :40] = masks[1, :, 40:] = 1
    inputs = dict(pixel_values=torch.randn(2, 3, 64, 96))
    if name.startswith("UperNet"):
        targets = dict(labels=masks[1].long()[None].repeat(2, 1, 1))
    else:
        targets = dict(mask_labels=[masks] * 2, class_labels=[torch.tensor([0, 1])] * 2)
    if name.startswith("OneFormer"):
        inputs |= dict(task_inputs=torch.randint(0, 20, (2, 7)).float())
        targets |= dict(text_inputs=torch.randint(0, 20, (2, 3, 7)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    before = copy.deepcopy(model.state_dict())
    loss = model.train()(**inputs, **targets).loss.sum()
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    weights = [key for key in before if ".query.weight" in key and "layers.0.attention.self" in key]
    assert len(weights) == 4 and not any(torch.equal(before[key], model.state_dict()[key]) for key in weights)
    if name.startswith("OneFormer"):
        model.model.is_training = False
    with torch.no_grad():
        output = model.eval()(**inputs)
    result = output.logits if name.startswith("UperNet") else output.masks_queries_logits
    assert result.shape[0] == 2 and torch.isfinite(result).all()


# -------------------------------------------------- every model of transformers that takes the config of a backbone


class Family(NamedTuple):
    """What a model needs besides the backbone's config."""

    stages: str = "1234"  # those that it reads
    settings: dict = {}
    backbone: dict = {}  # further entries of the backbone's config
    inputs: dict = {}


WIDTHS = [8, 16, 32, 64]
IDS = torch.arange(1, 13).reshape(2, 6)
BERT = dict(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
CLIP = dict(BERT, model_type="clip_text_model", max_position_embeddings=8, projection_dim=32, bos_token_id=1)
OF_DETR = Family("234", dict(encoder_in_channels=WIDTHS[1:], num_queries=10))
OF_GROUNDING = Family(
    "234", dict(text_config=dict(BERT, model_type="bert"), num_queries=10), inputs=dict(input_ids=IDS)
)
OF_OCR = Family(settings=dict(layer_list_out_channels=WIDTHS))
FAMILIES = {
    "conditional_detr": Family(),
    "d_fine": OF_DETR,
    "dab-detr": Family("4"),
    "deformable_detr": Family("234"),
    "deimv2": OF_DETR,
    "detr": Family(),
    "grounding-dino": OF_GROUNDING,
    "mask2former": Family(),
    "maskformer": Family(),
    "mm-grounding-dino": OF_GROUNDING,
    "omdet-turbo": Family(
        "234",
        dict(
            OF_DETR.settings, text_config=dict(CLIP, eos_token_id=2), text_projection_in_dim=32,
            text_projection_out_dim=32, class_embed_dim=32, apply_layernorm_after_vision_backbone=False,
        ),
        inputs=dict(
            classes_input_ids=IDS, classes_attention_mask=torch.ones_like(IDS), tasks_input_ids=IDS,
            tasks_attention_mask=torch.ones_like(IDS), classes_structure=torch.tensor([1, 1]),
        ),
    ),
    "oneformer": Family(
        settings=dict(task_seq_len=7, is_training=False), inputs=dict(task_inputs=torch.ones(2, 7))
    ),
    "pp_doclayout_v2": Family(
        "234", OF_DETR.settings | dict(class_thresholds=[0.5] * 25, class_order=list(range(25)))
    ),
    "pp_doclayout_v3": Family("1234", OF_DETR.settings | dict(x4_feat_dim=WIDTHS[0])),
    "pp_doclayout_v4": OF_DETR,
    "pp_ocrv5_mobile_det": OF_OCR,
    "pp_ocrv6_small_det": OF_OCR,
    "rt_detr": OF_DETR,
    "rt_detr_v2": OF_DETR,
    "slanet": Family("234"),
    "table-transformer": Family("4"),
    "tvp": Family(
        "4",
        dict(BERT, max_img_size=64, visual_prompt_size=8, num_frames=2, frame_num=2),
        dict(hidden_sizes=WIDTHS),
        dict(input_ids=IDS[:1], pixel_values=torch.randn(1, 2, 3, 64, 64)),  # its position embeddings take one video
    ),
    "upernet": Family(settings=dict(auxiliary_in_channels=WIDTHS[2])),
    "vitmatte": Family(
        "3",
        dict(hidden_size=WIDTHS[2], fusion_hidden_sizes=[16, 16, 16, 8]),
        dict(num_channels=4),  # the trimap is the fourth
        dict(pixel_values=torch.randn(2, 4, 64, 64)),
    ),
}  # fmt: skip
# What reads of its own backbone something that no other has; the words are transformers'.
TIED = {
    "chmv2": "cls_tokens",
    "depth_anything": "too many values to unpack",  # tokens of a plain ViT
    "dpt": "too many values to unpack",
    "edgetam_vision_model": "dimensions",  # wants a model that returns maps
    "lw_detr": "pretrain_image_size",
    "pp_ocrv5_mobile_rec": "block_configs",
    "pp_ocrv5_server_det": "stage_out_channels",
    "pp_ocrv5_server_rec": "stage_out_channels",
    "pp_ocrv6_medium_det": "stage_out_channels",
    "pp_ocrv6_small_rec": "block_configs",
    "pp_ocrv6_tiny_rec": "block_configs",
    "prompt_depth_anything": "too many values to unpack",
    "rf_detr": "use_mask_token",
    "sam2_vision_model": "intermediate_hidden_states",
    "sam3_vision_model": "channels",  # tokens of a plain ViT
    "tipsv2_dpt": "num_register_tokens",
    "uvdoc": "resnet_head",
    "vitpose": "image_size",
    "zoedepth": "shape|size|dimension",
}
FOUND = {
    model_type: config
    for model_type, config in CONFIG_MAPPING.items()
    if "backbone_config" in getattr(config, "sub_configs", {})
}


def model_with_backbone(model_type, family):
    """The largest model of the family: of those in its module the last with a head and a backbone."""
    config_class = FOUND[model_type]
    backbone = config_of_backbone([f"stage{number}" for number in family.stages], **family.backbone)
    config = config_class(backbone_config=backbone, **family.settings)
    module = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    names = [name for name in module.__all__ if not name.endswith("PreTrainedModel")]
    for name in sorted(names, key=lambda name: "For" in name)[::-1]:
        model_class = getattr(module, name)
        if getattr(model_class, "config_class", None) is config_class:
            model = model_class(config)
            if any(isinstance(module, (hf.DinatBackbone, hf.DinatModel)) for module in model.modules()):
                return model
    raise AssertionError(f"no model of {model_type} has a backbone")


def flatten(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [tensor for value in values for tensor in flatten(value)]


def gradients_of_backbone(model_type, family):
    torch.manual_seed(0)
    model = model_with_backbone(model_type, family).train()
    output = model(**(dict(pixel_values=torch.randn(2, 3, 64, 64)) | family.inputs))
    sum(tensor.float().square().sum() for tensor in flatten(output) if tensor.requires_grad).backward()
    (backbone,) = (module for module in model.modules() if isinstance(module, hf.DinatBackbone))
    return {name: parameter.grad for name, parameter in backbone.named_parameters()}


@pytest.mark.parametrize("model_type", sorted(FOUND.keys() - TIED.keys()))
def test_every_model_that_takes_a_backbone_trains(model_type):
    gradients = gradients_of_backbone(model_type, FAMILIES.get(model_type, Family()))
    assert not [name for name, grad in gradients.items() if grad is None]  # DistributedDataParallel takes it
    assert all(grad.isfinite().all() for grad in gradients.values())
    assert any(grad.any() for name, grad in gradients.items() if name.startswith("embeddings"))


@pytest.mark.parametrize("model_type", sorted(FOUND.keys() & TIED.keys()))
def test_models_tied_to_their_own_backbone(model_type):
    with pytest.raises((AttributeError, ValueError, RuntimeError), match=TIED[model_type]):
        gradients_of_backbone(model_type, Family())


def test_backbones_build_what_they_return(tmp_path):
    """Files of the whole architecture load into a backbone that ends earlier, and nothing of them is unexpected."""
    features = ["stem", "stage1", "stage2", "stage3", "stage4"]
    torch.manual_seed(0)
    whole, images = hf.DinatBackbone(config_of_backbone(features)).eval(), torch.randn(1, 3, 64, 64)
    whole.save_pretrained(tmp_path)
    with torch.no_grad():
        maps = dict(zip(features, whole(images).feature_maps, strict=True))
    for used, stages in (["stem"], 0), (["stem", "stage2"], 2), (["stage4"], 4):
        loaded, info = hf.DinatBackbone.from_pretrained(tmp_path, out_features=used, output_loading_info=True)
        assert not any(info.values()) and len(loaded.encoder.levels) == stages
        filled = hf.DinatBackbone(config_of_backbone(used))
        filled.load_state_dict(whole.state_dict())
        assert all(map(torch.equal, filled.state_dict().values(), loaded.state_dict().values()))
        with torch.no_grad():
            assert all(map(torch.equal, loaded.eval()(images).feature_maps, (maps[name] for name in used)))
    with pytest.raises(RuntimeError, match="Unexpected.*head.weight"):
        filled.load_state_dict(whole.state_dict() | {"head.weight": torch.ones(1)})
