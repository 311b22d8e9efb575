"""`dinat train` and `dinat test` in front of the frameworks' own scripts; test_openmmlab.py has fake frameworks."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from helpers import ROOT, environment

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from dinat_backbones.adapters import openmmlab  # noqa: F401  # before mmdet: mmcv's operators
from dinat_backbones.cli import shapes

DEMO = ROOT / "configs" / "demo" / "mask-rcnn_dinat_shapes.py"


def script(name, *arguments, cwd, path=()):
    """A script of tools/ in a process of its own."""
    words = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=environment(*path))


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
@pytest.mark.parametrize("name", ["train", "test"])
def test_the_scripts_of_both_frameworks_take_the_flags(tmp_path, command, capsys, scope, name):
    (tmp_path / "config.py").write_text(f"default_scope = {scope!r}")
    assert command(name, "config.py", "--help") == 0
    text = capsys.readouterr().out
    flags = {"train": ["--amp", "--resume"], "test": ["--tta", "--out", "--show-dir"]}[name]
    for flag in [*flags, "--launcher", "--cfg-options", "--work-dir", "slurm", "pytorch"]:
        assert flag in text, flag


def test_a_detector_is_evaluated(tmp_path, detector):
    run = script("test.py", *detector, "--work-dir", tmp_path, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= last_metrics(tmp_path).keys()


def test_tta_of_boxes(tmp_path, command, detector):
    """A Mask R-CNN by one flag; its boxes are those without it."""
    assert command("test", *detector, "--tta", "--boxes-only", "--work-dir", "out") is None
    assert last_metrics(tmp_path / "out").keys() >= {"coco/bbox_mAP"}
    assert not any("segm" in key for key in last_metrics(tmp_path / "out"))


def test_boxes_without_masks(tmp_path, command, detector):
    """The same box AP with and without the mask head, and options of the command line beside the flag."""
    assert command("test", *detector, "--boxes-only", "--cfg-options", "custom=1", "--work-dir", "boxes") is None
    assert command("test", *detector, "--work-dir", "all") is None
    boxes, everything = last_metrics(tmp_path / "boxes"), last_metrics(tmp_path / "all")
    assert boxes["coco/bbox_mAP"] == everything["coco/bbox_mAP"] and "coco/segm_mAP" not in boxes
    assert Config.fromfile(next((tmp_path / "boxes").glob("**/config.py"))).custom == 1


def test_boxes_only_needs_a_mask_head(tmp_path, command):
    (tmp_path / "config.py").write_text("model = dict(type='RetinaNet')")
    (tmp_path / "model.pth").touch()
    assert "no roi_head.mask_head that could be left out" in command("test", "config.py", "model.pth", "--boxes-only")


def test_sliding_windows_of_mask2former(tmp_path, command):
    """mmseg resizes the masks of a crop to the padded image; test_openmmlab_faults.py shows that the way out works."""
    (tmp_path / "config.py").write_text(
        "default_scope = 'mmseg'\nmodel = dict(decode_head=dict(type='Mask2FormerHead'), test_cfg=dict(mode='whole'),\n"
        "    data_preprocessor=dict(test_cfg=dict(size_divisor=32)))\n"
    )
    (tmp_path / "model.pth").touch()
    message = command("test", "config.py", "model.pth", "--cfg-options", "model.test_cfg.mode=slide")
    assert (
        message.startswith("dinat test: model.test_cfg.mode='slide' with Mask2FormerHead")
        and "test_cfg=None" in message
    )


@pytest.mark.parametrize("metric", ["type='CocoPanopticMetric'", "type='CocoMetric', metric=['bbox', 'segm']"])
def test_tta_of_masks_is_refused(tmp_path, command, metric):
    (tmp_path / "config.py").write_text(f"test_evaluator = [dict({metric})]")
    (tmp_path / "model.pth").touch()
    message = command("test", "config.py", "model.pth", "--tta")
    assert message.startswith("dinat test: --tta: ") and "not their masks; add --boxes-only" in message


class Trap:
    def __reduce__(self):
        return os.mkdir, ("made by the checkpoint",)


def test_code_in_a_checkpoint_does_not_run(tmp_path, command, detector):
    config, checkpoint = detector
    torch.save(torch.load(checkpoint, weights_only=True) | {"trap": Trap()}, tmp_path / "trap.pth")
    message = command("test", config, "trap.pth")
    assert message.startswith("dinat test: trap.pth needs code to be read: it asks for posix.mkdir")
    assert not (tmp_path / "made by the checkpoint").exists()
    # the command that the message advises
    (advice,) = re.findall("`dinat (convert FILE .* --allow-pickle)`", message)
    replaced = advice.replace("FILE", "trap.pth").replace("TARGET", "safe").replace("LAYOUT", "mmdet3")
    assert command(*replaced.split()) is None and (tmp_path / "made by the checkpoint").exists()
    assert command("test", config, "safe.pth", "--work-dir", "out") is None


def test_a_checkpoint_of_another_model_is_refused(tmp_path, command, detector):
    config, checkpoint = detector
    content = torch.load(checkpoint, weights_only=True)
    del content["state_dict"]["neck.fpn_convs.0.conv.weight"]
    torch.save(content, tmp_path / "part.pth")
    message = command("test", config, "part.pth")
    assert message.startswith("dinat test: the checkpoint does not fit the model") and "\n" not in message
    assert "neck.fpn_convs.0.conv.weight" in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model = dict(backbone=dict(kernel_size=4))", "the config: .*ValueError: .*kernel_size=4: expected an odd"),
        ("model = dict(backbone=dict(type='NoSuchBackbone'))", "the config: .*NoSuchBackbone"),
        ("optim_wrapper = dict(optimizer=dict(type='NoSuchOptimizer'))", "the config: optim_wrapper: "),
        ("import no_such_module", "the config: ModuleNotFoundError: .*no_such_module"),
        ("model = ", "the config: SyntaxError: .*invalid syntax"),
        ("load_from = 'nowhere.pth'", "nowhere.pth is not there"),
    ],
)
def test_what_is_wrong_with_a_config_is_one_sentence(tmp_path, command, detector, line, words):
    (tmp_path / "config.py").write_text(f"{detector[0].read_text()}\n{line}\n")
    message = command("train", "config.py", "--work-dir", "out")
    assert re.search(words, message) and message.startswith("dinat train: ") and "\n" not in message


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, command, dataset, scope):
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    name = {"mmdet": "mask-rcnn", "mmseg": "upernet"}[scope]
    loaders = [f"{part}_dataloader = dict(dataset=dict(data_root='data/'))" for part in ("train", "val", "test")]
    config = [f"_base_ = '{ROOT}/configs/demo/{name}_dinat_shapes.py'", *loaders]
    if scope == "mmdet":
        config.append("val_evaluator = test_evaluator = dict(ann_file='data/annotations/instances_val.json')")
    (tmp_path / "config.py").write_text("\n".join(config))
    image = min((data / {"mmdet": "train", "mmseg": "images/training"}[scope]).iterdir())
    image.write_bytes(b"")
    message = command("train", "config.py", "--work-dir", "out")
    assert message.startswith(f"dinat train: the data: {image.relative_to(tmp_path)}: ") and "\n" not in message
    if scope == "mmseg":  # which takes the images that there are
        return
    image.unlink()
    message = command("train", "config.py", "--work-dir", "out")
    assert f"{image.relative_to(tmp_path)}: No such file or directory" in message
    message = command("train", "config.py", "--work-dir", "out", "--cfg-options", "train_dataloader.num_workers=1")
    assert message.startswith("dinat train: the data: FileNotFoundError: ") and "Traceback" not in message
    assert str(image.relative_to(tmp_path)) in message


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
def test_a_killed_and_resumed_run_ends_as_an_uninterrupted_one(tmp_path, command, dataset, name):
    """Three epochs of two steps, killed outright in the middle of the second."""
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

    assert command("train", "config.py", "--work-dir", "whole") is None
    run = script("train.py", "killed.py", "--work-dir", "killed", cwd=tmp_path, path=[tmp_path])
    assert run.returncode == -9, run.stdout[-2000:] + run.stderr[-2000:]
    assert (tmp_path / "killed" / "last_checkpoint").read_text().endswith("epoch_1.pth")
    assert command("train", "config.py", "--work-dir", "killed", "--resume") is None
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
