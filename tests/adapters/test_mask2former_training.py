"""adapters/detectron2/trainer.py, resumable_loader.py and shapes_datasets.py: training, resuming, evaluation."""

import itertools
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_mask2former import DEMO, TINY, get_config, run_python, tiny

from helpers import ROOT

# isort: split
from detectron2.data import DatasetCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import TrainingSampler
from detectron2.structures import Boxes, Instances

from dinat_backbones.adapters.detectron2 import resumable_loader, trainer
from dinat_backbones.adapters.detectron2.maskformer_compat import mask2former
from dinat_backbones.cli import train_detectron2

# ----------------------------------------------------------------------------------------------------------- training


def test_optimizer_groups():
    cfg, model = tiny("SOLVER.BACKBONE_MULTIPLIER", 0.1, "SOLVER.BASE_LR", 1.0, "SOLVER.WEIGHT_DECAY", 0.05)
    optimizer = trainer.Trainer.build_optimizer(cfg, model)
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


def test_gradients_of_the_whole_model_are_clipped_together():
    cfg, model = tiny("SOLVER.OPTIMIZER", "SGD", "SOLVER.BASE_LR", 1.0, "SOLVER.MOMENTUM", 0.0)
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.01])
    optimizer = trainer.Trainer.build_optimizer(cfg, model)
    before = [value.detach().clone() for value in model.parameters()]
    for value in model.parameters():
        value.grad = torch.randn_like(value)
    directions = [value.grad.clone() for value in model.parameters()]
    optimizer.step()
    steps = torch.cat([(b - v.detach()).flatten() for b, v in zip(before, model.parameters(), strict=True)])
    gradient = torch.cat([direction.flatten() for direction in directions])
    assert abs(steps.norm() - 0.01) <= 1e-4
    assert torch.nn.functional.cosine_similarity(steps, gradient, dim=0) > 0.99


def test_batches_are_those_of_detectron2_from_any_step_on():
    generator = np.random.default_rng(0)
    sizes = [tuple(generator.integers(1, 100, 2).tolist()) for _ in range(23)]
    samples = ({"width": sizes[i][0], "height": sizes[i][1], "index": i} for i in TrainingSampler(23, seed=5))
    expected = [[entry["index"] for entry in b] for b in itertools.islice(AspectRatioGroupedDataset(samples, 4), 30)]
    batches = resumable_loader.Batches(TrainingSampler(23, seed=5), 4, lambda index: sizes[index])
    found = list(itertools.islice(batches, 30))
    assert [[index for _, index in batch] for batch in found] == expected
    assert len({position for batch in found for position, _ in batch}) == 120
    batches.start = 11
    assert list(itertools.islice(batches, 19)) == found[11:]


def test_samples_do_not_depend_on_the_worker(detectron2_datasets):
    cfg = get_config(str(DEMO), [*TINY, "SEED", 3])

    def first(workers):
        cfg.DATALOADER.NUM_WORKERS = workers
        return [entry for batch in itertools.islice(trainer.Trainer.build_train_loader(cfg), 3) for entry in batch]

    ours, theirs = first(0), first(2)
    assert len({entry["image"].shape for entry in ours}) > 1  # random sizes, so there is something to compare
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["instances"].gt_masks, b["instances"].gt_masks)


KILLED = """
import os, signal
from detectron2.engine import train_loop
after = train_loop.TrainerBase.after_step
def kill(self):
    after(self)
    if self.iter == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train_loop.TrainerBase.after_step = kill
from dinat_backbones.cli.train_detectron2 import main
main()
"""


def test_killed_and_resumed_run_ends_with_the_weights_of_a_whole_one(detectron2_datasets, tmp_path):
    def words(folder, *more, steps=5, gpus=0):
        options = [*TINY, "SOLVER.MAX_ITER", steps, "SOLVER.CHECKPOINT_PERIOD", 3, "OUTPUT_DIR", tmp_path / folder]
        options += more
        return map(str, ["--config-file", DEMO, "--num-gpus", gpus, "--resume", *options])

    datasets = dict(DETECTRON2_DATASETS=str(detectron2_datasets))
    no_evaluation = "DATASETS.TEST", "()"
    (tmp_path / "killed.py").write_text(KILLED)
    train_detectron2.main(list(words("whole", *no_evaluation)))
    run_python(tmp_path / "killed.py", *words("killed", *no_evaluation), code=-9, **datasets)
    assert (tmp_path / "killed" / "last_checkpoint").read_text() == "model_0000002.pth"
    train_detectron2.main(list(words("killed", *no_evaluation)))
    ends = [torch.load(tmp_path / name / "model_final.pth")["model"] for name in ("whole", "killed")]
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name

    # two processes (gloo), with the same command but for their number
    out = run_python(ROOT / "mask2former" / "train_net.py", *words("two", steps=2, gpus=2), **datasets)
    assert "World size: 2" in out and out.count("grid_sample") == 1
    parallel = torch.load(tmp_path / "two" / "model_final.pth")["model"]
    assert parallel.keys() == ends[0].keys() and all(torch.isfinite(value).all() for value in parallel.values())


