"""`dinat test CONFIG --check-data`: what it reports for every layout of `dinat shapes`."""

import shutil
from pathlib import Path

import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
from dinat_backbones.cli import shapes, test

SETTINGS = {
    "coco": """
test_dataloader = dict(dataset=dict(type="CocoDataset", data_root="ROOT", ann_file="annotations/instances_val.json",
                                    data_prefix=dict(img="val/")))
test_evaluator = dict(type="CocoMetric", ann_file="ROOT/annotations/instances_val.json")
""",
    "coco-panoptic": """
test_dataloader = dict(dataset=dict(
    type="CocoPanopticDataset", data_root="ROOT", ann_file="annotations/panoptic_val.json",
    data_prefix=dict(img="val/", seg="annotations/panoptic_val/")))
test_evaluator = [dict(type="CocoPanopticMetric", ann_file="ROOT/annotations/panoptic_val.json",
                       seg_prefix="ROOT/annotations/panoptic_val/")]
""",
    "ade20k": """
default_scope = "mmseg"
train_dataloader = dict(dataset=dict(type="RepeatDataset", times=2, dataset=dict(
    type="ADE20KDataset", data_root="ROOT",
    data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"))))
""",
    "cityscapes": """
default_scope = "mmseg"
val_dataloader = dict(dataset=dict(type="CityscapesDataset", data_root="ROOT",
                                   data_prefix=dict(img_path="leftImg8bit/val", seg_map_path="gtFine/val")))
""",
}
# A file and a folder of each layout, and an archive that the message has to name.
PIECES = {
    "coco": ("val/000001.jpg", "val", "val2017.zip"),
    "coco-panoptic": ("annotations/panoptic_val/000000.png", "annotations/panoptic_val.json", "panoptic_annotations"),
    "ade20k": ("annotations/training/000001.png", "images/training", "ADEChallengeData2016.zip"),
    "cityscapes": (
        "gtFine/val/shapes/shapes_000000_000000_gtFine_labelTrainIds.png",
        "leftImg8bit/val",
        "gtFine_trainvaltest.zip",
    ),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "shapes"
    shapes.make_shapes(out, train=2, val=2, size=64, layouts=shapes.LAYOUTS)
    return out


@pytest.fixture
def check(tmp_path, capsys):
    """Runs the command in this process on tmp_path/config.py; returns what it prints."""

    def run(code, *options):
        with pytest.raises(SystemExit) as stopped:
            test.main([str(tmp_path / "config.py"), "--check-data", *options])
        assert stopped.value.code == code
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_check_data_names_what_is_missing(tmp_path, dataset, check, layout):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    (tmp_path / "config.py").write_text(SETTINGS[layout].replace("ROOT", str(root)))
    file, whole, archive = PIECES[layout]

    assert check(0).strip().endswith(f"in {root}: complete")
    (root / file).unlink()
    text = check(1)
    assert "missing: 1 of 2 files in folder " in text and Path(file).name in text and archive in text
    shutil.rmtree(root / whole) if (root / whole).is_dir() else (root / whole).unlink()
    text = check(1)
    assert f"{'folder' if not whole.endswith('.json') else 'file'} {root / whole}" in text and archive in text


def test_check_data_follows_options(tmp_path, dataset, check):
    (tmp_path / "config.py").write_text(SETTINGS["ade20k"].replace("ROOT", "nowhere"))
    option = f"train_dataloader.dataset.dataset.data_root={dataset}"
    check(1)
    check(0, "--cfg-options", option)
