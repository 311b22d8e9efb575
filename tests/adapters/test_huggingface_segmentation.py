"""The backbones of adapters/huggingface in transformers' segmentation models, which find them by their config."""

import copy

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="transformers 5 is not installed: pip install 'dinat_backbones[huggingface]'"
)
import dinat_backbones.adapters.huggingface as hf  # noqa: E402


def segmentation_models():
    backbone = hf.DinatConfig(
        embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], kernel_size=3, dilations=[[2], [1], [1], [1]],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
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
