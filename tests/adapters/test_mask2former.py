"""adapters/mask2former.py and the scripts and configs in mask2former/."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinat_backbones import zoo
from dinat_backbones.checkpoint import load_model
from helpers import PUBLISHED, ROOT

pytest.importorskip("detectron2", reason="detectron2 is not installed: the classic stack has it (make test-classic)")
pytest.importorskip("mask2former.config", reason="maskformer2 is not installed: the classic stack has it")
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from dinat_backbones.adapters.mask2former import get_config, mask2former

CONFIGS = ROOT / "mask2former" / "configs"
DEMO = CONFIGS / "demo" / "panoptic_dinat_shapes.yaml"
TRAIN = ROOT / "mask2former" / "train_net.py"
# The demo's model, smaller still
TINY = ["MODEL.DINAT.DEPTHS", [1, 1, 1, 1], "MODEL.DINAT.DILATIONS", None, "MODEL.DINAT.KERNEL_SIZE", 3]
TINY += ["MODEL.SEM_SEG_HEAD.CONVS_DIM", 32, "MODEL.SEM_SEG_HEAD.MASK_DIM", 32, "MODEL.MASK_FORMER.HIDDEN_DIM", 32]
TINY += ["MODEL.MASK_FORMER.TRAIN_NUM_POINTS", 50, "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES", 10]
TINY += ["MODEL.DINAT.DROP_PATH_RATE", 0.3, "SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TEST", 64]
TINY += ["INPUT.MIN_SIZE_TRAIN", [48, 64], "SOLVER.CHECKPOINT_PERIOD", 2]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The shapes, where the registered data sets look for them, with the label maps that ADE20K's need."""
    folder = tmp_path_factory.mktemp("datasets")
    sys.path.insert(0, str(ROOT / "tools"))
    shapes = importlib.import_module("make_shapes")
    shapes.make_shapes(folder / "shapes", train=5, val=2, size=64, layouts=shapes.LAYOUTS)
    raw = folder / "shapes" / "annotations"
    for path in (*raw.glob("training/*.png"), *raw.glob("validation/*.png")):
        target = folder / "shapes" / "annotations_detectron2" / path.relative_to(raw)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(Image.open(path)) - np.uint8(1)).save(target)
    return folder


@pytest.fixture(scope="module")
def train_net(root):
    """The script as a module."""
    os.environ["DETECTRON2_DATASETS"] = str(root)
    sys.path.insert(0, str(TRAIN.parent))
    return importlib.import_module("train_net")


def tiny(*options, seed=0):
    """Config and model."""
    cfg = get_config(str(DEMO), [*TINY, *options])
    torch.manual_seed(seed)
    return cfg, build_model(cfg)


def run(*command, code=0, **environment):
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **environment},
    )
    assert result.returncode == code, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


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
    """with the tag by which the original base files compute their sizes"""
    sizes = '!!python/object/apply:eval ["[int(x * 0.1 * 640) for x in range(5, 21)]"]'
    (tmp_path / "base.yaml").write_text(f"VERSION: 2\nINPUT:\n  MIN_SIZE_TRAIN: {sizes}\n")
    (tmp_path / "row.yaml").write_text("_BASE_: base.yaml\nMODEL:\n  DINAT:\n    DILATIONS: [[1, 14, 1]]\n")
    cfg = get_config(str(tmp_path / "row.yaml"))
    row = PUBLISHED["mask2former"]["ade20k/semantic-segmentation"]["detectron2_config_over_defaults"]
    assert list(cfg.INPUT.MIN_SIZE_TRAIN) == row["INPUT.MIN_SIZE_TRAIN"] and cfg.MODEL.DINAT.DILATIONS == [[1, 14, 1]]
    with pytest.raises(FileNotFoundError, match="config nowhere.yaml is not there"):
        get_config("nowhere.yaml")


# ------------------------------------------------------------------------------- the package and its two incarnations


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
    names = [f"loss_{kind}{layer}" for kind in ("ce", "mask", "dice") for layer in ("", "_0", "_1", "_2")]
    assert sorted(losses[1.0]) == sorted(names)  # DEC_LAYERS counts the predictions before the first layer, too
    for name, loss in losses[1.0].items():
        factor = 4 if "dice" in name else 1
        torch.testing.assert_close(losses[4.0][name], factor * loss)


