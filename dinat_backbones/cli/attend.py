"""Draw where a pixel of an image looks, block by block:

    dinat attend IMAGE --config CONFIG --checkpoint CHECKPOINT --at X,Y --out FILE.png [--device cuda|cpu|...]
    dinat attend IMAGE --classifier dinat_mini --checkpoint CHECKPOINT --at X,Y --out FILE.png

CONFIG is a Python file of mmdet or mmseg. Each panel is a block, each row a stage: the image, the pixel (in green), and
the keys that it attends to, the brighter the larger the weight (mean over the heads). With dilation they lie apart.
What is printed says how far apart, and which key has the largest weight. A classifier sees the whole image at its own
size.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import atomic_write
from .common import UnreadableImageError, device_name, stop

PANEL = 240  # width of a panel in pixels
GAP, LABEL = 6, 14


class Attended(NamedTuple):
    """A model's attention for one image."""

    image: Any  # [H, W, 3], uint8, RGB, as the model saw it
    maps: list[Any]  # AttentionMap of each block
    scale: tuple[float, float]  # pixels that the model saw per pixel of the file, horizontally and vertically


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, metavar="IMAGE")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--config", help="of mmdet or mmseg (.py)")
    kind.add_argument("--classifier", help="a published classifier")
    parser.add_argument("--checkpoint", required=True, help="file or http(s) address")
    parser.add_argument("--at", type=_point, required=True, metavar="X,Y", help="the pixel, from the upper left corner")
    parser.add_argument("--out", type=_image_file, required=True, help="file to write, an image")
    parser.add_argument("--device", type=device_name, help="default: cuda if there is one, else cpu")
    args = parser.parse_args(arguments)
    if not args.image.is_file():
        stop(f"{args.image} is not there")
    if args.config and not args.config.endswith(".py"):
        stop(f"--config {args.config}: expected a Python file of mmdet or mmseg")
    try:
        from .predict_openmmlab import read_image

        image = read_image(args.image)
        x, y = args.at
        if not (x < image.shape[1] and y < image.shape[0]):
            stop(f"--at {x},{y}: {args.image} has {image.shape[1]} x {image.shape[0]} pixels")
        see = _detector if args.config else _classifier
        attended = see(args.config or args.classifier, args.checkpoint, args.device, image, args.image)
    except UnreadableImageError as error:
        stop(f"{args.image}: {error}")
    except (OSError, ValueError) as error:
        stop(str(error))
    drawing, lines = draw(attended, (x * attended.scale[0], y * attended.scale[1]))
    print("\n".join(lines))
    with atomic_write(args.out) as partial:
        drawing.save(partial)
    print(f"{args.out} is written")


def _image_file(text: str) -> Path:
    from PIL import Image

    path = Path(text)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"{text!r} does not end as a format of images does, such as .png")
    return path


def _point(text: str) -> tuple[int, int]:
    x, _, y = text.partition(",")
    if not (x.isdecimal() and y.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected X,Y such as 320,200, not {text!r}")
    return int(x), int(y)


def _detector(config: str, checkpoint: str, device: str | None, image: Any, path: Path) -> Attended:
    import torch

    from ..attention_maps import recorded_attention
    from .predict_openmmlab import image_dict, load_model

    _, model, pipeline = load_model(config, checkpoint, device)
    data = pipeline(image_dict(image, path))
    seen = data["inputs"].permute(1, 2, 0).numpy()[..., ::-1]
    with torch.no_grad(), recorded_attention(model) as maps:
        inputs = model.data_preprocessor({key: [value] for key, value in data.items()}, False)["inputs"]
        model.extract_feat(inputs)
    return Attended(seen, maps, (seen.shape[1] / image.shape[1], seen.shape[0] / image.shape[0]))


def _classifier(name: str, checkpoint: str, device: str | None, image: Any, path: Path) -> Attended:
    import numpy as np
    import torch
    from PIL import Image

    from .. import create_classifier, zoo
    from ..attention_maps import attention_maps
    from ..classifier import ROWS

    model = create_classifier(name, pretrained=checkpoint).eval()
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    side = ROWS[name].resolution
    seen = np.asarray(Image.fromarray(image[..., ::-1]).resize((side, side), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(values)[:, None, None] for values in (zoo.IMAGENET_MEAN, zoo.IMAGENET_STD))
    pixels = (torch.from_numpy(seen.copy()).permute(2, 0, 1) - mean) / std
    maps = attention_maps(model, pixels[None].to(next(model.parameters()).device))
    return Attended(seen, maps, (side / image.shape[1], side / image.shape[0]))


def draw(attended: Attended, point: tuple[float, float]) -> tuple[Any, list[str]]:
    """The drawing for the pixel at `point` (x, y) of the image that the model saw, and a line about every block."""
    import numpy as np
    from PIL import Image, ImageDraw

    height, width = attended.image.shape[:2]
    tall = round(PANEL * height / width)
    small = np.asarray(Image.fromarray(np.ascontiguousarray(attended.image)).resize((PANEL, tall))).astype(float)
    stages: list[list[Any]] = []
    for block in attended.maps:  # a stage has maps of one size
        if not stages or stages[-1][0].weights.shape[1:3] != block.weights.shape[1:3]:
            stages.append([])
        stages[-1].append(block)
    longest = max(map(len, stages))
    size = (longest * (PANEL + GAP) + GAP, len(stages) * (tall + LABEL + GAP) + GAP)
    canvas, lines = Image.new("RGB", size, "white"), []
    pen = ImageDraw.Draw(canvas)
    for number, stage in enumerate(stages):
        rows, columns = stage[0].weights.shape[1:3]
        stride = 2 ** round(float(np.log2(max(1.0, width / columns))))
        row, column = min(int(point[1] // stride), rows - 1), min(int(point[0] // stride), columns - 1)
        for place, block in enumerate(stage):
            dense = block.dense(row, column).cpu().numpy()
            # where each pixel of the panel lies on the map
            on_map = [
                np.minimum((np.arange(length) * extent / length // stride).astype(int), count - 1)
                for length, extent, count in ((tall, height, rows), (PANEL, width, columns))
            ]
            heat = (dense / max(dense.max(), 1e-12))[on_map[0]][:, on_map[1]]
            keys = (dense > 0)[on_map[0]][:, on_map[1]]
            shown = small * 0.35
            colour = np.stack([60 + 195 * heat, 40 + 170 * heat**2, 90 * (1 - heat)], -1)
            shown[keys] = 0.2 * shown[keys] + 0.8 * colour[keys]
            shown[(on_map[0] == row)[:, None] & (on_map[1] == column)] = (0, 255, 0)
            corner = (GAP + place * (PANEL + GAP), GAP + LABEL + number * (tall + LABEL + GAP))
            canvas.paste(Image.fromarray(shown.clip(0, 255).astype("uint8")), corner)
            pen.text((corner[0], corner[1] - LABEL), f"{block.name}, dilation {block.dilation}", fill="black")
            y, x = np.unravel_index(dense.argmax(), dense.shape)
            lines.append(
                f"{block.name}: {block.kernel_size} x {block.kernel_size} keys, {block.dilation * stride} pixels apart;"
                f" {dense.max():.1%} at {x * stride},{y * stride}"
            )
    return canvas, lines
