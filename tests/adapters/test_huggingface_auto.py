"""What transformers finds by itself after the adapter is imported: pipelines, its own config class, class names."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import ROOT, environment

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from dinat_backbones.adapters import huggingface  # noqa: E402

SHAPE = dict(embed_dim=32, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[1], [2]])


def test_pipeline_takes_our_classifier(tmp_path):
    torch.manual_seed(0)
    model = huggingface.DinatForImageClassification(huggingface.DinatConfig(**SHAPE, num_labels=5)).eval()
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size=dict(height=64, width=64)).save_pretrained(tmp_path)
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path))
    assert type(pipeline.model) is huggingface.DinatForImageClassification
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8))
    got = {answer["label"]: answer["score"] for answer in pipeline(image, top_k=5)}
    pixels = pipeline.image_processor(image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits.softmax(-1)[0]
    assert got == {f"LABEL_{i}": pytest.approx(value.item(), abs=1e-5) for i, value in enumerate(expected)}


def test_transformers_own_config_gets_our_backbone():
    theirs = transformers.DinatConfig(**SHAPE, out_features=["stage1", "stage2"])
    assert type(theirs) is not huggingface.DinatConfig
    config = transformers.UperNetConfig(
        backbone_config=theirs, num_labels=3, hidden_size=16, use_auxiliary_head=False, pool_scales=[1]
    )
    torch.manual_seed(0)
    segmentor = transformers.UperNetForSemanticSegmentation(config).eval()
    assert type(segmentor.backbone) is huggingface.DinatBackbone
    ours = huggingface.DinatBackbone(huggingface.DinatConfig(**SHAPE, out_features=["stage1", "stage2"])).eval()
    ours.load_state_dict(segmentor.backbone.state_dict())
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert segmentor(image).logits.shape == (1, 3, 40, 40)
        for a, b in zip(segmentor.backbone(image).feature_maps, ours(image).feature_maps, strict=True):
            assert torch.equal(a, b)
        assert type(transformers.AutoModel.from_config(theirs)) is huggingface.DinatModel


@pytest.mark.parametrize("with_timm", [True, False])
def test_names_of_imagenet(with_timm):
    """Those that timm ships; numbers without it."""
    if with_timm:
        pytest.importorskip("timm", minversion="1.0", reason="timm 1.0 is not installed")
    code = (
        "import sys\n"
        + ("" if with_timm else "sys.modules['timm'] = None\n")
        + "from dinat_backbones.adapters.huggingface import published_config\n"
        "config = published_config('dinat_mini')\n"
        "print(config.id2label[281], config.num_labels, len(config.id2label), sep='|')\n"
        "print(config.label2id.get('tabby, tabby cat'), published_config('nat_mini', num_labels=3).id2label, sep='|')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(ROOT))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    name = "tabby, tabby cat" if with_timm else "LABEL_281"
    assert first == f"{name}|1000|1000"
    assert second.split("|")[0] == ("281" if with_timm else "None") and "LABEL_2" in second
