import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dinat_backbones.ops import IMPLEMENTATIONS

# The implementations that run any call on any machine; the others have files of their own.
EVERYWHERE = [name for name in IMPLEMENTATIONS if name not in ("natten", "triton")]
GOLDEN = Path(__file__).parent / "data" / "golden"


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """A golden file's `meta` and arrays (outputs and gradients of the original code with natten 0.14.6)."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def fill_by_name(model: torch.nn.Module) -> torch.nn.Module:
    """The weights of the golden runs: every entry drawn from a generator seeded by its published name alone."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("rpb"):
            value = 0.5 * noise
        elif "gamma" in name:
            value = 0.3 + 0.1 * noise
        elif tensor.dim() == 1:
            value = float(name.endswith("weight")) + 0.1 * noise
        else:
            value = noise / tensor[0].numel() ** 0.5
        tensor.copy_(value)
    model.load_state_dict(state)
    return model


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
