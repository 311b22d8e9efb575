import sys
from pathlib import Path

import pytest

from helpers import poison  # noqa: F401  # a fixture


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Runs `dinat` with OpenMMLab in this process and in `tmp_path`; returns what it exits with, None at the end."""
    from mmengine.runner import CheckpointLoader, Runner
    from mmengine.visualization import Visualizer

    from dinat_backbones import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    # what `dinat test` changes for its process
    monkeypatch.setattr(Runner, "load_checkpoint", Runner.load_checkpoint)
    monkeypatch.setattr(CheckpointLoader, "_schemes", dict(CheckpointLoader._schemes))

    def run(*words):
        for visualizer in (Visualizer, *Visualizer.__subclasses__()):  # those of earlier runs write to their folders
            visualizer._instance_dict.clear()
        try:
            cli.main([str(word) for word in words])
        except SystemExit as stopped:
            return stopped.code
        return None

    return run


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
