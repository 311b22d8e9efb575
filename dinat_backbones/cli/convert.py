"""Convert published mmdet 2, mmseg 0, detectron2, transformers and ImageNet checkpoints to any other of these layouts:

    dinat convert SOURCE TARGET
        --to imagenet|mmdet2|mmseg0|mmdet3|mmseg1|detectron2|huggingface|huggingface-nat
        [--kernel-size K] [--things I ...] [--force] [--allow-pickle]

SOURCE is a file or an http(s) address; its layout is recognised. TARGET is a .pth, .pt or .safetensors file; for
detectron2 .pth, .pt or .pkl, a pickle of numpy arrays. Prints for every entry whether it was kept, renamed,
resized or dropped. The target is complete or absent, also after an interruption.
"""

import argparse
import copy
import json
import pickle
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import LAYOUTS, convert, read
from ..checkpoint.reading import META
from ..files import atomic_write
from .common import stop

SUFFIXES = (".pth", ".pt", ".safetensors", ".pkl")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    layouts = "; ".join(f"{name}: {layout.description}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="file or http(s) address")
    parser.add_argument("target", type=Path, help=f"file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help=layouts)
    parser.add_argument("--kernel-size", type=int, metavar="K", help="resize the rpb tables to this kernel size")
    parser.add_argument(
        "--things",
        type=int,
        nargs="*",
        metavar="I",
        help="of a Mask2Former: the classes, from 0 in the order of the data set, that mmdet counts first because they "
        "are things; by default those of ADE20K for 150 classes and of Cityscapes for 19, otherwise the first ones",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    parser.add_argument("--allow-pickle", action="store_true", help="run code that a trusted source asks for")
    args = parser.parse_args(arguments)
    if args.target.suffix not in SUFFIXES:
        parser.error(f"target {args.target}: expected a name that ends in {', '.join(SUFFIXES)}")
    if args.to == "detectron2" and args.target.suffix == ".safetensors":
        parser.error(f"target {args.target}: detectron2 reads .pth and .pkl files")
    if args.to != "detectron2" and args.target.suffix == ".pkl":
        parser.error(f"target {args.target}: only detectron2 reads .pkl files")
    if args.target.exists() and not args.force:
        parser.error(f"target {args.target} exists; name another file or add --force")
    try:
        source = read(args.source, allow_pickle=args.allow_pickle)
        checkpoint, changes = convert(source, args.to, kernel_size=args.kernel_size, things=args.things)
        write(checkpoint, args.target)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        stop(str(error))
    for change in changes:
        print(change)
    counts = Counter(change.kind for change in changes)
    kinds = ("kept", "renamed", "resized", "dropped", *(kind for kind in ("reordered", "added") if counts[kind]))
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB, layout {args.to}; {summary}")


def write(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a converted checkpoint in the format of the target's suffix, all of it or nothing.

    Raises:
        ModuleNotFoundError: a .safetensors target without the safetensors package.
        OSError: the target cannot be written.
    """
    with atomic_write(target) as partial:
        if target.suffix == ".safetensors":
            _write_safetensors(checkpoint, partial)
        elif target.suffix == ".pkl":
            _write_pickle(checkpoint, partial)
        else:
            torch.save(checkpoint, partial)


def _write_pickle(checkpoint: dict[str, Any], path: Path) -> None:
    """Arrays of numpy, as in detectron2's own files."""
    state = copy.copy(checkpoint["model"])  # keeps `_metadata`, from which Mask2Former knows the version
    for name, tensor in state.items():
        state[name] = tensor.numpy()
    with open(path, "wb") as file:
        pickle.dump(checkpoint | {"model": state}, file)


def _write_safetensors(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a .safetensors target needs safetensors: pip install safetensors") from error
    metadata = {"format": "pt"}
    if "meta" in checkpoint:
        metadata[META] = json.dumps(checkpoint["meta"])
    state = checkpoint.get("state_dict", checkpoint)
    # the format does not allow tensors that share memory
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)
