"""What mmdet and Detectron2 import from `panopticapi`: panoptic quality (PQ) of COCO panoptic segmentation.

`panopticapi` is not on PyPI under its own name, and the copy there requires numpy 1, mmsegmentation numpy 2. Where it
is not installed, `import panopticapi` finds these functions (`fill_module`); an installed one is always preferred. PQ
is defined in *Panoptic Segmentation* (arXiv 1801.00868):

- A predicted and an annotated segment match if they have the same class and their intersection over union is above
  0.5. Pixels without annotation (`VOID`) do not count towards the union. PQ is the sum of the matches' IoU divided by
  TP + FP / 2 + FN / 2, which is also SQ (the mean IoU of matches) times RQ (an F1 score).
- A crowd segment neither matches nor counts as missed. A predicted segment without a match is not counted as a false
  positive if more than half of it lies in `VOID` or in the crowd segment of its class.

A panoptic PNG stores the segment's id in its colour: red + 256 * green + 256^2 * blue.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

VOID = 0  # the id of pixels without annotation
OFFSET = 256**3  # above every id


def rgb2id(color: np.ndarray | Sequence[int]) -> Any:
    """Segment ids of colours.

    Args:
        color: ``[H, W, 3]`` RGB, or one colour.

    Returns:
        ``[H, W]`` int32 for uint8 colours and of the colours' dtype otherwise; an int for one colour.
    """
    if not (isinstance(color, np.ndarray) and color.ndim == 3):
        red, green, blue = (int(value) for value in color)
        return red + 256 * green + 256**2 * blue
    wide = color.astype(np.int32) if color.dtype == np.uint8 else color
    return wide[..., 0] + 256 * wide[..., 1] + 256**2 * wide[..., 2]


def id2rgb(id_map: np.ndarray | int) -> Any:
    """Colours of segment ids: ``[..., 3]`` uint8 for an array of ids, a list of three ints for one id."""
    if isinstance(id_map, np.ndarray):
        return np.stack([id_map // 256**i % 256 for i in range(3)], axis=-1).astype(np.uint8)
    return [int(id_map) // 256**i % 256 for i in range(3)]


@dataclass
class PQStatCat:
    """Counts of one class: the sum of the matches' IoU, true positives, false positives and false negatives."""

    iou: float = 0.0
    tp: int = 0
    fp: int = 0
    fn: int = 0

    def __iadd__(self, other: "PQStatCat") -> "PQStatCat":
        self.iou, self.tp, self.fp, self.fn = (a + b for a, b in zip(astuple(self), astuple(other), strict=True))
        return self

    def quality(self) -> dict[str, float]:
        """PQ, SQ and RQ, from 0 to 1; 0 for a class that does not occur."""
        size = self.tp + 0.5 * self.fp + 0.5 * self.fn
        return {
            "pq": self.iou / size if size else 0.0,
            "sq": self.iou / self.tp if self.tp else 0.0,
            "rq": self.tp / size if size else 0.0,
        }


class PQStat:
    """`PQStatCat` by category id; ``+=`` adds the counts of another one."""

    def __init__(self) -> None:
        self.pq_per_cat: dict[int, PQStatCat] = defaultdict(PQStatCat)

    def __getitem__(self, category: int) -> PQStatCat:
        return self.pq_per_cat[category]

    def __iadd__(self, other: "PQStat") -> "PQStat":
        for category, counts in other.pq_per_cat.items():
            self.pq_per_cat[category] += counts
        return self

    def pq_average(
        self, categories: Mapping[int, Mapping[str, Any]], isthing: bool | None
    ) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
        """Means over the classes that occur in annotations or predictions.

        Args:
            categories: by id, each with the entry "isthing" (0 or 1).
            isthing: True for things alone, False for stuff alone, None for both.

        Returns:
            ``{"pq", "sq", "rq", "n"}``, where n is the number of classes that occur (all means are 0 if there is none),
            and PQ, SQ and RQ by category id.
        """
        chosen = [id_ for id_, info in categories.items() if isthing is None or (info["isthing"] == 1) == isthing]
        per_class = {id_: self[id_].quality() for id_ in chosen}
        occurring = [per_class[id_] for id_ in chosen if self[id_].tp + self[id_].fp + self[id_].fn]
        n = len(occurring)
        average = {name: sum(quality[name] for quality in occurring) / max(n, 1) for name in ("pq", "sq", "rq")}
        return {**average, "n": n}, per_class


