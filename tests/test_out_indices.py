"""Backbones that return some of their stages, against those that return all of them."""

import itertools
import logging

import pytest
import torch

from dinat_backbones import NAT, DiNAT, DiNAT_s, create_classifier, zoo
from dinat_backbones.checkpoint import load_backbone, load_model
from helpers import fill_by_name

FAMILIES = dict(NAT=NAT, DiNAT=DiNAT, DiNAT_s=DiNAT_s)
SMALL = dict(embed_dim=16, depths=[1, 2, 1, 1], num_heads=[1, 2, 4, 8], mlp_ratio=2.0, kernel_size=3)
SUBSETS = [subset for length in range(1, 5) for subset in itertools.combinations(range(4), length)]


@pytest.fixture(scope="module", params=FAMILIES)
def full(request):
    """A family, and one of its backbones with all stages and weights that depend on their names."""
    family = FAMILIES[request.param]
    return family, fill_by_name(family(**SMALL)).eval()


@pytest.mark.parametrize("indices", [*SUBSETS, (3, 1), (2, 0, 1), (-1,), (-2, 0), (0, -1)], ids=str)
def test_maps_are_those_of_the_full_backbone(full, indices):
    family, whole = full
    model = family(**SMALL, out_indices=indices).eval()
    model.load_state_dict(whole.state_dict())  # strict: what is left out is expected
    image = torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps, expected = model(image), whole(image)
    assert len(maps) == len(model.out_channels) == len(indices)
    for place, stage in enumerate(indices):
        assert torch.equal(maps[place], expected[stage])
        assert model.out_channels[place] == expected[stage].shape[1]
        assert model.out_strides[place] == 4 * 2 ** (stage % 4)


@pytest.mark.parametrize("indices", SUBSETS, ids=str)
def test_every_parameter_is_used(full, indices):
    """So that DistributedDataParallel needs no find_unused_parameters."""
    family, whole = full
    model = family(**SMALL, out_indices=indices)
    sum(out.sum() for out in model(torch.randn(1, 3, 40, 40))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    stages, last = getattr(model, model.stages_name), max(indices)
    assert len(stages) == last + 1 and stages[-1].downsample is None
    # those of the full backbone without the later stages, the way there and the other norms
    left_out = {f"norm{i}." for i in range(4) if i not in indices}
    left_out |= {f"{model.stages_name}.{i}." for i in range(last + 1, 4)} | {f"{model.stages_name}.{last}.downsample."}
    names = {name for name in whole.state_dict() if not name.startswith(tuple(left_out))}
    assert set(model.state_dict()) == names
    assert {name for name in whole.state_dict() if model.is_left_out(name)} == set(whole.state_dict()) - names


def test_drop_path_is_that_of_the_full_depth():
    rates = [[block.drop_path.p for stage in DiNAT(**SMALL, **kwargs).levels for block in stage.blocks]
             for kwargs in ({}, dict(out_indices=[1]))]  # fmt: skip
    assert rates[1] == rates[0][:3] and len(rates[0]) == 5


def test_a_published_file_is_loaded_as_expected(tmp_path, caplog):
    """An ImageNet file into a backbone without its last stages: nothing is missing but norms, nothing is warned of."""
    classifier = create_classifier("dinat_mini")
    torch.save({"state_dict": classifier.state_dict()}, tmp_path / "file.pth")
    model = DiNAT(arch="dinat_mini", dilations="coco", out_indices=[2])
    with caplog.at_level(logging.INFO):
        report = load_backbone(model, tmp_path / "file.pth")
    assert report.complete and report.missing == ("norm2.weight", "norm2.bias") and not report.unexpected
    assert report.left_out and all(name.startswith(("levels.3.", "levels.2.downsample.")) for name in report.left_out)
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert f"{len(report.left_out)} of stages and norms that out_indices leaves out, as expected" in caplog.text
    for name, tensor in model.state_dict().items():
        assert name.startswith("norm2") or torch.equal(tensor, classifier.state_dict()[name])


def test_what_no_architecture_has_is_not_expected(tmp_path):
    model = DiNAT(**SMALL, out_indices=[1])
    state = DiNAT(**SMALL).state_dict()
    for name in ("norm4.weight", "levels.4.blocks.0.norm1.weight", "levels.1.more", "layers.3.x", "more"):
        with pytest.raises(RuntimeError, match=f'Unexpected key.*"{name}"'):
            model.load_state_dict(state | {name: torch.ones(1)})
    torch.save(state | {"more": torch.ones(1)}, tmp_path / "file.pth")
    assert load_backbone(model, tmp_path / "file.pth").unexpected == ("more",)


def test_a_detector_with_fewer_stages_takes_the_whole_file(tmp_path):
    def detector(**kwargs):
        return torch.nn.ModuleDict(dict(backbone=DiNAT(**SMALL, **kwargs), head=torch.nn.Linear(2, 2)))

    whole, model = detector(), detector(out_indices=(0, 1))
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / "file.pth")
    report = load_model(model, tmp_path / "file.pth")
    assert not report.missing and len(report.loaded) + len(report.left_out) == len(whole.state_dict())
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in model.state_dict().items())
    whole.append = torch.nn.Linear(1, 1)
    torch.save(dict(state_dict=whole.state_dict()), tmp_path / "file.pth")
    with pytest.raises(ValueError, match="2 tensors are not in the model: append.weight, append.bias"):
        load_model(model, tmp_path / "file.pth")


