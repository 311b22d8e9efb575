"""README of each config folder and the drawings of the attention pattern, from dinat_backbones/zoo.

`documents(root)` returns the content of every file by its path; tools/zoo_table.py writes them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from dinat_backbones import zoo
from dinat_backbones.ops.backends import reference

MARK = "<!-- written by tools/zoo_table.py from dinat_backbones/zoo -->"
FRAMEWORKS = {"mmdet": "MMDetection", "mmseg": "MMSegmentation"}
LAYOUTS = {"mmdet": "mmdet3", "mmseg": "mmseg1"}  # of `dinat convert`
CITATIONS = {
    "NAT": """@inproceedings{hassani2023neighborhood,
  title     = {Neighborhood Attention Transformer},
  author    = {Ali Hassani and Steven Walton and Jiachen Li and Shen Li and Humphrey Shi},
  booktitle = {CVPR},
  year      = {2023},
  url       = {https://arxiv.org/abs/2204.07143}
}""",
    "DiNAT": """@article{hassani2022dilated,
  title   = {Dilated Neighborhood Attention Transformer},
  author  = {Ali Hassani and Humphrey Shi},
  journal = {arXiv:2209.15001},
  year    = {2022},
  url     = {https://arxiv.org/abs/2209.15001}
}""",
}
PAPERS = {
    "NAT": "[Neighborhood Attention Transformer](https://arxiv.org/abs/2204.07143)",
    "DiNAT": "[Dilated Neighborhood Attention Transformer](https://arxiv.org/abs/2209.15001)",
    "DiNAT_s": "[Dilated Neighborhood Attention Transformer](https://arxiv.org/abs/2209.15001)",
}
DESCRIPTIONS = {
    "NAT": """Each pixel of a feature map attends to the 7x7 pixels around it, with a learned bias for every relative
position. At borders the window shifts inwards, so that every pixel has 49 keys. The cost grows linearly with the size
of the image, and any size works. Overlapping 3x3 convolutions tokenize the image and halve the map between the four
stages, which have strides 4, 8, 16 and 32.""",
    "DiNAT": """NAT in which every other block is dilated: its pixels attend to 7x7 pixels that lie `dilation` apart.
The blocks between them have dilation 1, so that local detail and wide context alternate at the same cost. The
dilations belong to a task and an image size; the widest one of a stage makes the window about as large as the map.
Where a map is smaller than kernel size times dilation, it is padded with zeros, and the padding takes part in the
attention, as in the original code.""",
    "DiNAT_s": """The attention of DiNAT in the frame of Swin: 4x4 patches, 2x2 merging between the stages, Swin's
depths and widths. It shows what dilated neighborhood attention gives where Swin has shifted windows.""",
}


def documents(root: Path) -> dict[Path, str]:
    """Content by path, of every README in configs/ and every drawing in docs/images.

    Args:
        root: the checkout.
    """
    files = {}
    for folder in sorted({row.config.rpartition("/")[0] for row in zoo.rows() if getattr(row, "config", None)}):
        files[root / "configs" / folder / "README.md"] = readme(
            folder, sorted(path.name for path in (root / "configs" / folder).glob("*.py"))
        )
        name, maps, title = pattern_of(folder)
        files[root / "docs" / "images" / name] = drawing(*maps, title=title)
    return files


# ------------------------------------------------------------------------------------------------------------- README


def readme(folder: str, configs: list[str]) -> str:
    """The README of a folder of configs.

    Args:
        folder: "mmdet/dinat" for example.
        configs: names of its files; those without a published row are listed without results.
    """
    framework = folder.split("/")[0]
    rows = [row for row in zoo.rows() if getattr(row, "config", None) and row.config.rpartition("/")[0] == folder]
    family = rows[0].family
    name, _, title = pattern_of(folder)
    example = Path(rows[0].config).name
    others = sorted(set(configs) - {Path(row.config).name for row in rows})
    sections = [
        f"# {family} in {FRAMEWORKS[framework]}\n\n{MARK}\n\n> {PAPERS[family]}\n\n{DESCRIPTIONS[family]}\n",
        f"![{title}](../../../docs/images/{name})\n",
        *(f"## {heading}\n\n{table(head, lines)}" for heading, head, lines in _tables(rows)),
        *(["## Without published results\n\n" + "".join(f"- [{name}]({name})\n" for name in others)] if others else []),
        "Parameters are in millions and MACs in 10^9, as published. The checkpoints are those of the original release. "
        "`init_cfg`\ntakes a backbone's weights from them as they are; `dinat convert` rewrites a whole model "
        f"for this framework\n(`--to {LAYOUTS[framework]}`).\n",
        f"## Use\n\n```bash\ndinat train configs/{folder}/{example}\n"
        f"dinat convert SOURCE.pth CHECKPOINT.pth --to {LAYOUTS[framework]}\n"
        f"dinat test configs/{folder}/{example} CHECKPOINT.pth\n```\n",
        f"## Citation\n\n```bibtex\n{CITATIONS[family.partition('_')[0]]}\n```\n",
    ]
    return "\n".join(sections)


def _tables(rows: list[Any]) -> Iterator[tuple[str, tuple[str, ...], Iterable[tuple]]]:
    """Heading, column names and lines of each kind of row."""
    detection = [row for row in rows if isinstance(row, zoo.Detection)]
    for detector, words in (("mask_rcnn", "Mask R-CNN"), ("cascade_mask_rcnn", "Cascade Mask R-CNN")):
        lines = [(r.arch, r.params_m, r.gmacs, r.box_ap, r.mask_ap, *_links(r)) for r in detection
                 if r.detector == detector]  # fmt: skip
        if lines:
            columns = ("backbone", "params (M)", "MACs (G)", "box AP", "mask AP", "config", "checkpoint")
            yield f"COCO, {words}, 3x", columns, lines
    segmentation = [row for row in rows if isinstance(row, zoo.Segmentation)]
    if segmentation:
        yield (
            "ADE20K, UPerNet, 160k iterations",
            ("backbone", "crop", "params (M)", "MACs (G)", "mIoU", "mIoU, multi-scale", "config", "checkpoint"),
            [(r.arch, r.size, r.params_m, r.gmacs, r.miou_single_scale, r.miou_multi_scale, *_links(r))
             for r in segmentation],
        )  # fmt: skip
    mask2former = [row for row in rows if isinstance(row, zoo.Mask2Former)]
    if mask2former:
        yield (
            "Mask2Former",
            ("data and task", "backbone", "params (M)", "MACs (G)", "PQ", "mask AP", "mIoU", "mIoU, multi-scale",
             "config", "checkpoint"),
            [(r.name, r.arch, r.params_m, r.gmacs, r.pq, r.ap, r.miou, r.miou_multi_scale, *_links(r))
             for r in mask2former],
        )  # fmt: skip


def _links(row: Any) -> tuple[str, str]:
    return f"[config]({Path(row.config).name})", f"[{row.checkpoint.rpartition('.')[2]}]({row.checkpoint})"


def table(head: tuple[str, ...], lines: Iterable[tuple]) -> str:
    """A table in Markdown; None becomes an empty cell."""
    rows = [head, ("---",) * len(head), *lines]
    return "".join(f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |\n" for row in rows)


# ----------------------------------------------------------------------------------------------------------- drawings

CELL, GAP, TOP = 5, 24, 40  # pixels
COLOURS = ("#d95f02", "#1b9e77", "#7570b3")


def pattern_of(folder: str) -> tuple[str, tuple[tuple[int, int], int, list[int]], str]:
    """File name, arguments of `drawing` and caption of the pattern that the models of a folder have in stage 3."""
    framework, family = folder.split("/")
    setting, image, (height, width) = {
        "mmdet": ("coco", "800x1280", (50, 80)),
        "mmseg": ("ade20k-512", "512x512", (32, 32)),
    }[framework]
    arch = next(arch for arch in zoo.ARCHS.values() if arch.family.lower() == family)
    blocks = zoo.dilations(arch.name, setting)
    dilations = sorted(set(blocks[2])) if blocks else [1]
    name = f"attention-{setting if blocks else f'nat-{image}'}.svg"
    words = f"dilation {', '.join(map(str, dilations))}"
    title = f"Windows of three queries in stage 3 at {image} (stride 16, {height}x{width}): {words}"
    return name, ((height, width), arch.kernel_size, dilations), title


def drawing(size: tuple[int, int], kernel_size: int, dilations: list[int], title: str) -> str:
    """The keys of an inner, an edge and a corner query, a panel per dilation, as SVG.

    Args:
        size: height and width of the map.
        kernel_size: of the window.
        dilations: one panel each.
        title: text above the panels.
    """
    height, width = size
    columns = min(len(dilations), 2)
    rows = -(-len(dilations) // columns)
    panel = (width * CELL + GAP, height * CELL + GAP + 8)
    total = (max(columns * panel[0] + GAP, 8 * len(title)), rows * panel[1] + TOP + GAP)
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total[0]}" height="{total[1]}" '
        f'viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif" font-size="13">',
        f"<title>{title}</title>",
        f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>',
        f'<text x="{GAP}" y="24" fill="#222222">{title}</text>',
    ]
    for index, dilation in enumerate(dilations):
        left, top = GAP + index % columns * panel[0], TOP + GAP + index // columns * panel[1]
        shapes.append(f'<text x="{left}" y="{top - 6}" fill="#222222">dilation {dilation}</text>')
        shapes.append(_rectangle(left, top, width, height, "#f0f0f0"))
        queries = ((height // 2, width // 2), (0, width // 5), (height - 1, width - 1))
        for (row, column), colour in zip(queries, COLOURS, strict=True):
            keys = [reference.window(length, kernel_size, dilation, torch.device("cpu"))[0] for length in size]
            cells = "".join(
                f"M{left + x * CELL} {top + y * CELL}h{CELL}v{CELL}h-{CELL}z"
                for y in keys[0][row].tolist()
                for x in keys[1][column].tolist()
            )
            shapes.append(f'<path d="{cells}" fill="{colour}" fill-opacity="0.6"/>')
            shapes.append(_rectangle(left + column * CELL, top + row * CELL, 1, 1, "#000000"))
    return "\n".join([*shapes, "</svg>\n"])


def _rectangle(x: int, y: int, width: int, height: int, colour: str) -> str:
    """A rectangle of `width` x `height` cells, whose corner is given in pixels."""
    return f'<rect x="{x}" y="{y}" width="{width * CELL}" height="{height * CELL}" fill="{colour}"/>'
