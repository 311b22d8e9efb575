"""Commands with something wrong: their words, a config, the data, a checkpoint, the disk.

A command has to end well, or with a status that is not 0 and a sentence, not a traceback; nothing may be half-written.
When what was wrong is mended, the same command has to end well.
"""

import contextlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch

from dinat_backbones import cli

from .core import Session
from .processes import check_files, fork, kill, wait

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120  # of one command
MODEL = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2], kernel_size=3, dilations=None, mlp_ratio=1.0)
LOADERS = "".join(
    f"{part}_dataloader = dict(batch_size=1, dataset=dict(data_root='data/'))\n" for part in ("train", "val", "test")
)
TRAIN = "train_cfg = dict(max_epochs=1, val_interval=9, val_begin=9)\ndefault_hooks = dict(logger=dict(interval=1))\n"
CONFIGS = {
    "mmdet": f"""
_base_ = "{ROOT}/configs/demo/mask-rcnn_dinat_shapes.py"
{LOADERS}{TRAIN}
val_evaluator = dict(ann_file="data/annotations/instances_val.json")
test_evaluator = val_evaluator
model = dict(
    backbone=dict({", ".join(f"{key}={value!r}" for key, value in MODEL.items())}),
    neck=dict(in_channels=[16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16), bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16), mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16)),
)
""",
    "mmseg": f"""
_base_ = "{ROOT}/configs/demo/upernet_dinat_shapes.py"
{LOADERS}{TRAIN}
model = dict(
    backbone=dict({", ".join(f"{key}={value!r}" for key, value in MODEL.items())}),
    decode_head=dict(in_channels=[16, 32, 64], channels=16), auxiliary_head=dict(in_channels=32, channels=16),
)
""",
}
PREDICT = "predict {0} --config {1}.py --checkpoint {1}.pth --out out --device cpu"
# A good command line of each command, and what it reads.
COMMANDS = {
    "train mmdet": ("train mmdet.py --work-dir out", "mmdet.py data/annotations/instances_train.json data/train"),
    "train mmseg": ("train mmseg.py --work-dir out", "mmseg.py data/images/training data/annotations/training"),
    "test mmdet": (
        "test mmdet.py mmdet.pth --work-dir out",
        "mmdet.py mmdet.pth data/annotations/instances_val.json data/val",
    ),
    "test mmseg": (
        "test mmseg.py mmseg.pth --work-dir out",
        "mmseg.py mmseg.pth data/images/validation data/annotations/validation",
    ),
    "predict mmdet": (PREDICT.format("data/val", "mmdet"), "mmdet.py mmdet.pth data/val"),
    "predict mmseg": (PREDICT.format("data/val", "mmseg"), "mmseg.py mmseg.pth data/val"),
    "check data": ("test mmseg.py --check-data", "mmseg.py data/images/validation data/annotations/validation"),
    "convert": ("convert mmseg.pth out/target.pth --to imagenet", "mmseg.pth"),
    "convert safetensors": ("convert mmdet.pth out/target.safetensors --to mmdet2", "mmdet.pth"),
    "config": ("config mmdet.py --backbone nat_mini --checkpoint-backbone none --out out/new.py", "mmdet.py"),
    "flops": ("flops mmdet.py --size 160 128", "mmdet.py"),
    "shapes": ("shapes out --layout coco ade20k --train 3 --val 2 --size 48", ""),
    "prepare": (
        "prepare coco --root datasets --split val --workers 1",
        "datasets/coco/annotations/panoptic_val2017.json datasets/coco/panoptic_val2017",
    ),
    "attend": (
        "attend data/val/000000.jpg --config mmseg.py --checkpoint mmseg.pth --at 9,9 --out out/a.png --device cpu",
        "mmseg.py mmseg.pth data/val/000000.jpg",
    ),
}
FORCE = {"convert": "--force", "shapes": "--replace"}  # what replaces results
SLOW = ("train", "test", "config")  # seconds, of which there are fewer cases
WORDS = ("", "-1", "0", "abc", "1e99", "nan", "nothing.py", "--nothing", "é" * 300, "*", "{}", "dinat_huge", "[1, 2]")
# Lines at the end of a config, each wrong in a way that can be told before anything is computed.
SETTINGS = [
    *(
        f"model = dict(backbone=dict({words}))"
        for words in (
            "kernel_size=4",
            "kernel_size='abc'",
            "kernel_size=None",
            "embed_dim=7",
            "embed_dim=-8",
            "depths=[1, 1]",
            "depths='abc'",
            "num_heads=[3, 3, 3, 3]",
            "num_heads=None",
            "dilations=[[1], [1]]",
            "dilations='nothing'",
            "drop_path_rate='a lot'",
            "drop_path_rate=2.0",
            "out_indices=(7,)",
            "out_indices='all'",
            "no_such_setting=1",
            "type='NoSuchBackbone'",
            "arch='dinat_huge'",
            "init_cfg=dict(type='Pretrained', checkpoint='nowhere.pth')",
            "init_cfg=dict(type='NoSuchInit')",
        )
    ),
    "model = dict(type='NoSuchModel')",
    "optim_wrapper = dict(optimizer=dict(type='NoSuchOptimizer'))",
    "optim_wrapper = dict(optimizer=dict(lr='fast'))",
    "param_scheduler = dict(type='NoSuchLR')",
    "custom_hooks = [dict(type='NoSuchHook')]",
    "custom_imports = dict(imports=['no_such_module'])",
    "default_scope = 'nothing'",
    "train_cfg = dict(type='NoSuchLoop')",
    "test_evaluator = dict(type='NoSuchMetric')",
    "test_dataloader = dict(dataset=dict(type='NoSuchDataset'))",
    "train_dataloader = dict(dataset=dict(pipeline=[dict(type='NoSuchStep')]))",
    "load_from = 'nowhere.pth'",
    "model = ",
    "import no_such_module",
    "_base_ = 'nowhere.py'",
]


