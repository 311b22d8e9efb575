"""tools/fuzzing/commands.py: it finds commands that do what they should not, and nothing in ours."""

import random
import sys
from pathlib import Path

import fuzz
import pytest

pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
pytest.importorskip("mmseg", reason="mmseg is not installed: pip install 'dinat_backbones[openmmlab]'")
from fuzzing import commands

from dinat_backbones.cli import shapes


def test_commands(monkeypatch, capsys):
    """A few cases of each fault, of the commands that take no seconds."""
    quick = {name: words for name, words in commands.COMMANDS.items() if not name.startswith(commands.SLOW)}
    monkeypatch.setattr(commands, "COMMANDS", quick)
    assert fuzz.main(["commands", "--count", "8"]) == 0
    assert "commands: 8 cases (seeds 0 to 7), 0 failures" in capsys.readouterr().out


def show_a_traceback(words):
    raise RuntimeError("no sentence")


def say_nothing(words):
    sys.exit(1)


def leave_half_a_file(words):
    Path("out").mkdir(exist_ok=True)
    Path("out/annotations.json").write_text("{")
    sys.exit("shapes: it did not work")


def leave_a_partial_file(words):
    Path("out").mkdir(exist_ok=True)
    Path("out/.annotations.1.partial.json").touch()
    sys.exit("shapes: it did not work")


def fail_ever_after(words):
    sys.exit("shapes: it did not work and never will")


@pytest.mark.parametrize(
    ("main", "reason"),
    [
        (show_a_traceback, "a traceback: "),
        (say_nothing, "status 1 and ''"),
        (leave_half_a_file, "is half-written"),
        (leave_a_partial_file, "it left "),
        (fail_ever_after, "again after words"),
    ],
)
def test_commands_that_do_what_they_should_not(monkeypatch, tmp_path, main, reason):
    monkeypatch.setattr(commands, "COMMANDS", {"shapes": ("shapes out --train 1", "")})
    monkeypatch.setattr(commands, "FAULTS", [commands.wrong_words])
    monkeypatch.setattr(commands.cli, "main", main)
    (tmp_path / "good").mkdir()
    with pytest.raises(AssertionError, match=reason):
        commands.try_one(0, tmp_path / "good", tmp_path / "case")


@pytest.mark.parametrize("fault", dict.fromkeys(commands.FAULTS), ids=lambda fault: fault.__name__)
def test_faults_are_mended(monkeypatch, tmp_path, fault):
    """Every file has its old content again."""
    monkeypatch.chdir(tmp_path)
    shapes.make_shapes(tmp_path / "data", train=1, val=1, size=48, layouts=["coco"])
    Path("mmdet.py").write_text("model = dict()")
    names = "mmdet.py data/annotations/instances_train.json data/train"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for seed in range(12):
        found = fault(["train", "mmdet.py", "--work-dir", "out"], names, random.Random(seed))
        if found is not None:
            changed = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
            assert (
                changed != before or found.words != ["train", "mmdet.py", "--work-dir", "out"] or "disk" in str(found)
            )
            found.mend()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