def test_original_repository_without_cuda_build(tmp_path):
    """stood in for by a copy of maskformer2 with the two differences that matter"""
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
    out = run(
        "-c",
        "import sys; from dinat_backbones.adapters import mask2former as adapter\n"
        f"from detectron2.modeling import build_model; print(adapter.mask2former.__file__)\n"
        f"cfg = adapter.get_config({str(DEMO)!r}); model = build_model(cfg)\n"
        "print(type(model.criterion).__module__, 'MultiScaleDeformableAttention' in sys.modules)",
        PYTHONPATH=f"{tmp_path}:{ROOT}",
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
    assert (found - by_hand(module, query, points, value, 3, 4)).abs().max() <= 1e-5


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


@pytest.mark.parametrize("script", ["train_net.py", "predict.py"])
def test_one_sentence_without_mask2former(script):
    words = [script, ROOT / "docs" / "demo.png", "--config", DEMO, "--checkpoint", "x", "--out", "y"]
    code = "import sys, runpy; sys.modules['mask2former'] = None\n"
    code += f"sys.argv = {list(map(str, words))}; runpy.run_path('mask2former/{script}', run_name='__main__')"
    out = run("-c", code, code=1)
    assert "needs Mask2Former: pip install --no-deps" in out.strip().split("\n")[-1] and "Traceback" not in out


# ----------------------------------------------------------------------------------------------------------- training


def test_optimizer_groups(train_net):
    cfg, model = tiny("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.05)
    optimizer = train_net.Trainer.build_optimizer(cfg, model)
    settings = {
        id(value): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for value in group["params"]
    }
    names = dict(model.named_parameters())
    assert len(settings) == len(names) == sum(len(group["params"]) for group in optimizer.param_groups)
    found = {name: settings[id(value)] for name, value in names.items()}
    assert found["backbone.levels.0.blocks.0.attn.rpb"] == (0.1, 0.05)  # as the original trainer had it
    assert found["backbone.levels.0.blocks.0.attn.qkv.bias"] == (0.1, 0.05)
    assert found["backbone.levels.0.blocks.0.norm1.weight"] == found["backbone.norm3.bias"] == (0.1, 0.0)
    assert found["sem_seg_head.predictor.query_feat.weight"] == (1.0, 0.0)  # an embedding
    assert found["sem_seg_head.predictor.decoder_norm.weight"] == (1.0, 0.0)
    assert found["sem_seg_head.pixel_decoder.input_proj.0.1.weight"] == (1.0, 0.0)  # a GroupNorm
    assert found["sem_seg_head.predictor.class_embed.weight"] == (1.0, 0.05)


def test_gradients_of_the_whole_model_are_clipped_together(train_net):
    cfg, model = tiny("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0)
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01])
    optimizer = train_net.Trainer.build_optimizer(cfg, model)
    before = [value.detach().clone() for value in model.parameters()]
    for value in model.parameters():
        value.grad = torch.randn_like(value)
    directions = [value.grad.clone() for value in model.parameters()]
    optimizer.step()
    steps = torch.cat([(b - v.detach()).flatten() for b, v in zip(before, model.parameters(), strict=True)])
    gradient = torch.cat([direction.flatten() for direction in directions])
    assert abs(steps.norm() - 0.01) <= 1e-4
    assert torch.nn.functional.cosine_similarity(steps, gradient, dim=0) > 0.99


def test_batches_are_those_of_detectron2_from_any_step_on(train_net):
    resumable = importlib.import_module("resumable")
    generator = np.random.default_rng(0)
    sizes = [tuple(generator.integers(1, 100, 2).tolist()) for _ in range(23)]
    samples = ({"width": sizes[i][0], "height": sizes[i][1], "index": i} for i in TrainingSampler(23, seed=5))
    expected = [[entry["index"] for entry in b] for b in itertools.islice(AspectRatioGroupedDataset(samples, 4), 30)]
    batches = resumable.Batches(TrainingSampler(23, seed=5), 4, lambda index: sizes[index])
    found = list(itertools.islice(batches, 30))
    assert [[index for _, index in batch] for batch in found] == expected
    assert len({position for batch in found for position, _ in batch}) == 120
    batches.start = 11
    assert list(itertools.islice(batches, 19)) == found[11:]


def test_samples_do_not_depend_on_the_worker(train_net, root):
    cfg = get_config(str(DEMO), [*TINY, "SEED", 3])

    def first(workers):
        cfg.DATALOADER.NUM_WORKERS = workers
        return [entry for batch in itertools.islice(train_net.Trainer.build_train_loader(cfg), 3) for entry in batch]

    ours, theirs = first(0), first(2)
    assert len({entry["image"].shape for entry in ours}) > 1  # random sizes, so there is something to compare
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["instances"].gt_masks, b["instances"].gt_masks)


