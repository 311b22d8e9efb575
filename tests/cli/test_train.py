"""tools/test.py and tools/train.py in front of the frameworks' own scripts; tests/test_openmmlab.py has stand-ins."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import ROOT

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

sys.path.insert(0, str(ROOT / "tools"))  # which is no package
shapes = importlib.import_module("make_shapes")

DEMO = ROOT / "configs" / "demo" / "mask-rcnn_dinat_shapes.py"


def tool(name, *arguments, cwd):
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "shapes"
    shapes.make_shapes(out, train=2, val=2, size=64, layouts=shapes.LAYOUTS)
    return out


@pytest.fixture(scope="module")
def detector(tmp_path_factory, dataset):
    """Config and checkpoint of the demo's detector with random weights, on two small images."""
    folder = tmp_path_factory.mktemp("detector")
    config = folder / "config.py"
    config.write_text(
        f"_base_ = '{DEMO}'\n"
        f"data_root = '{dataset}/'\n"
        "train_dataloader = dict(dataset=dict(data_root=data_root))\n"
        "val_dataloader = dict(dataset=dict(data_root=data_root))\n"
        "test_dataloader = val_dataloader\n"
        "val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')\n"
        "test_evaluator = val_evaluator\n"
        "model = dict(test_cfg=dict(rcnn=dict(score_thr=0.0)))\n"
    )
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        model = MODELS.build(cfg.model)
    torch.save({"meta": {}, "state_dict": model.state_dict()}, folder / "model.pth")
    return config, folder / "model.pth"


