"""The recipes of the shipped YAML configs, from training to the next training; tests/configs/test_recipes.py has those
of OpenMMLab."""

import functools
import json

import pytest
import torch
from small_mask2former import DEMO  # noqa: F401  # skips this file where Detectron2 is missing

# isort: split
from detectron2.data import DatasetCatalog, MetadataCatalog

from dinat_backbones.checkpoint import read
from dinat_backbones.cli import convert, predict, train_detectron2
from helpers import ROOT

CONFIGS = ROOT / "mask2former" / "configs"
# One config for each recipe, with the shapes in the layout of its data.
RECIPES = {
    "coco/panoptic-segmentation/maskformer2_dinat_large_IN21k_384_bs16_100ep.yaml": "panoptic",
    "coco/instance-segmentation/maskformer2_dinat_large_IN21k_384_bs16_100ep.yaml": "polygons",
    "ade20k/semantic-segmentation/maskformer2_dinat_large_IN21k_384_bs16_160k.yaml": "ade20k_sem_seg",
    "cityscapes/semantic-segmentation/maskformer2_dinat_large_IN21k_384_bs16_90k.yaml": "cityscapes_sem_seg",
}
# A smaller model, smaller images and fewer steps; all else is as shipped.
SMALL = {
    "MODEL.DINAT.EMBED_DIM": 16,
    "MODEL.DINAT.DEPTHS": [1, 1, 1, 1],
    "MODEL.DINAT.NUM_HEADS": [1, 2, 2, 2],
    "MODEL.DINAT.KERNEL_SIZE": 3,
    "MODEL.DINAT.DILATIONS": None,
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 10,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 50,
    "MODEL.WEIGHTS": "",
    "INPUT.IMAGE_SIZE": 64,
    "INPUT.MIN_SIZE_TRAIN": [48, 64],
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.CROP.SIZE": [48, 48],
    "INPUT.SIZE_DIVISIBILITY": -1,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "TEST.DETECTIONS_PER_IMAGE": 10,
}


@pytest.fixture
def polygons(detectron2_datasets):
    """The shapes' boxes as polygons: the mapper of COCO's instances reads no other masks."""

    def load(part):
        entries = DatasetCatalog.get(f"shapes_instance_{part}")
        for annotation in (annotation for entry in entries for annotation in entry["annotations"]):
            x, y, width, height = annotation["bbox"]
            annotation["segmentation"] = [[x, y, x + width, y, x + width, y + height, x, y + height]]
        return entries

    names = {part: f"shapes_polygons_{part}" for part in ("train", "val")}
    for part, name in names.items():
        DatasetCatalog.register(name, functools.partial(load, part))
        metadata = MetadataCatalog.get(f"shapes_instance_{part}").as_dict()
        MetadataCatalog.get(name).set(**{key: value for key, value in metadata.items() if key != "name"})
    yield
    for name in names.values():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_command_reads_what_the_recipe_saves(detectron2_datasets, polygons, tmp_path, capsys, recipe):
    data = RECIPES[recipe]
    small = SMALL | {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 3 if data == "polygons" else 4,
        "DATASETS.TRAIN": (f"shapes_{data}_train",),
        "DATASETS.TEST": (f"shapes_{data}_val",),
    }

    def train(folder, *flags, **changes):
        options = small | {"OUTPUT_DIR": str(tmp_path / folder)} | {k.replace("__", "."): v for k, v in changes.items()}
        words = [str(word) for pair in options.items() for word in pair]
        capsys.readouterr()
        train_detectron2.main(["--config-file", str(CONFIGS / recipe), "--num-gpus", "0", *flags, *words])
        return "".join(capsys.readouterr())

    train("first")
    path = tmp_path / "first" / "model_final.pth"
    found = read(path)
    assert found["iteration"] == 1 and found["trainer"]["_trainer"]["optimizer"]["state"]

    train("test", "--eval-only", MODEL__WEIGHTS=str(path))
    (results,) = (tmp_path / "test").rglob("results.json")
    assert json.loads(results.read_text())

    config = tmp_path / "small.yaml"
    config.write_text((tmp_path / "first" / "config.yaml").read_text())
    images = next(
        folder for folder in ("val", "images/validation") if (detectron2_datasets / "shapes" / folder).is_dir()
    )
    words = (
        detectron2_datasets / "shapes" / images,
        "--config",
        config,
        "--checkpoint",
        path,
        "--out",
        tmp_path / "drawn",
    )
    predict.main([*map(str, words), "--device", "cpu"])
    assert len([*(tmp_path / "drawn").iterdir()]) == 2

    prefix = "backbone."
    state = {key.removeprefix(prefix): value for key, value in found["model"].items() if key.startswith(prefix)}
    for layout in ("imagenet", "detectron2", "mmdet3"):
        convert.main([str(path), str(tmp_path / f"{layout}.pth"), "--to", layout])
    converted = read(tmp_path / "imagenet.pth")
    assert converted.keys() == state.keys() and all(torch.equal(converted[key], state[key]) for key in state)

    train("first", "--resume", SOLVER__MAX_ITER=4)
    resumed = read(path)
    assert resumed["iteration"] == 3
    assert {int(entry["step"]) for entry in resumed["trainer"]["_trainer"]["optimizer"]["state"].values()} == {4}

    for weights in (path, tmp_path / "imagenet.pth", tmp_path / "detectron2.pth"):
        train(f"after-{weights.stem}", MODEL__WEIGHTS=str(weights), SOLVER__BASE_LR=0.0)
        following = read(tmp_path / f"after-{weights.stem}" / "model_final.pth")["model"]
        before = read(weights)
        expected = state if "imagenet" in weights.name else before["model"]
        got = {key.removeprefix(prefix): value for key, value in following.items()} if expected is state else following
        assert all(torch.equal(got[key], value) for key, value in expected.items() if key in got and "weight" in key)
