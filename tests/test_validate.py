"""tools/validate.py over drawn pictures: the count by hand, resuming, and what it says where something is wrong."""

import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import fill_by_name
from PIL import Image

pytest.importorskip("torchvision", reason="torchvision is not installed: pip install torchvision")
from dinat_backbones import create_classifier, zoo

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # which is no package
validate = importlib.import_module("validate")

MODEL, CLASSES, EACH = "dinat_mini", ["ant", "bee", "cat", "dog", "elk", "fox"], 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise of several shapes in six folders."""
    root, random = tmp_path_factory.mktemp("pictures") / "val", np.random.default_rng(0)
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
    torch.save(fill_by_name(create_classifier(MODEL, num_classes=len(CLASSES))).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def expected(folder, checkpoint):
    """Counted by hand: PIL and numpy for the pictures, one at a time, ranks by sorting."""
    model = create_classifier(MODEL, num_classes=len(CLASSES)).eval()
    model.load_state_dict(torch.load(checkpoint, weights_only=True))
    top1 = top5 = 0
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).iterdir()):
            picture = Image.open(path).convert("RGB")
            short = min(picture.size)
            width, height = (int(side * 256 / short) for side in picture.size)
            pixels = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
            top, left = round((height - 224) / 2), round((width - 224) / 2)
            pixels = pixels[top : top + 224, left : left + 224]
            pixels = (pixels - np.array([123.675, 116.28, 103.53])) / np.array([58.395, 57.12, 57.375])
            x = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
            with torch.no_grad():
                order = np.argsort(-model(x)[0].numpy()).tolist()
            top1 += order[0] == label
            top5 += label in order[:5]
    return dict(done=len(CLASSES) * EACH, top1=top1, top5=top5)


def run(*words, **kwargs):
    command = [sys.executable, str(ROOT / "tools" / "validate.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, **kwargs)


def states(folder):
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_counts_as_by_hand_and_goes_on(folder, checkpoint, expected, tmp_path, monkeypatch, capsys):
    """Stopped after the second batch, then continued: nothing is counted twice or left out."""
    assert 0 < expected["top1"] < expected["top5"] < expected["done"]  # otherwise this shows little
    words = [folder.parent, MODEL, "--checkpoint", checkpoint, "--state", tmp_path, "--batch-size", 5, "--workers", 0]
    monkeypatch.setattr(sys, "argv", ["validate.py", *map(str, words)])
    write, batches = validate.write_state, []

    def interrupted(path, tally):
        write(path, tally)
        batches.append(tally.done)
        if len(batches) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(validate, "write_state", interrupted)
    with pytest.raises(SystemExit, match="stopped after 10 of 18 images; the same command goes on"):
        validate.main()
    (state,) = states(tmp_path).values()
    assert state["done"] == 10
    validate.main()
    assert batches == [5, 10, 15, 18]
    assert list(states(tmp_path).values()) == [expected]
    text = capsys.readouterr().out
    assert "going on after 10 of 18 images" in text
    line = f"top-1 {100 * expected['top1'] / 18:.2f}, top-5 {100 * expected['top5'] / 18:.2f}"
    assert text.endswith(f"{MODEL}: {line}\n")
    validate.main()  # a third time nothing is left
    assert "counted before" in capsys.readouterr().out and len(batches) == 4
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_killed_run_leaves_a_whole_state(folder, checkpoint, expected, tmp_path):
    command = [sys.executable, ROOT / "tools" / "validate.py", folder, MODEL, "--checkpoint", checkpoint]
    command += ["--state", tmp_path, "--batch-size", "1", "--workers", "1"]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not states(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    (state,) = states(tmp_path).values()
    if state["done"] < 18:
        assert process.returncode == 1
        assert f"stopped after {state['done']} of 18 images" in err and "Traceback" not in err
    done = run(*command[2:])
    assert done.returncode == 0, done.stderr
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


def test_half_precision(folder, checkpoint, tmp_path, expected):
    done = run(folder, MODEL, "--checkpoint", checkpoint, "--state", tmp_path, "--amp", "--workers", 0)
    assert done.returncode == 0, done.stderr
    (state,) = states(tmp_path).values()
    assert state["done"] == 18 and abs(state["top1"] - expected["top1"]) <= 2


def test_pictures_are_prepared_as_published():
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
    """A thousand folders of one tiny picture."""
    picture = root / "one.png"
    root.mkdir()
    Image.new("RGB", (8, 8)).save(picture)
    for number in range(1000):
        (root / "val" / f"n{number:08}").mkdir(parents=True)
        (root / "val" / f"n{number:08}" / "one.png").hardlink_to(picture)
    return root


def test_table_goes_on_where_weights_are_missing(tmp_path):
    """Without a network: every model has its reason, and the address."""
    words = ["--table", "--workers", 0, "--state", tmp_path / "state"]
    env = {"TORCH_HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = run(imagenet(tmp_path / "imagenet"), "dinat_mini", "nat_mini", *words, env=env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
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
    (tmp_path / "damaged" / "ant" / "a.png").write_bytes(b"no picture")
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
        (["damaged", "dinat_minni"], "'dinat_minni' is none of the models: nat_mini, "),
        (["damaged"], "give models, or --table for all of them"),
        (["damaged", MODEL, "nat_mini", "--checkpoint", "x.pth"], "has the weights of one model, and 2 were named"),
        (["damaged", MODEL, "--batch-size", "0"], "--batch-size must be at least 1"),
    ],
)
def test_what_is_wrong_is_said(broken, words, message, monkeypatch, capsys):
    monkeypatch.chdir(broken)
    monkeypatch.setattr(sys, "argv", ["validate.py", *words])
    with pytest.raises(SystemExit) as stopped:
        validate.main()
    assert message in str(stopped.value) + capsys.readouterr().err


def test_damaged_picture_and_other_classes_are_named(broken, folder, checkpoint, tmp_path):
    model = create_classifier(MODEL, num_classes=1)
    torch.save(model.state_dict(), tmp_path / "one.pth")
    state = tmp_path / "state"
    done = run(broken / "damaged", MODEL, "--checkpoint", tmp_path / "one.pth", "--workers", 1, "--state", state)
    assert done.returncode == 1 and "a.png cannot be read as a picture" in done.stderr
    done = run(folder, MODEL, "--checkpoint", tmp_path / "one.pth", "--state", state)
    assert done.returncode == 1 and "is for another number of classes than the 6 folders" in done.stderr
    assert not states(state)
