import inspect
import sys
from pathlib import Path

import pytest

from helpers import ROOT, poison  # noqa: F401  # a fixture


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `dinat` with OpenMMLab in this process and in `tmp_path`; returns what it exits with, None at the end.

    Configs are logged and saved without yapf, which formats the same one several times, for a second each.
    """
    import yapf.yapflib.yapf_api
    from mmengine.config import Config
    from mmengine.runner import CheckpointLoader, Runner
    from mmengine.visualization import Visualizer

    from dinat_backbones import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    # what `dinat test` changes for its process
    monkeypatch.setattr(Runner, "load_checkpoint", Runner.load_checkpoint)
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))
    for module in (yapf.yapflib.yapf_api, inspect.getmodule(Config)):  # the latter in older versions of mmengine
        monkeypatch.setattr(module, "FormatCode", lambda text, **settings: (text, True), raising=False)

    def run(*words):
        for visualizer in (Visualizer, *Visualizer.__subclasses__()):  # those of earlier runs write to their folders
            visualizer._instance_dict.clear()
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stopped:
            return stopped.code
        return None

    return run


# Those that take longest, in the order in which they start: one that came last would leave the other cores idle.
LONG_FILES = [
    "test_backbone.py",
    "cli/test_distributed.py",
    "ops/test_triton.py",
    "docs/test_snippets.py",
    "cli/test_export.py",
    "ops/test_op.py",
    "adapters/test_mmcv_ext_startup.py",
    "configs/test_recipes.py",
    "cli/test_train.py",
    "configs/test_configs.py",
    "ops/test_flops.py",
    "adapters/test_swap.py",
    "docs/test_tutorial.py",
    "adapters/test_mmcv_ext_models.py",
    "ops/test_cpu.py",
    "docs/test_commands.py",
    "test_classifier.py",
    "adapters/test_mmcv_ext.py",
    "adapters/test_huggingface.py",
    "adapters/test_panoptic.py",
    "ops/test_callers.py",
    "tools/test_fuzz.py",
    "adapters/test_huggingface_models.py",
    "cli/test_predict.py",
    "adapters/test_swap_catalogue.py",
]


def pytest_configure(config):
    config.option.loadscopereorder = False  # pytest-xdist 3.8 would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    first = {ROOT / "tests" / name: number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: first.get(item.path, len(first)))


whole_files = set()  # skipped when they were collected: (path, line, reason)


def pytest_collectreport(report):
    if report.skipped:
        whole_files.add(tuple(report.longrepr))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, which hands on the skips of tests only
        session.config.workeroutput["whole_files"] = list(whole_files)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    whole_files.update(map(tuple, getattr(node, "workeroutput", {}).get("whole_files", [])))


def pytest_terminal_summary(terminalreporter):
    skipped = [tuple(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    skipped += sorted(whole_files.difference(skipped))
    terminalreporter.section("not run")
    for where, line, reason in skipped:
        terminalreporter.write_line(f"{Path(where).name}:{line}: {reason}")
    terminalreporter.write_line(f"{len(skipped)} test(s) were not run" if skipped else "everything was run")
