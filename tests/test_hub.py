"""hubconf.py through torch.hub, as from a checkout."""

import pytest
import torch

from dinat_backbones import DiNAT, create_classifier, list_models, zoo
from helpers import ROOT


def load(*args, **kwargs):
    return torch.hub.load(str(ROOT), *args, source="local", **kwargs)


@pytest.mark.parametrize("name", list_models())
def test_every_classifier_is_an_entry(name):
    with torch.device("meta"):
        model, expected = load(name), create_classifier(name)
    assert type(model) is type(expected)
    assert [p.shape for p in model.parameters()] == [p.shape for p in expected.parameters()]


def test_classifier_from_a_file(tmp_path):
    expected = create_classifier("dinat_mini", num_classes=5)
    torch.save(expected.state_dict(), tmp_path / "five.pth")
    model = load("dinat_mini", pretrained=str(tmp_path / "five.pth"), num_classes=5).eval()
    images = torch.randn(2, 3, 48, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected.eval()(images))


@pytest.mark.parametrize("arch, published", [("dinat_mini", "dinat_mini"), ("dinat_large", "dinat_large_21k")])
def test_backbone_starts_from_the_weights_of_the_published_recipes(arch, published, monkeypatch):
    import dinat_backbones.checkpoint

    asked = []
    monkeypatch.setattr(dinat_backbones.checkpoint, "load_backbone", lambda model, source: asked.append(source))
    with torch.device("meta"):
        model = load("backbone", arch, dilations="coco", out_indices=(1, 2, 3), pretrained=True)
    assert type(model) is DiNAT and model.out_strides == (8, 16, 32)
    assert asked == [zoo.PRETRAINED[published]]


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match="dinat_tini.*dinat_tiny"):
        load("backbone", "dinat_tini")
