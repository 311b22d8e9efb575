"""What several commands share: messages, progress, configs and where they are."""

import multiprocessing
import os
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from ..zoo import find_config


class UnreadableImageError(Exception):
    """A file is not an image, or a damaged one."""


def stop(message: str) -> NoReturn:
    """End the process with status 1 and one sentence that begins with the command's name."""
    sys.exit(f"{sys.argv[0]}: {message}")


def positive(text: str) -> int:
    """For argparse: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r}: expected a whole number of at least 1")
    return int(text)


def device_name(text: str) -> str:
    """For argparse: the name of a device that torch has here, such as cpu or cuda:1."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        reason = str(error).partition("\n")[0]
        raise ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return text


def import_modules(names: Iterable[str]) -> None:
    """Import modules by name, such as those that register data sets; ValueError where there is none."""
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # something that it needs
            raise ValueError(
                f"--import {name}: no such module; PYTHONPATH=FOLDER in front of the command names where {name} is"
            ) from error


def print_progress(line: str) -> None:
    """Print a line that ends in "DONE/TOTAL"; on a terminal it overwrites the line before, up to the last one."""
    done, _, total = line.rpartition(" ")[2].partition("/")
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if done == total else "", flush=True)
    else:
        print(line, flush=True)


def parallel_map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    label: str,
    workers: int,
    progress: Callable[[str], None] = print_progress,
) -> list[Any]:
    """The results of `function` for each item in order, computed in `workers` processes, or in this one with 1.

    `progress` is called about 20 times with a line "LABEL: DONE/TOTAL". An interruption cancels the remaining items.
    """
    items, results = list(items), []
    chunk = max(1, min(32, len(items) // (4 * workers)))
    pool = ProcessPoolExecutor(workers, initializer=_end_after_parent) if workers > 1 else None
    try:
        for result in pool.map(function, items, chunksize=chunk) if pool else map(function, items):
            results.append(result)
            if len(results) == len(items) or len(results) % max(1, len(items) // 20) == 0:
                progress(f"{label}: {len(results)}/{len(items)}")
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return results


def _end_after_parent() -> None:
    """End this process of a pool soon after its parent was killed; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def resolve_config(name: str) -> Path:
    """The path of a config: as `zoo.find_config`, and for "mmdet::..." and "mmseg::..." that of the packaged config.

    mmengine resolves such names through the distributions mmdetection and mmsegmentation, which the maintained
    continuations of these packages are not.

    Raises:
        SystemExit: the file does not exist, or the package is not installed.
    """
    package, separator, rest = name.rpartition("::")
    path = find_config(name)
    if separator:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            stop(f'{package} is not installed: pip install "dinat_backbones[openmmlab]"')
        path = Path(spec.origin).parent / ".mim" / "configs" / rest
    if not path.is_file():
        stop(f"config {name} is not there")
    return path


def load_config(name: str, **keywords: Any) -> Any:
    """mmengine's `Config.fromfile` for a path or a packaged name, see `resolve_config`.

    Raises:
        SystemExit: the file does not exist, or mmengine is not installed.
        ImportError: mmcv is missing, of another version than 2, or compiled for another torch.
    """
    path = resolve_config(name)
    try:
        from mmengine.config import Config
    except ModuleNotFoundError as error:
        if error.name != "mmengine":
            raise
        stop('mmengine is not installed: pip install "dinat_backbones[openmmlab]"')
    from ..adapters import mmcv_ext, openmmlab  # noqa: F401  # before mmdet and mmseg: mmcv's operators

    mmcv_ext.check_installation()

    return Config.fromfile(str(path), **keywords)