def last_metrics(folder):
    (file,) = folder.glob("*/*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
@pytest.mark.parametrize("script", ["train.py", "test.py"])
def test_the_scripts_of_both_frameworks_take_the_flags(tmp_path, scope, script):
    (tmp_path / "config.py").write_text(f"default_scope = {scope!r}")
    run = tool(script, "config.py", "--help", cwd=tmp_path)
    flags = {"train.py": ["--amp", "--resume"], "test.py": ["--tta", "--out", "--show-dir"]}[script]
    for flag in [*flags, "--launcher", "--cfg-options", "--work-dir", "slurm", "pytorch"]:
        assert flag in run.stdout, flag


def test_a_detector_is_evaluated(tmp_path, detector):
    run = tool("test.py", *detector, "--work-dir", tmp_path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= last_metrics(tmp_path).keys()


def test_tta_of_boxes(tmp_path, detector):
    config, checkpoint = detector
    (tmp_path / "boxes.py").write_text(
        f"_base_ = '{config}'\n"
        "model = dict(roi_head=dict(mask_head=None, mask_roi_extractor=None))\n"
        "test_evaluator = dict(metric='bbox')\n"
    )
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {name: t for name, t in content["state_dict"].items() if "mask_head" not in name}
    torch.save(content, tmp_path / "boxes.pth")
    run = tool("test.py", "boxes.py", "boxes.pth", "--tta", "--work-dir", tmp_path / "out", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "coco/bbox_mAP" in last_metrics(tmp_path / "out")


@pytest.mark.parametrize("metric", ["type='CocoPanopticMetric'", "type='CocoMetric', metric=['bbox', 'segm']"])
def test_tta_of_masks_is_refused(tmp_path, metric):
    (tmp_path / "config.py").write_text(f"test_evaluator = [dict({metric})]")
    (tmp_path / "model.pth").touch()
    run = tool("test.py", "config.py", "model.pth", "--tta", cwd=tmp_path)
    assert run.returncode == 1 and "not their masks" in run.stderr.strip().splitlines()[-1]


class Trap:
    def __reduce__(self):
        return os.mkdir, ("made by the checkpoint",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, detector):
    config, checkpoint = detector
    torch.save(torch.load(checkpoint, weights_only=True) | {"trap": Trap()}, tmp_path / "trap.pth")
    run = tool("test.py", config, "trap.pth", cwd=tmp_path)
    assert run.returncode != 0 and "needs code to be read: it asks for posix.mkdir" in run.stderr
    assert not (tmp_path / "made by the checkpoint").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path, detector):
    config, checkpoint = detector
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]["neck.fpn_convs.0.conv.weight"]
    torch.save(content, tmp_path / "part.pth")
    run = tool("test.py", config, "part.pth", cwd=tmp_path)
    assert run.returncode != 0 and "neck.fpn_convs.0.conv.weight" in run.stderr


# -------------------------------------------------------------------------------------------------- kill and resume

KILLED_AT = """
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class KillHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 3:
            import os, signal
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", ["mask-rcnn", "upernet"])
def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch, dataset, name):
    """Three epochs of two steps, killed outright in the middle of the second."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "kill_hook.py").write_text(KILLED_AT)
    parts = ["train_dataloader", "val_dataloader", "test_dataloader"]
    config = f"_base_ = '{ROOT}/configs/demo/{name}_dinat_shapes.py'\n" + "".join(
        f"{part} = dict(batch_size=1, dataset=dict(data_root='{dataset}/'))\n" for part in parts
    )
    config += "train_cfg = dict(max_epochs=3, val_begin=9)\ndefault_hooks = dict(logger=dict(interval=1))\n"
    config += "model = dict(backbone=dict(drop_path_rate=0.3, drop_rate=0.1))\n"
    if name == "mask-rcnn":
        config += f"val_evaluator = dict(ann_file='{dataset}/annotations/instances_val.json')\n"
        config += "test_evaluator = val_evaluator\n"
    (tmp_path / "config.py").write_text(config)

    (tmp_path / "killed.py").write_text(
        "_base_ = 'config.py'\n"
        "custom_hooks = [dict(type='SeedStepsHook'), dict(type='KillHook')]\n"
        "custom_imports = dict(imports=['dinat_backbones.adapters.openmmlab', 'kill_hook'])\n"
    )

    def train(folder, *options, config="config.py", code=0):
        run = tool("train.py", config, "--work-dir", folder, *options, cwd=tmp_path)
        assert run.returncode == code, run.stdout[-2000:] + run.stderr[-2000:]

    train("whole")
    train("killed", config="killed.py", code=-9)
    assert (tmp_path / "killed" / "last_checkpoint").read_text().endswith("epoch_1.pth")
    train("killed", "--resume")
    ends = [torch.load(tmp_path / folder / "epoch_3.pth", weights_only=False) for folder in ("whole", "killed")]
    assert ends[0]["meta"]["iter"] == ends[1]["meta"]["iter"] == 6
    weights = [end["state_dict"] for end in ends]
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())
    losses = [
        [
            json.loads(line)["loss"]
            for file in sorted((tmp_path / folder).glob("*/vis_data/scalars.json"))
            for line in file.read_text().splitlines()
            if '"loss"' in line
        ]
        for folder in ("whole", "killed")
    ]
    assert len(losses[0]) == 6 and losses[0][-1] == losses[1][-1]


# ---------------------------------------------------------------------------------------------------- --check-data

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


@pytest.mark.parametrize("layout", shapes.LAYOUTS)
def test_check_data_names_what_is_missing(tmp_path, dataset, layout):
    root = tmp_path / "data"
    shutil.copytree(dataset, root)
    (tmp_path / "config.py").write_text(SETTINGS[layout].replace("ROOT", str(root)))
    file, whole, archive = PIECES[layout]

    def check(code):
        run = tool("test.py", "config.py", "--check-data", cwd=tmp_path)
        assert run.returncode == code, run.stderr
        return run.stdout

    assert check(0).strip().endswith(f"in {root}: complete")
    (root / file).unlink()
    text = check(1)
    assert "missing: 1 of 2 files in folder " in text and Path(file).name in text and archive in text
    shutil.rmtree(root / whole) if (root / whole).is_dir() else (root / whole).unlink()
    text = check(1)
    assert f"{'folder' if not whole.endswith('.json') else 'file'} {root / whole}" in text and archive in text


def test_check_data_follows_options(tmp_path, dataset):
    (tmp_path / "config.py").write_text(SETTINGS["ade20k"].replace("ROOT", "nowhere"))
    option = f"train_dataloader.dataset.dataset.data_root={dataset}"
    for options, code in (([], 1), (["--cfg-options", option], 0)):
        run = tool("test.py", "config.py", "--check-data", *options, cwd=tmp_path)
        assert run.returncode == code, run.stdout + run.stderr