KILLED = """
import os, runpy, signal, sys
from detectron2.engine import train_loop
after = train_loop.TrainerBase.after_step
def kill(self):
    after(self)
    if self.iter == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train_loop.TrainerBase.after_step = kill
sys.path.insert(0, "mask2former")
runpy.run_path("mask2former/train_net.py", run_name="__main__")
"""


def test_killed_and_resumed_run_ends_with_the_weights_of_a_whole_one(root, tmp_path):
    def train(folder, *start, steps=5, gpus=0, code=0):
        options = [*TINY, "SOLVER.MAX_ITER", steps, "SOLVER.CHECKPOINT_PERIOD", 3, "OUTPUT_DIR", tmp_path / folder]
        flags = ["--config-file", DEMO, "--num-gpus", gpus, "--resume"]
        return run(*start or [TRAIN], *flags, *options, code=code, DETECTRON2_DATASETS=str(root))

    (tmp_path / "killed.py").write_text(KILLED)
    train("whole")
    train("killed", tmp_path / "killed.py", code=-9)
    assert (tmp_path / "killed" / "last_checkpoint").read_text() == "model_0000002.pth"
    train("killed")
    ends = [torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "killed")]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name

    # two processes (gloo), with the same command but for their number
    out = train("two", steps=2, gpus=2)
    assert "World size: 2" in out and out.count("grid_sample") == 1
    parallel = torch.load(tmp_path / "two" / "model_final.pth")["model"]
    assert parallel.keys() == ends[0].keys() and all(torch.isfinite(value).all() for value in parallel.values())


