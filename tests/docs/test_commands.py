"""Every command of the documentation has one rule, which says whether it runs here, or why not and what is checked.

`RULES` is complete in both directions: a command without a rule fails, and so does a rule without a command.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from dinat_backbones import cli, create_classifier
from documentation import PAGES, Command, commands
from helpers import ROOT, environment

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest depends on it there
    import tomli as tomllib


@dataclass(frozen=True)
class Rule:
    """What is done with the commands that a regular expression matches as a whole.

    Attributes:
        pattern: of the command, without its comment.
        check: "run": on small data, the status has to be 0; "parse": the program's own argument parser has to accept
            the arguments, and the configs it names have to load; "install", "make", "known": see the tests.
        reason: why it is not run, where it is not.
        needs: a package without which only the files that the command names are looked for.
        config: what CONFIG stands for here, if not the detector of `folder`.
    """

    pattern: str
    check: str
    reason: str = ""
    needs: str = ""
    config: str = "config.py"


SEGMENTOR = "configs/mmseg/dinat/dinat-mini_upernet_8xb2-amp-160k_ade20k-512x512.py"
NETWORK = "needs a network"
HOURS = "trains for hours; tests/cli/test_train.py trains a few iterations"
REAL_DATA = "needs the published data and weights; tests/cli runs it on small data"
RULES = (
    Rule(r"dinat info", "run"),
    Rule(r"dinat shapes .*", "run"),
    Rule(r"dinat test CONFIG --check-data", "run"),
    Rule(r"dinat test CONFIG CHECKPOINT( --cfg-options .*)?", "run"),
    Rule(r"dinat predict .* --config CONFIG .*", "run"),
    Rule(r"dinat attend IMAGE --config CONFIG .*", "run"),
    Rule(r"dinat convert .*", "run"),
    Rule(r"dinat flops dinat_mini", "run"),
    Rule(r"dinat (flops|config) mmdet::\S+ --backbone .*", "run"),
    Rule(r"dinat train mmdet::\S+ --backbone \S+", "parse", HOURS),
    Rule(r"dinat train (configs/mmdet|configs/mmseg)/\S+", "parse", HOURS),
    Rule(r"dinat train configs/mmpretrain/\S+", "parse", HOURS, needs="mmpretrain"),
    Rule(r"dinat train CONFIG --resume", "parse", HOURS),
    Rule(r"dinat test configs/\S+ CHECKPOINT\.pth", "parse", REAL_DATA),
    Rule(r"dinat test CONFIG CHECKPOINT --tta", "parse", "tests/cli/test_train.py runs it", config=SEGMENTOR),
    Rule(r"dinat train --config-file .*", "parse", HOURS, needs="detectron2"),
    Rule(r"PYTHONPATH=\. dinat .* --import my_data.*", "known", "tests/adapters/test_detectron2_own_data.py runs it"),
    Rule(r"dinat predict .* --config CONFIG\.yaml .*", "parse", "tests/adapters/test_mask2former.py runs it"),
    Rule(r"dinat export .*", "parse", "takes minutes at this size; tests/cli/test_export.py runs small ones"),
    Rule(r"dinat flops --all", "parse", "builds 64 models; tests/ops/test_flops.py counts them"),
    Rule(r"dinat validate .*", "parse", REAL_DATA),
    Rule(r"dinat prepare .*", "parse", REAL_DATA),
    Rule(r"torchrun .*", "parse", "needs GPUs; tests/cli/test_distributed.py runs two processes"),
    Rule(r"srun .*", "parse", "needs slurm"),
    Rule(r"python tools/triton_kernels\.py .*", "parse", "compiles for minutes, or needs a GPU"),
    Rule(r"pip install .*", "install", NETWORK),
    Rule(r"make \S+", "make", "makes environments, trains or tests; what `make -n` says is looked at"),
    Rule(r"git clone \S+( \S+)?", "known", NETWORK),
    Rule(r"cd dinat_backbones", "known", "the folder of the line before"),
    Rule(r"export \S+( \S+)?", "known", "for the reader's shell"),
    Rule(r"mim train onedl-mmdetection CONFIG", "known", "openmim is not installed in the tested environments"),
    Rule(r"CITYSCAPES_DATASET=\S+ csCreateTrainIdLabelImgs", "known", "a command of cityscapesscripts"),
)
# What readers put in, and what stands for it here; paths are those of `folder`
PLACEHOLDERS = {
    "CONFIG.yaml": str(ROOT / "mask2former/configs/coco/panoptic-segmentation/maskformer2_dinat_tiny_bs16_50ep.yaml"),
    "CHECKPOINT": "detector.pth",
    "CHECKPOINT.pth": "detector.pth",
    "SOURCE.pth": "detector.pth",
    "FILE": "detector.pth",
    "IMAGE": "data/shapes/val/000000.jpg",
    "IMAGE_OR_FOLDER": "data/shapes/val",
    "FOLDER": "data",
    "IMAGENET": "data",
    # files of gigabytes, and sizes of real data
    "dinat_large_in22k_224.pth": "dinat_mini_in1k_224.pth",
    "test_dataloader.dataset.data_root=/disk/coco/": "test_dataloader.dataset.data_root=data/shapes/",
    "200": "4",
    "50": "2",
}
# Names outside of this project that the documentation installs
DISTRIBUTIONS = {"cityscapesscripts"}
CONFIG = f"""
_base_ = "{ROOT}/configs/demo/mask-rcnn_dinat_shapes.py"
train_dataloader = dict(dataset=dict(data_root="data/shapes/"))
val_dataloader = dict(dataset=dict(data_root="data/shapes/"))
test_dataloader = dict(dataset=dict(data_root="data/shapes/"))
val_evaluator = dict(ann_file="data/shapes/annotations/instances_val.json")
test_evaluator = dict(ann_file="data/shapes/annotations/instances_val.json")
work_dir = "work_dirs/documentation"
"""
SAVE_DETECTOR = """
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile("config.py")
init_default_scope("mmdet")
model = MODELS.build(cfg.model)
torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(classes=cfg.classes))), "detector.pth")
"""
ALL = {command.text: command for page in PAGES for command in commands(page)}


def matching_rules(command: Command) -> list[Rule]:
    return [rule for rule in RULES if re.fullmatch(rule.pattern, command.text)]


def rule_of(command: Command) -> Rule:
    matching = matching_rules(command)
    where = f"{command.page}:{command.line}: {command.text!r}"
    assert matching, f"{where} has no rule: add one to RULES that runs it, or says why not"
    assert len(matching) == 1, f"{where} has several rules: {[rule.pattern for rule in matching]}"
    return matching[0]


def those(check: str) -> list[str]:
    """The commands with that check; those without a rule fail in `test_every_command_has_one_rule`."""
    return [text for text, command in ALL.items() if [rule.check for rule in matching_rules(command)] == [check]]


def stand_ins(command: Command) -> list[str]:
    """The words of a command with the reader's files replaced; configs of the checkout by their full path."""
    placeholders = {**PLACEHOLDERS, "CONFIG": rule_of(command).config}
    replaced = [placeholders.get(word, word) for word in command.words]
    return [str(ROOT / word) if word.startswith("configs/") else word for word in replaced]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands run: a config, a script that saves a checkpoint of its model, published names."""
    pytest.importorskip("mmdet", reason="mmdet is not installed: pip install 'dinat_backbones[openmmlab]'")
    folder = tmp_path_factory.mktemp("commands")
    folder.joinpath("config.py").write_text(CONFIG)
    folder.joinpath("save_detector.py").write_text(SAVE_DETECTOR)
    for name, file in (("dinat_mini", "dinat_mini_in1k_224.pth"), ("nat_mini", "nat_mini.pth")):
        torch.save(create_classifier(name).state_dict(), folder / file)
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """Status and output of every command that is run or parsed, by its text."""
    order = sorted(those("run"), key=lambda text: not text.startswith("dinat shapes"))  # makes the data
    jobs, texts = [["run", ["python", str(folder / "save_detector.py")]]], []
    for mode, chosen in (("run", order), ("parse", those("parse"))):
        for text in chosen:
            if not rule_of(ALL[text]).needs or find_spec(rule_of(ALL[text]).needs):
                words = stand_ins(ALL[text])
                if words[1] == "convert":
                    words.append("--force")  # several commands write TARGET.pth
                if "model.safetensors" in words or "--kernel-size" in words:  # of a backbone alone
                    words = ["dinat_mini_in1k_224.pth" if word == "detector.pth" else word for word in words]
                jobs.append([mode, words])
                texts.append(text)
    driver = Path(__file__).with_name("commands_driver.py")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(driver), "jobs.json", "results.json"]
    subprocess.run(command, cwd=folder, env=environment(ROOT, ROOT / "tools"), check=True)
    (status, output), *of_commands = json.loads((folder / "results.json").read_text())
    assert status == 0, output[-3000:]
    return dict(zip(texts, of_commands, strict=True))


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_every_command_has_one_rule(page):
    for command in commands(page):
        rule_of(command)


def test_every_rule_has_a_command():
    unused = [rule.pattern for rule in RULES if not any(re.fullmatch(rule.pattern, text) for text in ALL)]
    assert unused == []
    assert all(rule.reason for rule in RULES if rule.check != "run")
    words = {word for command in ALL.values() for word in command.words}
    assert set(PLACEHOLDERS) | DISTRIBUTIONS <= words


@pytest.mark.parametrize("text", those("run"))
def test_command_runs(text, results):
    status, output = results[text]
    assert status == 0, output[-3000:]


@pytest.mark.parametrize("text", those("parse"))
def test_command_is_understood(text, results):
    if text in results:
        status, output = results[text]
        assert status == 0, output[-3000:]
    files = [word for word in stand_ins(ALL[text]) if word.endswith((".py", ".yaml")) and word != "config.py"]
    assert [file for file in files if "::" not in file and not (ROOT / file).is_file()] == []
    if ALL[text].words[0] == "dinat":
        assert ALL[text].words[1] in cli.COMMANDS


@pytest.mark.parametrize("text", those("install"))
def test_installation_names_what_exists(text):
    """The package with extras that it has, or a name of `DISTRIBUTIONS`, or an address."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    words = [word for word in ALL[text].words[2:] if word not in ("--no-deps", "--no-build-isolation")]
    assert words
    for word in words:
        name, _, extra = word.removesuffix("]").partition("[")
        if name == project["name"]:
            assert not extra or set(extra.split(",")) <= set(project["optional-dependencies"])
        else:
            assert name in DISTRIBUTIONS or name.startswith("git+https://"), f"{word!r} is not known"


@pytest.mark.parametrize("text", those("make"))
def test_make_knows_the_target(text):
    done = subprocess.run(["make", "-n", *ALL[text].words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scripts = re.findall(r"(?:^|\s)((?:tools|mask2former)/\S+\.(?:py|sh))", done.stdout)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


@pytest.mark.parametrize("text", those("known"))
def test_shell_accepts_the_syntax(text):
    assert subprocess.run(["bash", "-n", "-c", text]).returncode == 0