@pytest.mark.parametrize("indices, message", [
    ([1, 1], r"out_indices=\[1, 1\] names a stage twice"),
    ([3, -1], r"out_indices=\[3, -1\] names a stage twice"),
    ([4], r"out_indices=\[4\]: expected stages 0 to 3 in a list, or -1 to -4 from the end"),
    ([-5], r"out_indices=\[-5\]: expected stages 0 to 3"),
    (3, r"out_indices=3: expected stages 0 to 3 in a list"),
    ("res5", "out_indices='res5': expected stages 0 to 3 in a list"),
    (["res5"], r"out_indices=\['res5'\]: expected stages 0 to 3 in a list"),
])  # fmt: skip
def test_others_are_refused(indices, message):
    with pytest.raises(ValueError, match=message):
        DiNAT(**SMALL, out_indices=indices)


@pytest.mark.parametrize("images, message", [
    (torch.zeros(3, 32, 32), r"images of shape \[3, 32, 32\]: expected \[B, 3, H, W\]; .* given as images\[None\]"),
    (torch.zeros(1, 1, 32, 32), r"images of shape \[1, 1, 32, 32\]: expected \[B, 3, H, W\]; in_chans=1 builds"),
    (torch.zeros(1, 32, 32, 3), r"expected \[B, 3, H, W\]; images.permute\(0, 3, 1, 2\) moves the channels"),
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "images of dtype torch.uint8: expected floating point, normalized"),
])  # fmt: skip
@pytest.mark.parametrize("name", ["dinat_mini", "dinat_s_tiny", "nat_isotropic_small"])
def test_other_images_are_refused_in_a_sentence(name, images, message):
    with torch.device("meta"):
        model = create_classifier(name)
    with pytest.raises(ValueError, match=message):
        model(images.to("meta"))


def test_unknown_arguments_name_the_nearest():
    with pytest.raises(
        TypeError, match=r"DiNAT has no argument in_channels \(it has in_chans\), depth \(it has depths\)"
    ):
        DiNAT(**SMALL, in_channels=3, depth=50)


def test_published_backbones_keep_their_parameters():
    """Those with all stages, as the published rows have them, are built as before."""
    with torch.device("meta"):
        for name, arch in zoo.ARCHS.items():
            family = FAMILIES[arch.family]
            model = family(arch=name, dilations=None if arch.family == "NAT" else "coco")
            assert model.built_stages == 4 and not any(map(model.is_left_out, model.state_dict()))
