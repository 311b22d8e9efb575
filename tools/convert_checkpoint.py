#!/usr/bin/env python
"""Convert published mmdet 2, mmseg 0, ImageNet and transformers checkpoints to present ones, and back:

    python tools/convert_checkpoint.py SOURCE TARGET
        --to imagenet|mmdet2|mmseg0|mmdet3|mmseg1|huggingface|huggingface-nat
        [--kernel-size K] [--force] [--allow-pickle]

SOURCE is a file or an http(s) address; its layout is recognised. TARGET is a .pth, .pt or .safetensors file. What
became of every entry is printed. The target is written under another name first, so that it is complete or not there.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

import torch

from dinat_backbones.checkpoint import LAYOUTS, convert, read
from dinat_backbones.checkpoint.reading import META

SUFFIXES = (".pth", ".pt", ".safetensors")


def main() -> None:
    """Command line."""
    layouts = "; ".join(f"{name}: {layout.description}" for name, layout in LAYOUTS.items())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="file or http(s) address")
    parser.add_argument("target", type=Path, help=f"file to write: {', '.join(SUFFIXES)}")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help=layouts)
    parser.add_argument("--kernel-size", type=int, metavar="K", help="resize the rpb tables to this kernel size")
    parser.add_argument("--force", action="store_true", help="overwrite the target")
    parser.add_argument("--allow-pickle", action="store_true", help="run code that a trusted source asks for")
    args = parser.parse_args()
    if args.target.suffix not in SUFFIXES:
        parser.error(f"target {args.target}: expected a name that ends in {', '.join(SUFFIXES)}")
    if args.target.exists() and not args.force:
        parser.error(f"target {args.target} exists; name another file or add --force")
    try:
        source = read(args.source, allow_pickle=args.allow_pickle)
        checkpoint, changes = convert(source, args.to, kernel_size=args.kernel_size)
        write(checkpoint, args.target)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"{parser.prog}: {error}")
    for change in changes:
        print(change)
    counts = Counter(change.kind for change in changes)
    summary = ", ".join(f"{counts[kind]} {kind}" for kind in ("kept", "renamed", "resized", "dropped"))
    print(f"{args.target}: {args.target.stat().st_size / 1e6:.1f} MB, layout {args.to}; {summary}")


def write(checkpoint: dict[str, Any], target: Path) -> None:
    """Write a converted checkpoint in the format of the target's suffix, all of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        if target.suffix == ".safetensors":
            _write_safetensors(checkpoint, partial)
        else:
            torch.save(checkpoint, partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _write_safetensors(checkpoint: dict[str, Any], path: Path) -> None:
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs the safetensors package: pip install safetensors") from error
    metadata = {"format": "pt"}
    if "meta" in checkpoint:
        metadata[META] = json.dumps(checkpoint["meta"])
    state = checkpoint.get("state_dict", checkpoint)
    # each tensor with memory of its own, which the format asks for
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)


if __name__ == "__main__":
    main()