def test_images_without_a_sample_are_replaced_and_none_at_all_is_an_error():
    dicts = [dict(number=number) for number in range(5)]
    samples = resumable_loader.Samples(dicts, lambda entry: entry if entry["number"] == 2 else None, seed=0)
    assert samples[0, 3] == dict(number=2)
    samples = resumable_loader.Samples(dicts, lambda entry: None, seed=0)
    with pytest.raises(ValueError, match="none of the 5 training images gives a sample"):
        samples[0, 3]


def test_wrong_settings():
    for options, words in (
        (["INPUT.DATASET_MAPPER_NAME", "nothing"], "DATASET_MAPPER_NAME=nothing: expected one of mask_former_semantic"),
        (["DATALOADER.SAMPLER_TRAIN", "other"], "SAMPLER_TRAIN=other: expected TrainingSampler"),
        (["SOLVER.OPTIMIZER", "LION"], "OPTIMIZER=LION: expected one of ADAMW, SGD"),
        (["SOLVER.AMP.ENABLED", True], "needs a GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            trainer.Trainer(get_config(str(DEMO), [*TINY, *options]))


# --------------------------------------------------------------------------------------------------------- evaluation


def test_shapes_are_registered(detectron2_datasets):
    for entry in DatasetCatalog.get("shapes_panoptic_val"):
        ids = np.asarray(Image.open(entry["pan_seg_file_name"])).astype(int) @ [1, 256, 65536]
        labels = np.asarray(Image.open(entry["sem_seg_file_name"]))
        assert sorted(info["id"] for info in entry["segments_info"]) == np.unique(ids).tolist()
        for info in entry["segments_info"]:
            assert set(labels[ids == info["id"]]) == {info["category_id"]}
    for name, number in (("train", 5), ("val", 2)):
        panoptic, instance, ade, cityscapes = (
            DatasetCatalog.get(f"shapes_{layout}_{name}")
            for layout in ("panoptic", "instance", "ade20k_sem_seg", "cityscapes_sem_seg")
        )
        assert len(panoptic) == len(instance) == len(ade) == len(cityscapes) == number
        for entries in zip(panoptic, ade, cityscapes, strict=True):
            maps = [np.asarray(Image.open(entry["sem_seg_file_name"])) for entry in entries]
            assert (maps[0] == maps[1]).all() and (maps[0] == maps[2]).all() and maps[0].max() <= 3


class AnnotationsAsPredictions(torch.nn.Module):
    """A model that predicts the annotations."""

    def __init__(self, name):
        super().__init__()
        self.entries = {entry["file_name"]: entry for entry in DatasetCatalog.get(name)}

    def forward(self, inputs):
        return [self.prediction(self.entries[entry["file_name"]]) for entry in inputs]

    def prediction(self, entry):
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


def test_annotations_as_prediction(detectron2_datasets, tmp_path):
    cfg = get_config(str(DEMO), [*TINY, "OUTPUT_DIR", str(tmp_path)])
    results = trainer.Trainer.test(cfg, AnnotationsAsPredictions("shapes_panoptic_val"))
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
def test_evaluators_of_every_row(monkeypatch, data, on, expected):
    """Of their classes alone: evaluators read their data when they are built."""
    for name in {*expected} - {"InstanceSegEvaluator"}:
        monkeypatch.setattr(trainer, name, type(name, (), {"__init__": lambda self, *args, **kwargs: None}))
    monkeypatch.setattr(mask2former, "InstanceSegEvaluator", type("InstanceSegEvaluator", (), {"__init__": ignore}))
    cfg = get_config()
    for task in ("PANOPTIC", "INSTANCE", "SEMANTIC"):
        cfg.MODEL.MASK_FORMER.TEST[f"{task}_ON"] = task[0] in on
    found = trainer.Trainer.build_evaluator(cfg, data)
    assert [type(evaluator).__name__ for evaluator in found._evaluators] == expected


def ignore(self, *args, **kwargs): ...


def test_evaluation_with_augmentation(detectron2_datasets, tmp_path):
    options = ["TEST.AUG.MIN_SIZES", [64, 96], "TEST.AUG.MAX_SIZE", 96, "OUTPUT_DIR", str(tmp_path)]
    cfg, model = tiny(*options, "TEST.AUG.ENABLED", True, "MODEL.MASK_FORMER.TEST.INSTANCE_ON", True)
    results = trainer.Trainer.test_with_augmentation(cfg, model.eval())
    assert set(results) == {"sem_seg_TTA"} and 0 <= results["sem_seg_TTA"]["mIoU"] <= 100
    cfg.MODEL.MASK_FORMER.TEST.SEMANTIC_ON = False
    with pytest.raises(ValueError, match="only semantic results"):
        trainer.Trainer.test_with_augmentation(cfg, model)
