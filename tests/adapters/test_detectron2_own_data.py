"""Data sets of one's own in Detectron2: --import, numbers of classes, metadata, evaluation of trained models alone."""

import json
import logging
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from small_mask2former import DEMO, TINY, get_config

# isort: split
from detectron2 import model_zoo
from detectron2.data import DatasetCatalog, MetadataCatalog

from dinat_backbones.adapters.detectron2 import with_backbone
from dinat_backbones.adapters.detectron2.data_checks import check_classes, check_registered, name_classes
from dinat_backbones.adapters.detectron2.trainer import Trainer
from dinat_backbones.cli import predict, train_detectron2

RCNN = DEMO.parent / "mask_rcnn_dinat_mini_coco-sample-overfit.yaml"
SMALL = ["MODEL.DINAT.EMBED_DIM", 32, "MODEL.DINAT.DEPTHS", [1, 1, 1, 1], "MODEL.DINAT.NUM_HEADS", [1, 2, 4, 8]]
SMALL += ["MODEL.DINAT.DILATIONS", [[1]] * 4, "MODEL.DINAT.KERNEL_SIZE", 3, "MODEL.FPN.OUT_CHANNELS", 16]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", 32, "INPUT.MIN_SIZE_TRAIN", [64], "INPUT.MIN_SIZE_TEST", 64]
SMALL += ["SOLVER.IMS_PER_BATCH", 1, "SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 0]
REGISTER = """
from detectron2.data.datasets import register_coco_instances
for split in ("train", "val"):
    register_coco_instances(f"own_{split}", {"thing_classes": ["cat", "dog"]}, FILE, FOLDER)
"""


@pytest.fixture
def own_data(tmp_path, monkeypatch):
    """Two images with a cat and a dog, and a module `own_data` that registers them as own_train and own_val."""
    annotations = []
    for number in (1, 2):
        Image.fromarray(np.full((64, 64, 3), 60 * number, np.uint8)).save(tmp_path / f"{number}.png")
        box = [8, 8, 24, 32]
        polygon = [[8, 8, 32, 8, 32, 40, 8, 40]]
        annotations.append(dict(id=number, image_id=number, category_id=number, bbox=box, area=768, iscrowd=0))
        annotations[-1]["segmentation"] = polygon
    images = [dict(id=number, file_name=f"{number}.png", height=64, width=64) for number in (1, 2)]
    categories = [dict(id=1, name="cat"), dict(id=2, name="dog")]
    content = dict(images=images, annotations=annotations, categories=categories)
    (tmp_path / "own.json").write_text(json.dumps(content))
    names = REGISTER.replace("FILE", repr(str(tmp_path / "own.json"))).replace("FOLDER", repr(str(tmp_path)))
    (tmp_path / "own_data.py").write_text(names)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own_data", None)
    for name in ("own_train", "own_val"):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def words(folder, *options, test="('own_val',)"):
    options = [*SMALL, "DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", test, "OUTPUT_DIR", folder, *options]
    return list(map(str, ["--config-file", RCNN, "--num-gpus", 0, *options]))


def test_train_evaluate_and_predict(own_data, capsys):
    classes = ["MODEL.ROI_HEADS.NUM_CLASSES", 2]
    train_detectron2.main(["--import", "own_data", *words(own_data / "run", *classes)])
    trained = own_data / "run" / "model_final.pth"
    results = json.loads((own_data / "run" / "inference" / "results.json").read_text())
    assert {"AP-cat", "AP-dog"} <= results["bbox"].keys() & results["segm"].keys()

    train_detectron2.main(
        ["--eval-only", "--import", "own_data", *words(own_data / "again", "MODEL.WEIGHTS", trained, *classes)]
    )
    assert json.loads((own_data / "again" / "inference" / "results.json").read_text()).keys() == results.keys()

    capsys.readouterr()
    arguments = [own_data, "--config", own_data / "run" / "config.yaml", "--checkpoint", trained, "--device", "cpu"]
    arguments += ["--out", own_data / "drawn", "--score", 0.0, "--import", "own_data"]
    predict.main(list(map(str, arguments)))
    out = capsys.readouterr().out
    assert "[2/2] 2.png" in out and (" cat" in out or " dog" in out)


def test_a_config_of_the_model_zoo(own_data):
    """Written to a file, as the documentation says."""
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg = with_backbone(cfg, "dinat_mini", dilations=[[1]] * 4, checkpoint="none")
    (own_data / "retinanet.yaml").write_text(cfg.dump())
    options = ["INPUT.DATASET_MAPPER_NAME", "detectron2", "MODEL.RETINANET.NUM_CLASSES", 2]
    arguments = words(own_data / "run", *options, test="()")
    arguments[1] = str(own_data / "retinanet.yaml")
    train_detectron2.main(["--import", "own_data", *arguments])
    state = torch.load(own_data / "run" / "model_final.pth")["model"]
    assert state["backbone.bottom_up.levels.3.blocks.0.attn.rpb"].shape == (8, 5, 5)
    assert {"backbone.top_block.p7.weight", "backbone.bottom_up.norm1.weight"} <= state.keys()
    assert "backbone.bottom_up.norm0.weight" not in state  # RetinaNet reads res3 to res5


@pytest.mark.parametrize("without", [["1.png"], ["1.png", "2.png"]], ids=["one", "both"])
def test_images_without_annotations_train(own_data, without):
    """As background, with the mapper of COCO's instances: one has no objects, the other a crowd."""
    content = json.loads((own_data / "own.json").read_text())
    first, second = content["annotations"]
    second["iscrowd"] = int(len(without) == 2)
    content["annotations"] = [annotation for annotation in (first, second) if annotation is second]
    (own_data / "own.json").write_text(json.dumps(content))
    options = [*TINY, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 2, "INPUT.DATASET_MAPPER_NAME", "coco_instance_lsj"]
    options += ["INPUT.IMAGE_SIZE", 64, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.MAX_ITER", 2]
    options += ["DATASETS.TRAIN", "('own_train',)", "DATASETS.TEST", "()", "OUTPUT_DIR", own_data / "run"]
    words = ["--config-file", DEMO, "--num-gpus", 0, "--import", "own_data", *options]
    train_detectron2.main(list(map(str, words)))
    cfg = get_config(str(DEMO), list(map(str, options)))
    batch = next(iter(Trainer.build_train_loader(cfg)))
    assert sorted(len(sample["instances"]) for sample in batch) == ([0, 1] if len(without) == 1 else [0, 0])
    assert all(sample["instances"].gt_masks.shape[1:] == sample["image"].shape[1:] for sample in batch)
    lines = [json.loads(line) for line in (own_data / "run" / "metrics.json").read_text().splitlines()]
    losses = [value for line in lines for name, value in line.items() if "loss" in name]
    assert losses and np.isfinite(losses).all()
    state = torch.load(own_data / "run" / "model_final.pth")["model"]
    assert all(value.isfinite().all() for value in state.values())


def test_what_does_not_fit_stops_before_training(own_data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    for arguments, sentence in (
        (words(run), r"DATASETS.TRAIN: own_train is not registered; --import MODULE"),
        (["--import", "no_such.module", *words(run)], r"--import no_such.module: no such module; PYTHONPATH=FOLDER"),
        (["--eval-only", "--import", "own_data", *words(run)], r"--eval-only has no weights: add MODEL.WEIGHTS FILE"),
        (
            ["--eval-only", "--resume", "--import", "own_data", *words(run)],
            r"--eval-only has no weights: add MODEL.WEIGHTS FILE, or --resume",
        ),
    ):
        with pytest.raises(SystemExit, match=sentence):
            train_detectron2.main(arguments)
    with pytest.raises(ValueError, match="ROI_HEADS.NUM_CLASSES is 1, and own_train has 2 thing classes: set MODEL"):
        train_detectron2.main(["--import", "own_data", *words(run, "MODEL.ROI_HEADS.NUM_CLASSES", 1)])
    assert not list(run.glob("*.pth"))


def test_a_module_that_lacks_another_says_which(own_data):
    (own_data / "broken_data.py").write_text("import absent_package")
    with pytest.raises(ModuleNotFoundError, match="absent_package"):
        train_detectron2.main(["--import", "broken_data", *words(own_data / "run")])


def test_evaluation_refuses_a_random_head(own_data):
    cfg = train_detectron2.get_config(str(RCNN), [*SMALL, "MODEL.DEVICE", "cpu"])
    torch.save(Trainer.build_model(cfg).backbone.bottom_up.state_dict(), own_data / "backbone.pth")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    torch.save({"model": Trainer.build_model(cfg).state_dict()}, own_data / "other.pth")
    for name, missing in (("backbone", "backbone.fpn_lateral2.weight"), ("other", "roi_heads.box_predictor.cls_score")):
        options = ["MODEL.WEIGHTS", own_data / f"{name}.pth", "MODEL.ROI_HEADS.NUM_CLASSES", 2]
        with pytest.raises(SystemExit, match=rf"the checkpoint lacks \d+ parameters of the model, .*{missing}"):
            train_detectron2.main(["--eval-only", "--import", "own_data", *words(own_data / "run", *options)])


# ------------------------------------------------------------------------------------------------- classes and metadata


@pytest.mark.parametrize(
    ("architecture", "mapper", "key"),
    [
        ("GeneralizedRCNN", "detectron2", "ROI_HEADS"),
        ("RetinaNet", "detectron2", "RETINANET"),
        ("PanopticFPN", "detectron2", "ROI_HEADS"),
        ("MaskFormer", "mask_former_instance", "SEM_SEG_HEAD"),
        ("MaskFormer", "coco_instance_lsj", "SEM_SEG_HEAD"),
        ("MaskFormer", "mask_former_panoptic", "SEM_SEG_HEAD"),
        ("SemanticSegmentor", "detectron2", "SEM_SEG_HEAD"),
    ],
)
def test_numbers_of_classes(detectron2_datasets, architecture, mapper, key, caplog):
    """shapes_panoptic_train has three things, and four classes of stuff, which include them."""
    expected = 3 if key != "SEM_SEG_HEAD" or "instance" in mapper else 4
    cfg = get_config(str(DEMO), ["MODEL.META_ARCHITECTURE", architecture, "INPUT.DATASET_MAPPER_NAME", mapper])
    cfg.merge_from_list(["DATASETS.TRAIN", ("shapes_panoptic_train",), "MODEL.ROI_HEADS.NUM_CLASSES", 3])
    cfg.MODEL[key].NUM_CLASSES = expected
    check_classes(cfg, [])
    assert not caplog.records
    cfg.MODEL[key].NUM_CLASSES = expected - 1
    with pytest.raises(ValueError, match=rf"set MODEL.{key}.NUM_CLASSES {expected}$"):
        check_classes(cfg, [])
    cfg.MODEL[key].NUM_CLASSES = 80
    with caplog.at_level(logging.WARNING):
        check_classes(cfg, [])
    assert f"MODEL.{key}.NUM_CLASSES is 80, and shapes_panoptic_train has {expected} classes" in caplog.text


@pytest.fixture
def bare():
    """A registered data set without metadata."""
    DatasetCatalog.register("bare", list)
    yield "bare"
    DatasetCatalog.remove("bare")
    MetadataCatalog.remove("bare")


def test_classes_without_names_are_counted(bare):
    cfg = get_config(str(RCNN), ["DATASETS.TRAIN", (bare,), "MODEL.ROI_HEADS.NUM_CLASSES", 4])
    dicts = [dict(annotations=[]), {}, dict(annotations=[dict(category_id=0), dict(category_id=4)])]
    with pytest.raises(ValueError, match="bare has 5 thing classes"):
        check_classes(cfg, dicts)
    check_classes(cfg, dicts[:2])
    cfg.DATASETS.TEST = (bare,)
    MetadataCatalog.get(bare).thing_classes = ["cat"]
    metadata = name_classes(cfg)
    assert metadata.thing_classes == ["cat"] and metadata.stuff_classes == [f"class {i}" for i in range(4)]


def test_metadata_that_evaluation_needs(detectron2_datasets, bare):
    cfg = get_config(str(DEMO), TINY)
    check_registered(cfg)
    cfg.DATASETS.TEST = ("bare",)
    with pytest.raises(ValueError, match=r"the metadata of bare lack evaluator_type, which evaluation needs"):
        check_registered(cfg)
    MetadataCatalog.get("bare").set(evaluator_type="coco_panoptic_seg", panoptic_json="x", panoptic_root="y")
    with pytest.raises(ValueError, match=r"lack thing_dataset_id_to_contiguous_id, stuff_dataset_id_to_contiguous_id"):
        check_registered(cfg)
    MetadataCatalog.remove("bare")
    MetadataCatalog.get("bare").set(evaluator_type="sem_seg", stuff_classes=["a"])
    with pytest.raises(ValueError, match=r"lack ignore_label, .*get\('bare'\)\.set\(ignore_label="):
        check_registered(cfg)
