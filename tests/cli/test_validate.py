"""`dinat validate` on drawn images: counts by hand, resuming, and error messages."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import environment, fill_by_name

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install torchvision")
from dinat_backbones import create_classifier, zoo
from dinat_backbones.cli import validate

MODEL, CLASSES, EACH = "dinat_mini", ["ant", "bee", "cat", "dog", "elk", "fox"], 3
# as text, for a process of its own, too
SMALL = """
from dinat_backbones.classifier import DiNATClassifier

def small(name, num_classes=1000):
    shape = dict(embed_dim=16, depths=[1, 1], num_heads=[1, 2], mlp_ratio=2.0, kernel_size=3, dilations=[[4], [1]])
    return DiNATClassifier(**shape, num_classes=num_classes)
"""
made: dict = {}
exec(SMALL, made)
small = made["small"]


@pytest.fixture
def tool(monkeypatch):
    """Runs the tool in this process, with a small model; returns the message that it ended with."""
    monkeypatch.setattr(validate, "create_classifier", small)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["validate.py", *map(str, words)])
        try:
            validate.main()
        except SystemExit as stopped:
            return stopped.code
        return None

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of several shapes in six folders."""
    root, random = tmp_path_factory.mktemp("images") / "val", np.random.default_rng(0)
    for label in CLASSES:
        (root / label).mkdir(parents=True)
        for number in range(EACH):
            size = [(300, 260), (256, 256), (200, 270)][number]
            pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save(fill_by_name(small(MODEL, len(CLASSES))).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def expected(folder, checkpoint):
    """Counted by hand: PIL and numpy for the images, one at a time, ranks by sorting."""
    model = small(MODEL, len(CLASSES)).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    top1 = top5 = 0
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).iterdir()):
            image = Image.open(path).convert("RGB")
            short = min(image.size)
            width, height = (int(side * 256 / short) for side in image.size)
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            top, left = round((height - 224) / 2), round((width - 224) / 2)
            pixels = pixels[top : top + 224, left : left + 224]
            pixels = (pixels - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
            x = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
            with torch.no_grad():
                order = np.argsort(-model(x)[0].numpy()).tolist()
            top1 += order[0] == label
            top5 += label in order[:5]
    return dict(done=len(CLASSES) * EACH, top1=top1, top5=top5)


def states(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_counts_as_by_hand_and_goes_on(tool, folder, checkpoint, expected, tmp_path, monkeypatch, capsys):
    """Stopped after the second batch, then continued: nothing is counted twice or left out."""
    assert 0 < expected["top1"] < expected["top5"] < expected["done"]  # otherwise this shows little
    words = [folder.parent, MODEL, "--checkpoint", checkpoint, "--state", tmp_path, "--batch-size", 5, "--workers", 0]
    write, batches = validate.write_state, []

    def interrupted(path, tally):
        write(path, tally)
        batches.append(tally.done)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(validate, "write_state", interrupted)
    assert "stopped after 10 of 18 images; the same command continues" in tool(*words)
    (state,) = states(tmp_path).values()
    assert state["done"] == 10
    assert tool(*words) is None
    assert batches == [5, 10, 15, 18]
    assert list(states(tmp_path).values()) == [expected]
    text = capsys.readouterr().out
    assert "continuing after 10 of 18 images" in text
    line = f"top-1 {100 * expected['top1'] / 18:.2f}, top-5 {100 * expected['top5'] / 18:.2f}"
    assert text.endswith(f"{MODEL}: {line}\n")
    assert tool(*words) is None  # a third time nothing is left
    assert "counted before" in capsys.readouterr().out and len(batches) == 4
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_interruption_around_writing_names_what_was_written(tool, folder, checkpoint, tmp_path, monkeypatch, after):
    write = validate.write_state

    def interrupted(path, tally):
        if tally.done < 10 or after:
            write(path, tally)
        if tally.done == 10:
            raise KeyboardInterrupt

    words = [folder, MODEL, "--checkpoint", checkpoint, "--state", tmp_path, "--batch-size", 5, "--workers", 0]
    assert tool(*words) is None
    monkeypatch.setattr(validate, "write_state", interrupted)
    message = tool(*words, "--force")
    (state,) = states(tmp_path).values()
    assert state["done"] == (10 if after else 5)
    assert f"stopped after {state['done']} of 18 images; the same command without --force continues" in message
    # a count anew that is interrupted before its first batch does not fall back to the old count
    monkeypatch.setattr(validate, "_count", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with monkeypatch.context() as broken:  # weights that cannot be loaded cost no count
        broken.setattr(validate, "load", lambda *_: (_ for _ in ()).throw(ValueError("damaged")))
        assert "damaged" in tool(*words, "--force") and list(states(tmp_path).values()) == [state]
    assert "stopped after 0 of 18 images" in tool(*words, "--force") and not states(tmp_path)


def test_killed_run_leaves_a_whole_state(tool, folder, checkpoint, expected, tmp_path):
    code = f"from dinat_backbones.cli import validate{SMALL}"
    code += "validate.create_classifier = small\nvalidate.main()"
    words = [folder, MODEL, "--checkpoint", checkpoint, "--state", tmp_path, "--batch-size", 1, "--workers"]
    command = [sys.executable, "-c", code, *map(str, words), "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 120
    while not states(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    (state,) = states(tmp_path).values()
    if state["done"] < 18:
        assert process.returncode == 1
        assert f"stopped after {state['done']} of 18 images" in err and "Traceback" not in err
    assert tool(*words, 0) is None
    assert list(states(tmp_path).values()) == [expected]


def test_state_belongs_to_weights_folder_and_precision(folder, checkpoint, tmp_path, monkeypatch):
    def names(**changes):
        words = dict(folder=folder, checkpoint=str(checkpoint), amp=False) | changes
        args = type("Args", (), words)
        dataset = validate.find_images(args.folder, zoo.CLASSIFICATION[MODEL], any_classes=True)
        return validate._fingerprint(MODEL, args, dataset)

    other = tmp_path / "other.pth"
    other.write_bytes(checkpoint.read_bytes())
    fewer = tmp_path / "fewer" / "ant"
    fewer.mkdir(parents=True)
    (fewer / "0.png").hardlink_to(folder / "ant" / "0.png")
    assert names() == names(folder=folder.parent)  # the folder above "val"
    variants = [names(), names(amp=True), names(checkpoint=str(other)), names(folder=fewer.parent)]
    assert len(set(variants)) == 4


def test_half_precision(tool, folder, checkpoint, tmp_path, expected):
    assert tool(folder, MODEL, "--checkpoint", checkpoint, "--state", tmp_path, "--amp", "--workers", 0) is None
    (state,) = states(tmp_path).values()
    assert state["done"] == 18 and abs(state["top1"] - expected["top1"]) <= 2


def test_images_are_prepared_as_published():
    for name, (before, after) in {"dinat_mini": (256, 224), "dinat_large_384": (384, 384)}.items():
        row = zoo.CLASSIFICATION[name]
        assert int(row.resolution / row.crop_fraction) == before and row.resolution == after


def test_top5_of_few_classes():
    tally = validate.Tally()
    tally.add(torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.3, 0.2]]), torch.tensor([1, 2]))
    assert (tally.done, tally.top1, tally.top5) == (2, 1, 2)


def test_table():
    near = validate.Tally(1000, 818, 960)
    lines, status = validate.table({"dinat_mini": near, "dinat_tiny": validate.Tally(1000, 828, 961)})
    assert status == 0
    assert lines[1].split() == ["dinat_mini", "224", "81.80", "81.8", "+0.00", "96.00"]
    assert lines[2].split() == ["dinat_tiny", "224", "82.80", "82.7", "+0.10", "96.10"]
    assert validate.table({"dinat_mini": validate.Tally(1000, 816, 960)})[1] == 1
    lines, status = validate.table({"dinat_mini": near, "dinat_large_384": "no network"})
    assert status == 1 and lines[2].split(maxsplit=2) == ["dinat_large_384", "384", "not measured: no network"]


def imagenet(root):
    """A thousand folders of one tiny image."""
    image = root / "one.png"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(image)
    for number in range(1000):
        (root / "val" / f"n{number:08}").mkdir(parents=True)
        (root / "val" / f"n{number:08}" / "one.png").hardlink_to(image)
    return root


def test_table_goes_on_where_weights_are_missing(tool, tmp_path, monkeypatch, capsys):
    """Without a network: every model has its reason, and the address."""

    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("dinat_backbones.checkpoint.download.urlopen", no_network)
    monkeypatch.setattr(validate, "create_classifier", create_classifier)
    words = ["--table", "--workers", 0, "--state", tmp_path / "state"]
    assert tool(imagenet(tmp_path / "imagenet"), "dinat_mini", "nat_mini", *words) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("dinat_mini                224 not measured: cannot download https://shi-labs.com")
    assert lines[-1].startswith("nat_mini                  224 not measured: cannot download https://shi-labs.com")


@pytest.fixture
def broken(folder, tmp_path):
    """Folders that are not what they should be."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "ILSVRC2012_val_00000001.JPEG").touch()
    (tmp_path / "hollow" / "ant").mkdir(parents=True)
    (tmp_path / "damaged" / "ant").mkdir(parents=True)
    (tmp_path / "damaged" / "ant" / "a.png").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize(
    "words, message",
    [
        (["none", MODEL], "none is not there"),
        (
            ["empty", MODEL],
            "empty is not an ImageNet validation folder: expected one folder per class, such as",
        ),
        (["flat", MODEL], "found 1 files and no folder: sort them into folders of their classes"),
        (["hollow", MODEL, "--checkpoint", "x.pth"], "Found no valid file for the classes ant"),
        (["damaged", MODEL], "expected its 1000 folders named by WordNet ids such as n01440764, found 1: ant"),
        (["damaged", "dinat_large_21k"], "a classifier of 21841 classes"),
        (["damaged", MODEL, "--checkpoint", "x.pth"], "checkpoint x.pth is not there"),
        (["damaged", "dinat_minni"], "'dinat_minni' is not a published model; choose from: nat_mini, "),
        (["damaged"], "give models, or --table for all of them"),
        (["damaged", MODEL, "nat_mini", "--checkpoint", "x.pth"], "has the weights of one model, and 2 were named"),
        (["damaged", MODEL, "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(tool, broken, words, message, monkeypatch, capsys):
    monkeypatch.chdir(broken)
    stopped = tool(*words)
    assert stopped and message in str(stopped) + capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_image_and_other_classes_are_named(tool, broken, folder, tmp_path, workers):
    torch.save(small(MODEL, 1).state_dict(), tmp_path / "one.pth")
    words = [MODEL, "--checkpoint", tmp_path / "one.pth", "--state", tmp_path / "state", "--workers", workers]
    assert "a.png cannot be read as an image" in tool(broken / "damaged", *words)
    assert "is for another number of classes than the 6 folders" in tool(folder, *words)
    assert not states(tmp_path / "state")