def count_segments(
    annotated: np.ndarray,
    predicted: np.ndarray,
    annotated_segments: Iterable[Mapping[str, Any]],
    predicted_segments: Iterable[Mapping[str, Any]],
    categories: Mapping[int, Mapping[str, Any]],
) -> PQStat:
    """Matches, false positives and false negatives of one image.

    Args:
        annotated, predicted: ``[H, W]``, ids of segments.
        annotated_segments: with "id", "category_id", "iscrowd" and "area" (in pixels) each.
        predicted_segments: with "id" and "category_id" each.
        categories: by id.

    Raises:
        KeyError: the predicted map and its list of segments disagree, or a category is unknown.
    """
    annotations = {info["id"]: info for info in annotated_segments}
    category = {info["id"]: info["category_id"] for info in predicted_segments}
    pairs, counts = np.unique(annotated.astype(np.int64) * OFFSET + predicted, return_counts=True)
    overlap = {divmod(int(pair), OFFSET): int(count) for pair, count in zip(pairs, counts, strict=True)}
    area: dict[int, int] = defaultdict(int)
    for (_, segment), count in overlap.items():
        area[segment] += count
    _check(set(area) - {VOID} | set(category).intersection(area), category, categories)

    stat = PQStat()
    matched_annotations, matched_predictions = set(), set()
    for (annotation, segment), count in overlap.items():
        info = annotations.get(annotation)
        if info is None or segment not in category or info["iscrowd"] or info["category_id"] != category[segment]:
            continue
        iou = count / (area[segment] + info["area"] - count - overlap.get((VOID, segment), 0))
        if iou > 0.5:  # at most one annotation and one prediction can have this
            stat[category[segment]].tp += 1
            stat[category[segment]].iou += iou
            matched_annotations.add(annotation)
            matched_predictions.add(segment)

    crowd = {info["category_id"]: id_ for id_, info in annotations.items() if info["iscrowd"]}
    for id_, info in annotations.items():
        if id_ not in matched_annotations and not info["iscrowd"]:
            stat[info["category_id"]].fn += 1
    for segment, its_category in category.items():
        ignored = overlap.get((VOID, segment), 0)
        if its_category in crowd:
            ignored += overlap.get((crowd[its_category], segment), 0)
        if segment not in matched_predictions and 2 * ignored <= area[segment]:
            stat[its_category].fp += 1
    return stat


def _check(in_map: set[int], category: Mapping[int, int], categories: Mapping[int, Any]) -> None:
    if in_map - set(category):
        raise KeyError(f"predicted segments {sorted(in_map - set(category))} are in the PNG and not in the JSON file")
    if set(category) - in_map:
        raise KeyError(f"predicted segments {sorted(set(category) - in_map)} are in the JSON file and not in the PNG")
    unknown = sorted({id_ for id_ in category.values() if id_ not in categories})
    if unknown:
        raise KeyError(f"predicted segments have the unknown category_id {unknown}")


def pq_compute(
    gt_json_file: str, pred_json_file: str, gt_folder: str | None = None, pred_folder: str | None = None
) -> dict[str, Any]:
    """PQ of files in COCO's panoptic format; also prints a table.

    Args:
        gt_json_file, pred_json_file: annotations and predictions.
        gt_folder, pred_folder: where their PNGs are; by default the JSON file's path without ".json".

    Returns:
        ``{"All", "Things", "Stuff", "per_class"}``: "pq", "sq", "rq" (0 to 1) and the number of classes "n"; under
        "per_class" the first three by category id.

    Raises:
        FileNotFoundError: a folder is missing.
        KeyError: an image has no prediction, or the prediction is inconsistent (the message names the image).
    """
    annotations, predictions = (json.loads(Path(file).read_text()) for file in (gt_json_file, pred_json_file))
    folders = [
        Path(folder or file.replace(".json", ""))
        for file, folder in ((gt_json_file, gt_folder), (pred_json_file, pred_folder))
    ]
    for folder, contents in zip(folders, ("annotations", "predictions"), strict=True):
        if not folder.is_dir():
            raise FileNotFoundError(f"the folder {folder} with the PNGs of {contents} does not exist")
    categories = {info["id"]: info for info in annotations["categories"]}
    predicted = {info["image_id"]: info for info in predictions["annotations"]}
    missing = [info["image_id"] for info in annotations["annotations"] if info["image_id"] not in predicted]
    if missing:
        raise KeyError(
            f"{pred_json_file} has no prediction for {len(missing)} image(s), the first with id {missing[0]}"
        )

    def count(annotation: Mapping[str, Any]) -> PQStat:
        prediction = predicted[annotation["image_id"]]
        try:
            return count_segments(
                _read_ids(folders[0] / annotation["file_name"]),
                _read_ids(folders[1] / prediction["file_name"]),
                annotation["segments_info"],
                prediction["segments_info"],
                categories,
            )
        except KeyError as error:
            raise KeyError(f"image {annotation['image_id']}: {error.args[0]}") from error

    total = PQStat()
    with ThreadPoolExecutor() as pool:  # decoding and sorting release the GIL; the order of the sum is fixed
        for stat in pool.map(count, annotations["annotations"]):
            total += stat

    results: dict[str, Any] = {}
    print(f"{'':10}|    PQ     SQ     RQ     N\n{'-' * 38}")
    for name, isthing in (("All", None), ("Things", True), ("Stuff", False)):
        average, per_class = total.pq_average(categories, isthing)
        results[name] = average
        if isthing is None:
            results["per_class"] = per_class
        print(
            f"{name:10}| " + "  ".join(f"{100 * average[key]:5.1f}" for key in ("pq", "sq", "rq")), f"{average['n']:5}"
        )
    return results


def fill_module(module: ModuleType) -> None:
    """Puts the functions into `module`, an empty `panopticapi`, `panopticapi.evaluation` or `panopticapi.utils`."""
    module.__doc__ = (
        "Panoptic quality as dinat_backbones.adapters.panoptic computes it; `panopticapi` is not installed."
    )
    for name in ("VOID", "OFFSET", "rgb2id", "id2rgb", "PQStatCat", "PQStat", "pq_compute"):
        setattr(module, name, globals()[name])
    module.__getattr__ = _missing  # type: ignore[method-assign]


def _missing(name: str) -> Any:
    message = f"panopticapi has no {name!r} here: pip install git+https://github.com/cocodataset/panopticapi.git"
    raise AttributeError(message if not name.startswith("__") else name)


def _read_ids(file: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(file) as image:
        return rgb2id(np.asarray(image.convert("RGB")))
