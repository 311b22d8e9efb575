"""Draw the predictions of a detector, a segmentor or a classifier on images:

    dinat predict IMAGE|FOLDER --config CONFIG --checkpoint CHECKPOINT --out FOLDER
                  [--score 0.3] [--task panoptic|instance|semantic] [--device cuda|cpu|...] [--force]
                  [--backbone ARCH] [--dilations SETTING] [--import MODULE]

CONFIG is a Python file of mmdet, mmseg or mmpretrain, or a YAML file of Detectron2. Draws instances with boxes and
masks, panoptic or semantic maps, or the class, whatever the model predicts; --task chooses one of Mask2Former in
Detectron2, by default the first that the config turns on, and --import names a module that registers its data sets,
which have the names of the classes (without names they are numbered). Images keep their names, and their places below
FOLDER; of a GIF the first frame is drawn, as NAME.gif.png. Images that the out folder already has are skipped without
--force, so that an interrupted run continues where it stopped. An image that cannot be read is reported, and the others
are done.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from .common import UnreadableImageError, device_name, import_modules, stop
from .config import add_backbone_options, with_backbone_written

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
TASKS = ("panoptic", "instance", "semantic")

# Draws the predictions for an image, given its path and the path of the drawing, and returns a summary of what was
# found. Raises UnreadableImageError.
Predictor = Callable[[Path, Path], str]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, metavar="IMAGE|FOLDER", help=f"folders are searched for {SUFFIXES}")
    parser.add_argument("--config", required=True, help="of mmdet or mmseg (.py), or of Detectron2 (.yaml)")
    parser.add_argument("--checkpoint", required=True, help="file or http(s) address")
    parser.add_argument("--out", type=Path, required=True, help="folder for the drawn images")
    parser.add_argument("--score", type=float, default=0.3, help="least score of an instance (default: %(default)s)")
    parser.add_argument("--task", choices=TASKS, help="which result of Mask2Former in Detectron2 to draw")
    parser.add_argument("--device", type=device_name, help="default: cuda if there is one, else cpu")
    parser.add_argument("--force", action="store_true", help="draw again what is in the out folder")
    parser.add_argument(
        "--import", dest="imports", action="append", default=[], metavar="MODULE", help="registers data sets (.yaml)"
    )
    add_backbone_options(parser)
    args = parser.parse_args(arguments)
    if args.backbone or "::" in args.config:
        args.config = with_backbone_written(args, args.config)
    draw_all(args, lambda: load_predictor(args))


def load_predictor(args: argparse.Namespace) -> Predictor:
    """The predictor of the framework that the config belongs to.

    Raises:
        SystemExit: the config does not exist, or its framework is not installed.
        FileNotFoundError, ValueError: the checkpoint does not exist or does not fit the model.
    """
    if Path(args.config).suffix in (".yaml", ".yml"):
        from . import predict_detectron2

        import_modules(args.imports)
        return predict_detectron2.load_predictor(args.config, args.checkpoint, args.device, args.score, args.task)
    if args.imports:
        raise ValueError(f"--import is for YAML configs of Detectron2; {args.config} has custom_imports for that")
    if args.task:
        raise ValueError(f"--task {args.task} is for YAML configs of Detectron2; {args.config} has one task")
    from . import predict_openmmlab

    return predict_openmmlab.load_predictor(args.config, args.checkpoint, args.device, args.score)


def draw_all(args: argparse.Namespace, load: Callable[[], Predictor]) -> None:
    """Draw all images of the command line; `load` is called if there is anything to draw.

    Raises:
        SystemExit: no images, what `load` raises, images that could not be read.
    """
    root = args.images if args.images.is_dir() else args.images.parent
    images = find_images(args.images)
    if not images:
        stop(f"{args.images}: {'no images there' if args.images.is_dir() else 'not there'}")
    targets = {path: args.out / drawing_name(path.relative_to(root)) for path in images}
    if any(target.resolve() == path.resolve() for path, target in targets.items()):
        stop(f"--out {args.out} is where the images are; name another folder")
    to_do = [path for path in images if args.force or not targets[path].exists()]
    if len(to_do) < len(images):
        print(f"{len(images) - len(to_do)} of {len(images)} images are there already (--force draws them again)")
    if not to_do:
        return
    try:
        predict = load()
    except (OSError, ValueError) as error:
        stop(str(error))
    failed = []
    for number, path in enumerate(to_do, 1):
        begin = time.perf_counter()
        try:
            found = predict(path, targets[path])
        except UnreadableImageError as error:
            failed.append(path)
            found = f"NOT READ: {error}"
        print(
            f"[{number}/{len(to_do)}] {path.relative_to(root)}: {found}, {time.perf_counter() - begin:.1f} s",
            flush=True,
        )
    if failed:
        sys.exit(f"{len(failed)} of {len(to_do)} images could not be read")


def drawing_name(path: Path) -> Path:
    """Where the drawing of an image goes: under its own name, but for GIFs, which few programs write."""
    return path.with_name(f"{path.name}.png") if path.suffix.lower() == ".gif" else path


def find_images(path: Path) -> list[Path]:
    """The image itself, or all images anywhere below a folder, sorted."""
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))


def count_labels(labels: Iterable[int], names: Sequence[str]) -> str:
    """Such as "2 circle, 1 ring": how often each label occurs, in the order of the labels."""
    return ", ".join(f"{count} {names[label]}" for label, count in sorted(Counter(labels).items()))