class Fault(NamedTuple):
    """What is wrong: the words of the command line, a description, and what mends it."""

    words: list[str]
    description: str
    mend: Callable[[], object] = lambda: None


def all_files(names: str) -> list[Path]:
    """The files and folders that a command reads, with those inside."""
    found = []
    for path in map(Path, names.split()):
        found += [path, *sorted(path.rglob("*"))] if path.is_dir() else [path]
    return found


def wrong_words(words: list[str], names: str, rng: random.Random) -> Fault:
    """A word too many, too few, twice or another one."""
    index = rng.randrange(1, len(words))
    how = rng.choice(["drop", "twice", "other", "other", "other", "insert"])
    new = {"drop": [], "twice": [words[index]] * 2, "other": [rng.choice(WORDS)]}.get(how)
    if new is None:
        new = [rng.choice(WORDS), words[index]]
    changed = [*words[:index], *new, *words[index + 1 :]]
    return Fault(changed, f"words {' '.join(changed)!r}")


def wrong_setting(words: list[str], names: str, rng: random.Random) -> Fault | None:
    """A line at the end of the config."""
    config = next((Path(name) for name in names.split() if name.endswith(".py")), None)
    if config is None:
        return None
    line, before = rng.choice(SETTINGS), config.read_text()
    config.write_text(f"{before}\n{line}\n")
    return Fault(words, f"the config with {line!r}", lambda: config.write_text(before))


def missing(words: list[str], names: str, rng: random.Random) -> Fault | None:
    """A file or folder is not there, or one is where the other should be."""
    if not names:
        return None
    path = rng.choice(all_files(names))
    kept = Path("kept") / path
    kept.parent.mkdir(parents=True, exist_ok=True)
    how = rng.choice(["missing", "a folder" if path.is_file() else "a file"])
    shutil.move(path, kept)
    if how == "a folder":
        path.mkdir()
    elif how == "a file":
        path.write_text("a file")

    def mend() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        shutil.move(kept, path)
        shutil.rmtree("kept")

    return Fault(words, f"{path} is {how}", mend)


def damaged(words: list[str], names: str, rng: random.Random) -> Fault | None:
    """A file is empty, cut off, random, or (a label map) of another size; of annotations, part is missing."""
    files = [path for path in all_files(names) if path.is_file() and path.suffix != ".py"]
    if not files:
        return None
    path = rng.choice(files)
    before = path.read_bytes()
    how = ["empty", "cut off", "random"] + {".png": ["of another size"], ".json": ["half"]}.get(path.suffix, [])
    how = rng.choice(how)
    if how == "of another size":
        size = rng.randint(1, 90), rng.randint(1, 90)
        cv2.imwrite(str(path), np.zeros(size, np.uint8))
    elif how == "half":
        content = json.loads(before)
        key = rng.choice([key for key, value in content.items() if isinstance(value, list)])
        if rng.random() < 0.5:
            del content[key]
        else:
            content[key] = content[key][: len(content[key]) // 2]
        how = f"without {key}"
        path.write_text(json.dumps(content))
    else:
        bytes_of = {"empty": b"", "cut off": before[: rng.randrange(len(before))], "random": rng.randbytes(1000)}
        path.write_bytes(bytes_of[how])
    return Fault(words, f"{path} is {how}", lambda: path.write_bytes(before))


def no_room(words: list[str], names: str, rng: random.Random) -> Fault | None:
    """The results cannot be written: below a file, in /proc, on a disk that is full or gets full."""
    index = next((i for i, word in enumerate(words) if word.split("/")[0] == "out"), None)
    if index is None:
        return None
    how = rng.choice(["file", "proc", "full", "full"])
    if how == "full":
        folder = Path("out")
        folder.mkdir()
        kilobytes = rng.choice([4, 40, 400])
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True
        )
        if done.returncode:
            folder.rmdir()
            return None  # not allowed here

        def mend() -> None:
            subprocess.run(["umount", "--lazy", folder], check=True)
            folder.rmdir()

        return Fault(words, f"out is a disk of {kilobytes} kB", mend)
    place = "mmdet.py" if how == "file" else "/proc"
    changed = [*words[:index], words[index].replace("out", f"{place}/out", 1), *words[index + 1 :]]
    return Fault(changed, f"out is {place}/out")


