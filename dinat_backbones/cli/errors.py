"""Which errors are those of what a user gave, and how they are told in a sentence.

Whatever else is raised is a fault of a program: it keeps its traceback. With DINAT_TRACEBACK=1 in the environment all
of them do.
"""

import os
import re
import traceback
from types import FrameType, TracebackType
from typing import Any

# What to install where a package is missing, by the package.
_OPENMMLAB = 'pip install "dinat_backbones[openmmlab]"'
INSTALL = {
    "mmengine": _OPENMMLAB,
    "mmcv": _OPENMMLAB,
    "mmdet": _OPENMMLAB,
    "mmseg": _OPENMMLAB,
    "mmpretrain": "pip install onedl-mmpretrain",
    "pycocotools": _OPENMMLAB,
    # the original mmseg and mmengine import these without declaring them
    "ftfy": "pip install ftfy regex",
    "regex": "pip install ftfy regex",
    "pkg_resources": 'pip install "setuptools<81"',
    "PIL": "pip install pillow",
    "torchvision": "pip install torchvision",
    "cityscapesscripts": "pip install cityscapesscripts",
    "safetensors": 'pip install "dinat_backbones[safetensors]"',
    "onnx": 'pip install "dinat_backbones[export]"',
    "onnxscript": 'pip install "dinat_backbones[export]"',
    "onnxruntime": 'pip install "dinat_backbones[export]"',
}
LONGEST = 800  # characters of a message
# Functions of the frameworks below which an error is one of the config or the data: the ends of their files, and names.
_STAGES = (
    ("config", re.compile(r"mmengine/config/config\.py$"), re.compile("")),
    ("config", re.compile(r"mmengine/registry/(build_functions|registry|utils|default_scope)\.py$"), re.compile("")),
    ("config", re.compile(r"mmengine/runner/runner\.py$"), re.compile("build_(?!logger)")),
    ("data", re.compile(r"mmengine/dataset/base_dataset\.py$"), re.compile("prepare_data")),
    ("data", re.compile(r"(mmdet|mmseg|mmpretrain)/evaluation/metrics/"), re.compile("")),
)


def describe(error: BaseException) -> str | None:
    """The sentence for an error, None if it keeps its traceback.

    Told are packages that are missing, files that cannot be read or written, configs that cannot be loaded or built,
    data that cannot be read or evaluated, and checkpoints that do not fit.
    """
    if os.environ.get("DINAT_TRACEBACK", "0") != "0":
        return None
    if isinstance(error, (ImportError, NotImplementedError)) and "pip install" in str(error) and "\n" not in str(error):
        return str(error)  # an adapter has said it
    if isinstance(error, ModuleNotFoundError) and error.name in INSTALL:
        return f"{error.name} is not installed: {INSTALL[error.name]}"
    if re.match(r"Caught \w+ in DataLoader worker", str(error)):  # with the traceback of the worker
        return one_line(f"the data: {str(error).strip().splitlines()[-1]}")
    frames = list(traceback.walk_tb(error.__traceback__))
    stages = [stage for frame, _ in frames if (stage := _stage(frame.f_code))]
    if "data" in stages:
        return one_line(f"the data: {_sample(error.__traceback__)}{_words(error)}")
    if isinstance(error, OSError):
        return one_line(_words(error))
    if "config" in stages:
        return one_line(f"the config: {_part(frames)}{_words(error)}")
    if isinstance(error, RuntimeError) and re.search(r"loading state_dict|in source state_dict", str(error)):
        return one_line(f"the checkpoint does not fit the model: {error}")
    return None


def one_line(text: str) -> str:
    """`text` without line ends, of at most `LONGEST` characters."""
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."


def _stage(code: Any) -> str | None:
    path = code.co_filename.replace(os.sep, "/")
    return next((stage for stage, file, name in _STAGES if file.search(path) and name.match(code.co_name)), None)


def _words(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    name = type(error).__name__
    return str(error) if isinstance(error, OSError) and str(error) else f"{name}: {error}"


def _part(frames: list[tuple[FrameType, int]]) -> str:
    """The part of the config that mmengine's runner was building, such as "optim_wrapper: "."""
    names = [frame.f_code.co_name for frame, _ in frames if frame.f_code.co_filename.endswith("runner.py")]
    parts = [name.removeprefix("build_") for name in names if name.startswith("build_")]
    return f"{parts[-1]}: " if parts else ""


def _sample(tb: TracebackType | None) -> str:
    """The image that a step of a pipeline or a metric was given, from the variables of the innermost such function."""
    for frame, _ in reversed(list(traceback.walk_tb(tb))):
        for name in ("results", "data_info", "data_sample"):
            value = frame.f_locals.get(name)
            if isinstance(value, dict) and isinstance(value.get("img_path"), str):
                return f"{value['img_path']}: "
    return ""
