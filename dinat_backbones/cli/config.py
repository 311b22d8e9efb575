"""Write a config of mmdet or mmseg with its backbone replaced:

    dinat config CONFIG --backbone ARCH --out FILE.py [--dilations SETTING] [--checkpoint-backbone FILE|none]
                        [--keep-optimizer]

CONFIG is a file or a packaged name such as mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py. FILE.py has everything in it
and needs nothing but its `custom_imports`; what differs from CONFIG is printed. `dinat train`, `test`, `predict` and
`flops` take the same options and do the same without a file.
"""

import argparse
import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import atomic_write
from .common import load_config, resolve_config, stop


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--out", type=Path, required=True, help="the new config, a .py file")
    add_backbone_options(parser, required=True)
    args = parser.parse_args(arguments)
    if args.out.suffix != ".py":
        stop(f"--out {args.out}: expected a name that ends in .py")
    swapped, changed = swap_backbone(args, args.config)
    with atomic_write(args.out) as partial:
        swapped.dump(str(partial))
    print("\n".join([*changed, f"{args.out} is written"]))


def add_backbone_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """The options for another backbone, of `dinat config`, `train`, `test`, `predict` and `flops`."""
    parser.add_argument(
        "--backbone", metavar="ARCH", required=required, help="dinat_tiny, nat_base, dinat_s_large, ..."
    )
    parser.add_argument("--dilations", metavar="SETTING", help="such as coco or ade20k-512 (default: that of the task)")
    parser.add_argument(
        "--checkpoint-backbone",
        metavar="FILE",
        help='weights of the backbone, file or address; "none" for random ones (default: the published ImageNet ones)',
    )
    parser.add_argument("--keep-optimizer", action="store_true", help="leave optim_wrapper and param_scheduler alone")


def swap_backbone(args: argparse.Namespace, config: str) -> tuple[Any, list[str]]:
    """A config with the backbone `args.backbone`, and what changed, in lines.

    Raises:
        SystemExit: the config does not exist, or its model is tied to its backbone.
    """
    cfg = load_config(config, import_custom_modules=False)
    from ..adapters.openmmlab.swap import changes, with_backbone

    try:
        swapped = with_backbone(
            cfg,
            args.backbone,
            dilations=args.dilations,
            checkpoint=args.checkpoint_backbone,
            keep_optimizer=args.keep_optimizer,
        )
    except ValueError as error:
        stop(f"--backbone {args.backbone} with {config}: {error}")
    return swapped, list(changes(cfg, swapped))


def with_backbone_written(args: argparse.Namespace, config: str) -> str:
    """The path of a config, or with `args.backbone` that of a temporary file with the swapped config."""
    if args.backbone is None:
        return str(resolve_config(config))
    swapped, changed = swap_backbone(args, config)
    if os.environ.get("RANK", "0") == "0":
        print("\n".join(changed))
    folder = Path(tempfile.mkdtemp(prefix="dinat-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # the scripts of the frameworks name the work folder after the file
    path = folder / f"{Path(config.rpartition('::')[2]).stem}_{args.backbone}.py"
    swapped.dump(str(path))
    return str(path)


def replace_config(words: Sequence[str]) -> list[str]:
    """The arguments of a framework's script without those of `add_backbone_options`, with the config replaced as they
    say and packaged names resolved."""
    parser = argparse.ArgumentParser(prog=sys.argv[0], add_help=False, allow_abbrev=False)
    add_backbone_options(parser)
    args, rest = parser.parse_known_args(list(words))
    names = [word for word in rest if word.endswith(".py") and not word.startswith("-") and "=" not in word]
    config = names[0] if names else None
    if config is None:
        if args.backbone is not None:
            stop("--backbone needs a config")
        return rest
    path = with_backbone_written(args, config)
    return [path if word == config else word for word in rest]