FAULTS = [wrong_words, wrong_words, wrong_setting, wrong_setting, missing, damaged, no_room]


def prepare(folder: Path) -> None:
    """Data, configs and checkpoints of small models."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    from dinat_backbones.cli import shapes

    shapes.make_shapes(folder / "data", train=2, val=2, size=48, layouts=["coco", "coco-panoptic", "ade20k"])
    coco = folder / "datasets/coco"
    coco.mkdir(parents=True)
    shutil.copytree(folder / "data/annotations/panoptic_val", coco / "panoptic_val2017")
    (coco / "annotations").mkdir()
    shutil.copy(folder / "data/annotations/panoptic_val.json", coco / "annotations/panoptic_val2017.json")
    for name, text in CONFIGS.items():
        (folder / f"{name}.py").write_text(text)
        cfg = Config.fromfile(folder / f"{name}.py")
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
        torch.save({"meta": {}, "state_dict": model.state_dict()}, folder / f"{name}.pth")


def status_of(words: list[str], folder: Path) -> tuple[int, str]:
    """The exit status of a command line in `folder`, and what it printed."""
    log = Path(f"{folder}.log")
    log.unlink(missing_ok=True)
    child = fork(lambda: cli.main(words), folder)
    status = wait(child, SECONDS)
    if status is None:
        kill(child)
        raise AssertionError(f"{' '.join(words)}: goes on for {SECONDS} s")
    return status, log.read_text(errors="replace")


def check(words: list[str], folder: Path) -> str:
    """Run a command with something wrong.

    Raises:
        AssertionError: it shows a traceback, or says nothing, or leaves files that are not whole.
    """
    status, said = status_of(words, folder)
    assert "Traceback (most recent call last)" not in said, f"a traceback: {said[-1500:]}"
    last = said.strip().rpartition("\n")[2]
    assert status in (0, 1, 2), f"status {status}: {said[-500:]}"
    assert status == 0 or 10 < len(last) < 1500, f"status {status} and {last!r}"
    if (folder / "out").is_dir():
        check_files(folder / "out")
        left = [str(path) for path in (folder / "out").rglob("*.partial*")]
        assert not left, f"it left {left}"
    return "succeeded" if status == 0 else "refused"


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With `folder` as the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def try_one(seed: int, good: Path, folder: Path) -> str:
    """One command with one fault, in a copy of the folder `good`.

    Raises:
        AssertionError: see `check`; or the command fails although the fault is mended.
    """
    rng = random.Random(seed)
    name = rng.choice([name for name in COMMANDS for _ in range(1 if name.startswith(SLOW) else 3)])
    words, names = COMMANDS[name]
    shutil.copytree(good, folder)
    with inside(folder):
        fault = None
        while fault is None:
            kind = rng.choice(FAULTS)
            fault = kind(words.split(), names, rng)
    try:
        outcome = check(fault.words, folder)
    except AssertionError as error:
        raise AssertionError(f"{name}, {fault.description}: {error}") from None
    finally:
        with inside(folder):
            fault.mend()
    force = next((word for start, word in FORCE.items() if name.startswith(start)), None)
    again = [*words.split(), force] if outcome == "succeeded" and force else words.split()
    status, said = status_of(again, folder)
    assert status == 0, f"{name}, again after {fault.description}: status {status}, {said[-1500:]}"
    check_files(folder / "out")
    shutil.rmtree(folder)
    return f"{kind.__name__.replace('_', ' ')} {outcome}"


def run(session: Session) -> None:
    """`python tools/fuzz.py commands`."""
    import mmdet.apis  # noqa: F401
    import mmseg.apis  # noqa: F401

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="dinat-commands-"))
    try:
        good = root / "good"
        good.mkdir()
        with inside(good):
            prepare(good)
        session.try_each(lambda seed: try_one(seed, good, root / f"case-{seed}"))
    finally:
        if not session.failures:
            shutil.rmtree(root)
