"""The `dinat` command, the scripts in tools/ that start it, and `dinat info`."""

import subprocess
import sys

import command
import pytest
import torch

from dinat_backbones import cli, ops
from dinat_backbones.cli import info
from helpers import ROOT, environment

SCRIPTS = {
    "train": "train",
    "test": "test",
    "predict": "predict",
    "convert_checkpoint": "convert",
    "export": "export",
    "get_flops": "flops",
    "validate": "validate",
    "prepare_datasets": "prepare",
    "make_shapes": "shapes",
}
FRAMEWORKS = ("mmcv", "mmengine", "mmdet", "mmseg", "detectron2", "transformers", "timm", "torchvision")


def test_help_lists_the_commands_and_imports_no_framework():
    code = "import sys\nfrom dinat_backbones.cli import main\ntry:\n    main(['--help'])\nfinally:\n"
    code += f"    print([name for name in {FRAMEWORKS} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr
    *text, imported = run.stdout.splitlines()
    assert imported == "[]"
    assert [line.split()[0] for line in text if line.startswith("  ")] == list(cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_manual(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", sys.argv)
    if name == "validate":
        pytest.importorskip("torchvision", reason="torchvision is not installed: pip install torchvision")
    if name in ("prepare", "shapes"):
        pytest.importorskip("pycocotools", reason="pycocotools is not installed: pip install pycocotools")
    try:
        cli.main([name, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
    assert f"dinat {name}" in capsys.readouterr().out


@pytest.mark.parametrize("words, status", [([], 2), (["nothing"], 2), (["--help"], 0)])
def test_exit_status(words, status, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == status
    captured = capsys.readouterr()
    assert "train" in (captured.err if status else captured.out)


def test_scripts_of_a_checkout_start_the_commands(monkeypatch):
    started = []
    monkeypatch.setattr(cli, "run", started.append)
    for script, name in SCRIPTS.items():
        text = (ROOT / "tools" / f"{script}.py").read_text()
        assert text.endswith(f'from command import run\n\nif __name__ == "__main__":\n    run("{name}")\n')
        command.run(name)
    assert started == list(SCRIPTS.values())
    assert {*SCRIPTS.values(), "attend", "info", "config"} == {*cli.COMMANDS}


def test_scripts_say_how_to_install_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "dinat_backbones", None)
    with pytest.raises(SystemExit, match="the package is not installed; in the checkout, run: pip install -e .$"):
        command.run("train")


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["dinat shapes"])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "dinat_backbones.cli.shapes", raising=False)
    with pytest.raises(
        SystemExit, match=r'^dinat shapes: pycocotools is not installed: pip install "dinat_backbones\['
    ):
        cli.run("shapes")


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ModuleNotFoundError("No module", name="mmpretrain"),
            "mmpretrain is not installed: pip install onedl-mmpretrain",
        ),
        (
            ModuleNotFoundError("No module", name="pkg_resources"),
            'pkg_resources is not .*: pip install "setuptools<81"',
        ),
        (ImportError("mmcv 1.7.2 is installed: pip install mmcv", name="mmcv"), "mmcv 1.7.2 is installed: pip install"),
        (NotImplementedError("no operator: pip install mmcv"), "no operator: pip install mmcv"),
        (NotADirectoryError(20, "Not a directory", "file/out"), "file/out: Not a directory$"),
        (OSError("CUDA library not found"), "CUDA library not found$"),
        (
            RuntimeError("Error(s) in loading state_dict for M:\n\tmissing"),
            "the checkpoint does not fit .* for M: missing$",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_one_sentence(monkeypatch, error, message):
    def fail():
        raise error

    monkeypatch.setattr(sys, "argv", ["dinat info"])
    monkeypatch.setattr(info, "main", fail)
    with pytest.raises(SystemExit, match=f"^dinat info: {message}"):
        cli.run("info")


OTHERS = [NotImplementedError("no such thing"), ImportError("cannot import name 'x'"), RuntimeError("sizes 3 and 4")]


@pytest.mark.parametrize("error", [*OTHERS, FileNotFoundError("with DINAT_TRACEBACK=1")])
def test_other_errors_keep_their_traceback(monkeypatch, error):
    def fail():
        raise error

    if error not in OTHERS:
        monkeypatch.setenv("DINAT_TRACEBACK", "1")
    monkeypatch.setattr(info, "main", fail)
    with pytest.raises(type(error), match=str(error)):
        cli.run("info")


# --------------------------------------------------------------------------------------------------------------- info


def lines(capsys):
    """What `dinat info` prints, by name."""
    info.main([])
    text = capsys.readouterr().out
    return {line[2:20].strip(): line[20:] for line in text.splitlines() if line.startswith("  ")}


def test_info(capsys):
    found = lines(capsys)
    assert found["torch"].startswith(torch.__version__)
    assert found["cpu kernel"].split(":")[0] in ("amx_bf16", "avx512_bf16", "avx512", "avx2", "baseline", "none")
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    assert {f"{name} on {device}" for name in ops.BACKENDS for device in devices} <= found.keys()
    assert found["tiled on cpu"] == found["reference on cpu"] == "yes"
    # every framework is named, whether it is installed or not
    assert {"mmdet", "mmseg", "detectron2", "transformers", "timm", "mmcv._ext"} <= found.keys()
    assert all(found.values())


def test_info_gives_all_reasons(monkeypatch, capsys):
    monkeypatch.setattr(ops.BACKENDS["tiled"], "unsupported", lambda *call: ["the first reason", "the second one"])
    assert lines(capsys)["tiled on cpu"] == "no: the first reason; the second one"


@pytest.mark.parametrize(
    "extension, expected",
    [
        (dict(STAND_IN=True), "stand-in of dinat_backbones"),
        (dict(__file__="/somewhere/_ext.so"), "compiled (/somewhere/_ext.so)"),
        (None, "none: "),
    ],
)
def test_info_tells_which_operators_of_mmcv_are_in_use(monkeypatch, extension, expected):
    pytest.importorskip("mmcv", reason="mmcv is not installed: pip install 'dinat_backbones[openmmlab]'")
    module = type(sys)("mmcv._ext") if extension is not None else None
    for name, value in (extension or {}).items():
        setattr(module, name, value)
    monkeypatch.setitem(sys.modules, "mmcv._ext", module)
    assert info.mmcv_operators().startswith(expected)


def test_info_without_frameworks(monkeypatch):
    monkeypatch.setattr(info, "version", missing_distribution)
    for name in [name for name in sys.modules if name.split(".")[0] in ("mmengine", "mmcv")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("mmengine", "mmcv"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dinat_backbones.adapters.openmmlab", raising=False)
    found = dict(info.frameworks())
    assert found["mmcv._ext"] == "none: mmengine is not installed"
    assert found["mmcv"] == found["mmengine"] == "not installed"


def missing_distribution(name):
    raise info.PackageNotFoundError(name)
