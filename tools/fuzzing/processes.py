"""Forked commands, and whether the files that they leave are whole."""

import contextlib
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

from dinat_backbones.checkpoint import read


def fork(function: Callable[[], None], folder: Path) -> int:
    """The id of a process that runs `function` in `folder`, its output in a log beside it."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        log = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        function()
        status = 0
    except SystemExit as stopped:
        status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
        if isinstance(stopped.code, str):
            print(stopped.code)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int, seconds: float) -> int | None:
    """The exit status, None if it is still running after that time."""
    end = time.monotonic() + seconds
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def kill(child: int) -> None:
    """End a process that does not end itself."""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def processes_in(folder: Path) -> list[int]:
    """The ids of processes that work in a folder (Linux; none elsewhere)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to somebody else
            if Path(os.readlink(entry)) == folder:
                found.append(int(entry.parent.name))
    return found


def wait_for_processes(folder: Path, seconds: float, what: str) -> None:
    """Wait until no process works in a folder; raise if one still does after that time."""
    end = time.monotonic() + seconds
    while (left := processes_in(folder)) and time.monotonic() < end:
        time.sleep(0.1)
    for process in left:
        os.kill(process, signal.SIGKILL)
    assert not left, f"{what}: processes {left} went on"


def to_the_end(function: Callable[[], None], folder: Path, name: str) -> None:
    """Run to the end; raise unless it ends well."""
    child = fork(function, folder)
    status = wait(child, 600)
    if status is None:
        kill(child)
    said = Path(f"{folder}.log").read_text(errors="replace")[-1500:]
    assert status == 0, f"{name} ended with status {status}: {said}"


def files_of(folder: Path) -> dict[str, str]:
    """The hash of every file that has its final name."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if is_final(path)}
    return {str(name): hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}


def is_final(path: Path) -> bool:
    """Whether it is a file under its final name, not one that a program is still writing or its lock."""
    return path.is_file() and not path.name.startswith(".") and path.suffix not in (".partial", ".lock")


def check_files(folder: Path) -> None:
    """Raise for a file that is not whole."""
    for path in filter(is_final, folder.rglob("*")):
        if "vis_data" in path.parts or path.suffix in (".log", ".py"):
            continue
        try:
            if path.suffix in (".pth", ".safetensors"):
                read(path)
            elif path.suffix == ".pt2":
                torch.export.load(path)
            elif path.suffix in (".png", ".jpg"):
                assert cv2.imread(str(path)) is not None
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.name == "last_checkpoint":
                assert Path(path.read_text()).is_file()
        except Exception as error:
            raise AssertionError(f"{path.relative_to(folder)} is half-written: {error}") from error
