"""adapters/detectron2/maskformer_compat.py, the configs in mask2former/, and `dinat predict` with them."""

import importlib
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_mask2former import DEMO, get_config, run_python, tiny

from dinat_backbones import cli, zoo
from dinat_backbones.checkpoint import load_model
from helpers import PUBLISHED, ROOT, assert_near

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

from dinat_backbones.adapters.detectron2.maskformer_compat import mask2former
from dinat_backbones.cli import predict, predict_detectron2, train_detectron2

CONFIGS = ROOT / "mask2former" / "configs"


# ------------------------------------------------------------------------------------------------------------ configs


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, plain(value)


def plain(value):
    return [plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("name", zoo.MASK2FORMER)
def test_config_equals_its_row(name):
    (file,) = (CONFIGS / name).glob("maskformer2_dinat_large_*.yaml")
    found, defaults = dict(flat(get_config(str(file)))), dict(flat(get_config()))
    expected = PUBLISHED["mask2former"][name]["detectron2_config_over_defaults"]
    assert {key: found[key] for key in expected} == expected
    assert {key for key, value in found.items() if value != defaults[key]} <= set(expected)


@pytest.mark.parametrize("name", zoo.MASK2FORMER)
def test_published_parameters_and_data(name):
    row = zoo.MASK2FORMER[name]
    (file,) = (CONFIGS / name).glob("maskformer2_dinat_large_*.yaml")
    cfg = get_config(str(file), ["MODEL.DEVICE", "meta"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert round(sum(value.numel() for value in model.parameters()) / 1e6) == row.params_m
    assert model.sem_seg_head.num_classes == row.num_classes
    assert all(data in DatasetCatalog for data in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    assert len(metadata.thing_classes if row.task == "instance" else metadata.stuff_classes) == row.num_classes


@pytest.mark.parametrize("arch", ["dinat_tiny", "nat_mini"])
def test_smaller_relatives(arch):
    (file,) = (CONFIGS / "coco" / "panoptic-segmentation").glob(f"*{arch}*.yaml")
    cfg = get_config(str(file))
    known = zoo.ARCHS[arch]
    dinat = cfg.MODEL.DINAT
    weights = zoo.PRETRAINED[arch]
    assert cfg.MODEL.BACKBONE.NAME.removeprefix("D2") == known.family and weights == cfg.MODEL.WEIGHTS
    for key in ("embed_dim", "depths", "num_heads", "mlp_ratio", "kernel_size"):
        assert plain(dinat[key.upper()]) == plain(getattr(known, key)), key
    assert plain(dinat.DILATIONS) == plain(zoo.dilations(arch, "coco"))


def test_original_yaml_loads(tmp_path):
    """With the tag by which the original base files compute their sizes."""
    sizes = '!!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]'
    (tmp_path / "base.yaml").write_text(f"VERSION: 2\nINPUT:\n  MIN_SIZE_TRAIN: {sizes}\n")
    (tmp_path / "row.yaml").write_text("_BASE_: base.yaml\nMODEL:\n  DINAT:\n    DILATIONS: [[1, 14, 1]]\n")
    cfg = get_config(str(tmp_path / "row.yaml"))
    row = PUBLISHED["mask2former"]["ade20k/semantic-segmentation"]["detectron2_config_over_defaults"]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == row["INPUT.MIN_SIZE_TRAIN"] and cfg.MODEL.DINAT.DILATIONS == [[1, 14, 1]]
    with pytest.raises(FileNotFoundError, match="config nowhere.yaml is not there"):
        get_config("nowhere.yaml")


def test_shipped_yaml_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = str(DEMO.relative_to(ROOT))
    assert get_config(name) == get_config(str(DEMO))
    launched = []
    monkeypatch.setattr(train_detectron2, "launch", lambda run, *gpus, args, **options: launched.append(*args))
    train_detectron2.main(["--config-file", name, "--num-gpus", "0", "OUTPUT_DIR", str(tmp_path)])
    train_detectron2.set_up(launched[0])  # logs the text of the file
    assert (tmp_path / "config.yaml").is_file()


# --------------------------------------------------------------------------------------------- Mask2Former's releases


def sample(size=64):
    target = Instances((size, size))
    target.gt_classes = torch.tensor([1, 3])
    target.gt_masks = torch.zeros(2, size, size, dtype=torch.bool)
    target.gt_masks[0, 10:40, 10:40] = True
    target.gt_masks[1] = ~target.gt_masks[0]
    generator = torch.Generator().manual_seed(3)
    return dict(image=torch.randint(0, 256, (3, size, size), generator=generator), instances=target)


def test_weights_of_losses():
    losses = {}
    for weight in (1.0, 4.0):
        _, model = tiny("MODEL.MASK_FORMER.DICE_WEIGHT", weight)
        torch.manual_seed(1)
        model.criterion.matcher.forward = lambda outputs, targets: [(torch.tensor([2, 5]), torch.tensor([0, 1]))]
        losses[weight] = model([sample()])
    names = [f"loss_{term}{layer}" for term in ("ce", "mask", "dice") for layer in ("", "_0", "_1", "_2")]
    assert sorted(losses[1.0]) == sorted(names)  # DEC_LAYERS counts the predictions before the first layer, too
    for name, loss in losses[1.0].items():
        factor = 4 if "dice" in name else 1
        torch.testing.assert_close(losses[4.0][name], factor * loss)


def test_original_repository_without_cuda_build(tmp_path):
    """A copy of maskformer2 with the two differences that matter takes its place."""
    source = Path(mask2former.__file__).parent
    shutil.copytree(source, tmp_path / "mask2former", ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "mask2former" / "modeling" / "criterion.py", "a") as file:
        file.write(
            "\ndef original(self, num_classes, matcher, weight_dict, eos_coef, losses, num_points, oversample_ratio,\n"
            "             importance_sample_ratio):\n    nn.Module.__init__(self)\n    self.weight_dict = weight_dict\n"
            "SetCriterion.__init__ = original\n"
        )
    op = tmp_path / "mask2former/modeling/pixel_decoder/ops/functions/ms_deform_attn_func.py"
    op.write_text(op.read_text() + "\nimport MultiScaleDeformableAttention\n")
    out = run_python(
        "-c",
        "import sys; from dinat_backbones.adapters.detectron2 import maskformer_compat as adapter\n"
        f"from detectron2.modeling import build_model; print(adapter.mask2former.__file__)\n"
        f"cfg = adapter.get_config({str(DEMO)!r}); model = build_model(cfg)\n"
        "print(type(model.criterion).__module__, 'MultiScaleDeformableAttention' in sys.modules)",
        path=[tmp_path],
    )
    assert str(tmp_path) in out and "mask2former.modeling.criterion False" in out


def test_deformable_attention_says_once_what_runs(caplog):
    _, model = tiny()
    with caplog.at_level("INFO"):
        model([sample()])
        model([sample()])
    assert sum("grid_sample" in record.message for record in caplog.records) <= 1
    attention = importlib.import_module("mask2former.modeling.pixel_decoder.ops.modules.ms_deform_attn")
    module = attention.MSDeformAttn(d_model=8, n_levels=1, n_heads=2, n_points=2)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    query, value = torch.randn(1, 5, 8), torch.randn(1, 12, 8)
    shapes, points = torch.tensor([[3, 4]]), torch.rand(1, 5, 1, 2)
    found = module(query, points, value, shapes, torch.tensor([0]))
    assert_near(found, [by_hand(module, query, points, value, 3, 4)])


def by_hand(module, query, points, value, height, width):
    """Deformable attention (arXiv 2010.04159, equation 2) of one level, point by point."""
    value = module.value_proj(value)[0].view(height, width, 2, 4)
    offsets = module.sampling_offsets(query)[0].view(-1, 2, 2, 2)
    weights = module.attention_weights(query)[0].view(-1, 2, 2).softmax(-1)
    out = torch.zeros(len(offsets), 2, 4)
    for q, head, point in itertools.product(range(len(offsets)), range(2), range(2)):
        x, y = (points[0, q, 0] * torch.tensor([width, height]) + offsets[q, head, point] - 0.5).tolist()
        for row, column in itertools.product(range(height), range(width)):
            share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
            out[q, head] += weights[q, head, point] * share * value[row, column, head]
    return module.output_proj(out.flatten(1))


@pytest.mark.parametrize("command", ["train --config-file x", "predict IMAGE --config x.yaml --checkpoint x --out y"])
def test_one_sentence_without_mask2former(command, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setitem(sys.modules, "mask2former", None)
    for module in ("adapters.detectron2.maskformer_compat", "cli.train_detectron2"):  # to be imported anew
        monkeypatch.delitem(sys.modules, f"dinat_backbones.{module}", raising=False)
    image = ROOT / "docs" / "demo.png"
    with pytest.raises(SystemExit, match=r"^dinat \w+: .* Mask2Former: pip install --no-deps") as stopped:
        cli.main(command.replace("IMAGE", str(image)).split())
    assert "\n" not in stopped.value.code
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------ predict


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_images_of_predictions(detectron2_datasets, tmp_path, task, capsys):
    thresholds = ["OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD"]
    cfg, model = tiny(*[word for name in thresholds for word in (f"MODEL.MASK_FORMER.TEST.{name}", 0.0)])
    model.sem_seg_head.predictor.class_embed.bias.data = torch.tensor([9.0, 0, 0, 0, 0])  # all queries are circles
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    images = detectron2_datasets / "shapes" / "val"
    words = [images, "--config", tmp_path / "config.yaml", "--task", task, "--device", "cpu", "--score", 0.0]
    words += ["--checkpoint", tmp_path / "model.pth", "--out", tmp_path / "out"]
    predict.main([str(word) for word in words])
    out = capsys.readouterr().out
    assert "[2/2] 000001.jpg" in out and "circle" in out
    for name in ("000000.jpg", "000001.jpg"):
        drawn, source = (np.asarray(Image.open(folder / name)) for folder in (tmp_path / "out", images))
        assert drawn.shape == source.shape and (drawn != source).any()
    predict.main([str(word) for word in words])
    assert "2 of 2 images are there already" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_an_image_in_which_nothing_is_found_is_drawn_as_it_is(detectron2_datasets, tmp_path, task, monkeypatch):
    cfg, model = tiny("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5)  # the data set has four: the last is not one of its classes
    bias = torch.full((6,), -500.0)
    bias[4 if task == "semantic" else 5] = 500.0  # 5 is "no object"
    model.sem_seg_head.predictor.class_embed.weight.data.zero_()
    model.sem_seg_head.predictor.class_embed.bias.data = bias
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    run = predict_detectron2.load_predictor(
        str(tmp_path / "config.yaml"), str(tmp_path / "model.pth"), device="cpu", score=0.1, task=task
    )
    image = detectron2_datasets / "shapes" / "val" / "000000.jpg"
    assert run(image, tmp_path / "out.png") == "nothing"
    plain = Visualizer(np.asarray(Image.open(image))).output.get_image()  # matplotlib moves some pixels by one
    assert (np.asarray(Image.open(tmp_path / "out.png").convert("RGB")) == plain).all()


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    _, model = tiny()
    _, other = tiny("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"class_embed.weight is \[8, 32\] in the file and \[5, 32\] in the model"):
        load_model(model, tmp_path / "other.pth")