def test_wrong_settings(train_net):
    for options, words in (
        (["INPUT.DATASET_MAPPER_NAME", "nothing"], "DATASET_MAPPER_NAME=nothing: expected one of mask_former_semantic"),
        (["DATALOADER.SAMPLER_TRAIN", "other"], "SAMPLER_TRAIN=other: expected TrainingSampler"),
        (["SOLVER.OPTIMIZER", "LION"], "OPTIMIZER=LION: expected one of ADAMW, SGD"),
        (["SOLVER.AMP.ENABLED", True], "needs a GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            train_net.Trainer(get_config(str(DEMO), [*TINY, *options]))


# --------------------------------------------------------------------------------------------------------- evaluation


def test_shapes_are_registered(train_net, root):
    for entry in DatasetCatalog.get("shapes_panoptic_val"):
        ids = np.asarray(Image.open(entry["pan_seg_file_name"])).astype(int) @ [1, 256, 65536]
        labels = np.asarray(Image.open(entry["sem_seg_file_name"]))
        assert sorted(info["id"] for info in entry["segments_info"]) == np.unique(ids).tolist()
        for info in entry["segments_info"]:
            assert set(labels[ids == info["id"]]) == {info["category_id"]}
    for name, number in (("train", 5), ("val", 2)):
        panoptic, instance, ade, cityscapes = (
            DatasetCatalog.get(f"shapes_{kind}_{name}")
            for kind in ("panoptic", "instance", "ade20k_sem_seg", "cityscapes_sem_seg")
        )
        assert len(panoptic) == len(instance) == len(ade) == len(cityscapes) == number
        for entries in zip(panoptic, ade, cityscapes, strict=True):
            maps = [np.asarray(Image.open(entry["sem_seg_file_name"])) for entry in entries]
            assert (maps[0] == maps[1]).all() and (maps[0] == maps[2]).all() and maps[0].max() <= 3


class Oracle(torch.nn.Module):
    """Answers with the annotations."""

    def __init__(self, name):
        super().__init__()
        self.entries = {entry["file_name"]: entry for entry in DatasetCatalog.get(name)}

    def forward(self, inputs):
        return [self.answer(self.entries[entry["file_name"]]) for entry in inputs]

    def answer(self, entry):
        ids = torch.tensor(np.asarray(Image.open(entry["pan_seg_file_name"])).astype(int) @ [1, 256, 65536])
        labels = torch.tensor(np.asarray(Image.open(entry["sem_seg_file_name"]))).long()
        things = [info for info in entry["segments_info"] if info["isthing"]]
        instances = Instances(ids.shape)
        instances.pred_masks = torch.stack([ids == info["id"] for info in things])
        instances.pred_boxes = Boxes(torch.zeros(len(things), 4))
        instances.scores = torch.ones(len(things))
        instances.pred_classes = torch.tensor([info["category_id"] for info in things])
        return dict(
            panoptic_seg=(ids, entry["segments_info"]),
            sem_seg=torch.nn.functional.one_hot(labels, 4).permute(2, 0, 1).float(),
            instances=instances,
        )


def test_annotations_as_prediction(train_net, root, tmp_path):
    cfg = get_config(str(DEMO), [*TINY, "OUTPUT_DIR", str(tmp_path)])
    results = train_net.Trainer.test(cfg, Oracle("shapes_panoptic_val"))
    assert results["panoptic_seg"]["PQ"] == 100 and results["sem_seg"]["mIoU"] == 100
    assert results["segm"]["AP"] >= 99.9
    assert json.loads((tmp_path / "inference" / "results.json").read_text())["panoptic_seg"]["PQ"] == 100


@pytest.mark.parametrize(
    ("data", "on", "expected"),
    [
        ("coco_2017_val_panoptic_with_sem_seg", "PIS", ["COCOPanopticEvaluator", "SemSegEvaluator", "COCOEvaluator"]),
        ("coco_2017_val", "I", ["COCOEvaluator"]),
        ("ade20k_instance_val", "PIS", ["COCOEvaluator"]),
        ("ade20k_sem_seg_val", "S", ["SemSegEvaluator"]),
        ("ade20k_panoptic_val", "PIS", ["COCOPanopticEvaluator", "SemSegEvaluator", "InstanceSegEvaluator"]),
        ("cityscapes_fine_instance_seg_val", "I", ["CityscapesInstanceEvaluator"]),
        ("cityscapes_fine_sem_seg_val", "S", ["CityscapesSemSegEvaluator"]),
        (
            "cityscapes_fine_panoptic_val",
            "PIS",
            ["COCOPanopticEvaluator", "CityscapesSemSegEvaluator", "CityscapesInstanceEvaluator"],
        ),
    ],
)
def test_evaluators_of_every_row(train_net, monkeypatch, data, on, expected):
    """which read their data as soon as they are made: only their names are looked at"""
    for name in {*expected} - {"InstanceSegEvaluator"}:
        monkeypatch.setattr(train_net, name, type(name, (), {"__init__": lambda self, *args, **kwargs: None}))
    monkeypatch.setattr(mask2former, "InstanceSegEvaluator", type("InstanceSegEvaluator", (), {"__init__": ignore}))
    cfg = get_config()
    for kind in ("PANOPTIC", "INSTANCE", "SEMANTIC"):
        cfg.MODEL.MASK_FORMER.TEST[f"{kind}_ON"] = kind[0] in on
    found = train_net.Trainer.build_evaluator(cfg, data)
    assert [type(evaluator).__name__ for evaluator in found._evaluators] == expected


def ignore(self, *args, **kwargs): ...


def test_evaluation_with_augmentation(train_net, root, tmp_path):
    options = ["TEST.AUG.MIN_SIZES", [64, 96], "TEST.AUG.MAX_SIZE", 96, "OUTPUT_DIR", str(tmp_path)]
    cfg, model = tiny(*options, "TEST.AUG.ENABLED", True, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True)
    results = train_net.Trainer.test_with_augmentation(cfg, model.eval())
    assert set(results) == {"sem_seg_TTA"} and 0 <= results["sem_seg_TTA"]["mIoU"] <= 100
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(ValueError, match="only semantic results"):
        train_net.Trainer.test_with_augmentation(cfg, model)


# ------------------------------------------------------------------------------------------------------------ predict


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_images_of_predictions(root, tmp_path, task):
    thresholds = ["OBJECT_MASK_THRESHOLD", "OVERLAP_THRESHOLD"]
    cfg, model = tiny(*[word for name in thresholds for word in (f"MODEL.MASK_FORMER.TEST.{name}", 0.0)])
    model.sem_seg_head.predictor.class_embed.bias.data = torch.tensor([9.0, 0, 0, 0, 0])  # all queries are circles
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    command = ["mask2former/predict.py", root / "shapes" / "val", "--config", tmp_path / "config.yaml", "--task", task]
    command += ["--checkpoint", tmp_path / "model.pth", "--out", tmp_path / "out", "--score", "0.0"]
    out = run(*command)
    assert "[2/2] 000001.jpg" in out and "circle" in out
    for name in ("000000.jpg", "000001.jpg"):
        drawn, source = (np.asarray(Image.open(folder / name)) for folder in (tmp_path / "out", root / "shapes/val"))
        assert drawn.shape == source.shape and (drawn != source).any()
    assert "2 of 2 images are there already" in run(*command)


def test_a_checkpoint_of_another_model_is_an_error(tmp_path):
    _, model = tiny()
    _, other = tiny("MODEL.SEM_SEG_HEAD.NUM_CLASSES", 7)
    torch.save({"model": other.state_dict()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"class_embed.weight is \[8, 32\] in the file and \[5, 32\] in the model"):
        load_model(model, tmp_path / "other.pth")
