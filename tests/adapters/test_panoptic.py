"""Panoptic quality without `panopticapi`, beside the original `panopticapi` (panopticapi-lite on PyPI)."""

import copy
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dinat_backbones.adapters import panoptic

try:
    from panopticapi import evaluation, utils
except ModuleNotFoundError:
    evaluation = utils = None
compares = pytest.mark.skipif(
    evaluation is None or evaluation.PQStat is panoptic.PQStat,
    reason="panopticapi is not installed: pip install --no-deps panopticapi-lite",
)

CATEGORIES = [{"id": id_, "isthing": int(id_ < 20), "name": str(id_)} for id_ in (1, 2, 7, 19, 20, 31, 200)]


def random_map(rng, size, ids):
    """Rectangles of the ids on VOID; every id is visible."""
    while True:
        found = np.zeros(size, np.int64)
        for id_ in ids:
            (top, bottom), (left, right) = (sorted(rng.sample(range(side + 1), 2)) for side in size)
            found[top:bottom, left:right] = id_
        if set(ids) <= set(np.unique(found)):
            return found


def random_image(rng):
    """Annotations and a prediction that agrees with some of them: two maps, two lists of segments."""
    size = (rng.randint(8, 40), rng.randint(8, 40))
    ids = rng.sample(range(1, 256**3), rng.randint(1, 6))
    annotated = random_map(rng, size, ids)
    segments = [
        {"id": id_, "category_id": rng.choice(CATEGORIES)["id"], "area": int((annotated == id_).sum())} for id_ in ids
    ]
    for info in segments:
        info["iscrowd"] = int(info["category_id"] < 20 and rng.random() < 0.3)
    if rng.random() < 0.1:
        predicted = np.zeros(size, np.int64)  # nothing was found
    else:
        shift = rng.choice([(0, 0), (1, 0), (0, 2), (3, 3)])
        predicted = np.roll(annotated, shift, (0, 1)) + (1 if rng.random() < 0.5 else 0) * (annotated > 0)
        predicted[rng.randrange(size[0]) :, : rng.randrange(size[1])] = rng.choice([0, 255, 256, 65535, 70000])
    by_id = {info["id"]: info["category_id"] for info in segments}
    found = [
        {
            "id": int(id_),
            "category_id": by_id.get(int(id_), rng.choice(CATEGORIES)["id"])
            if rng.random() < 0.8
            else rng.choice(CATEGORIES)["id"],
        }
        for id_ in np.unique(predicted)
        if id_ != panoptic.VOID
    ]
    return annotated, predicted, segments, found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three hundred random images in COCO's panoptic format: arguments of `pq_compute`."""
    rng, folder = random.Random(0), tmp_path_factory.mktemp("panoptic")
    annotations, predictions = ({"categories": CATEGORIES, "annotations": []} for _ in range(2))
    for image_id in range(300):
        annotated, predicted, segments, found = random_image(rng)
        for name, ids, infos, target in (
            ("annotations", annotated, segments, annotations),
            ("predictions", predicted, found, predictions),
        ):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(panoptic.id2rgb(ids)).save(folder / name / f"{image_id}.png")
            entry = {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": infos}
            target["annotations"].append({**entry, "height": ids.shape[0], "width": ids.shape[1]})
    (folder / "annotations.json").write_text(json.dumps(annotations))
    (folder / "predictions.json").write_text(json.dumps(predictions))
    return [str(folder / name) for name in ("annotations.json", "predictions.json")]


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_same(found[name], value)
        else:
            assert found[name] == pytest.approx(value, rel=1e-12, abs=1e-300), name


def test_example_by_hand():
    """Four segments of eight pixels: a thing found in six of them, a thing missed, stuff found exactly, a crowd."""
    annotated = np.repeat([[5, 6, 7, 8]], 8, axis=0)
    predicted = np.array([[1, 0, 3, 4]] * 6 + [[0, 2, 3, 4]] * 2)
    segments = [dict(id=id_, category_id=category, area=8, iscrowd=int(id_ == 8)) for id_, category in
                ((5, 1), (6, 1), (7, 31), (8, 2))]  # fmt: skip
    found = [
        dict(id=1, category_id=1),
        dict(id=2, category_id=1),
        dict(id=3, category_id=31),
        dict(id=4, category_id=2),
    ]
    categories = {info["id"]: info for info in CATEGORIES}
    stat = panoptic.count_segments(annotated, predicted, segments, found, categories)
    assert vars(stat[1]) == {"iou": 0.75, "tp": 1, "fp": 1, "fn": 1}
    assert vars(stat[31]) == {"iou": 1.0, "tp": 1, "fp": 0, "fn": 0}
    assert vars(stat[2]) == {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0}  # what lies in a crowd is no false positive
    average, per_class = stat.pq_average(categories, isthing=None)
    assert average == {"pq": (0.375 + 1) / 2, "sq": (0.75 + 1) / 2, "rq": (0.5 + 1) / 2, "n": 2}
    assert per_class[1] == {"pq": 0.375, "sq": 0.75, "rq": 0.5} and per_class[2] == {"pq": 0, "sq": 0, "rq": 0}
    annotated[6:, 1] = panoptic.VOID  # now the wrong segment lies in pixels without annotation
    stat = panoptic.count_segments(annotated, predicted, segments, found, categories)
    assert vars(stat[1]) == {"iou": 0.75, "tp": 1, "fp": 0, "fn": 1}


@compares
def test_random_maps_with_crowd_and_void_give_the_same_quality(files, capsys):
    expected = evaluation.pq_compute(*files)
    found = panoptic.pq_compute(*files)
    assert 0.1 < expected["All"]["pq"] < 0.9 and expected["All"]["n"] == len(CATEGORIES)
    assert_same(found, expected)
    table = capsys.readouterr().out.splitlines()
    assert "Things" in table[-2] and f"{100 * expected['Things']['pq']:.1f}" in table[-2]


@compares
def test_counts_of_each_image_are_the_same(files):
    annotations, predictions = (json.loads(Path(file).read_text())["annotations"] for file in files)
    categories = {info["id"]: info for info in CATEGORIES}
    folders = [file.removesuffix(".json") for file in files]
    ignored = matched = 0
    for annotation, prediction in zip(annotations, predictions, strict=True):
        pair = [(copy.deepcopy(annotation), copy.deepcopy(prediction))]
        expected = evaluation.pq_compute_single_core(0, pair, *folders, categories)
        maps = [panoptic.rgb2id(np.asarray(Image.open(f"{folder}/{annotation['file_name']}"))) for folder in folders]
        found = panoptic.count_segments(*maps, annotation["segments_info"], prediction["segments_info"], categories)
        for id_ in categories:
            assert vars(found[id_]) == vars(expected[id_]), (annotation["image_id"], id_)
        counts = [found[id_] for id_ in categories]
        matched += sum(c.tp for c in counts)
        ignored += len(prediction["segments_info"]) - sum(c.tp + c.fp for c in counts)
    assert matched > 100 and ignored > 100  # void and crowd made a difference


@compares
def test_ids_and_colours():
    ids = np.random.default_rng(0).integers(0, 256**3, (20, 30))
    colours = panoptic.id2rgb(ids)
    np.testing.assert_array_equal(colours, utils.id2rgb(ids))
    assert colours.dtype == np.uint8
    for dtype in (np.uint8, np.int32, np.uint32, np.int64):
        found, expected = panoptic.rgb2id(colours.astype(dtype)), utils.rgb2id(colours.astype(dtype))
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    np.testing.assert_array_equal(panoptic.rgb2id(colours), ids)
    for id_ in (0, 1, 255, 256, 70000, 256**3 - 1):
        assert panoptic.id2rgb(id_) == utils.id2rgb(id_)
        assert panoptic.rgb2id(panoptic.id2rgb(id_)) == id_ == utils.rgb2id(utils.id2rgb(id_))
    assert (panoptic.VOID, panoptic.OFFSET) == (evaluation.VOID, evaluation.OFFSET)


def test_statistics_travel_between_processes():
    stat = panoptic.PQStat()
    stat[3].tp += 2
    stat[3].iou += 1.5
    stat += pickle.loads(pickle.dumps(stat))
    assert vars(stat[3]) == {"iou": 3.0, "tp": 4, "fp": 0, "fn": 0}


def test_no_stuff_among_the_categories():
    assert panoptic.PQStat().pq_average({1: {"isthing": 1}}, isthing=False) == ({"pq": 0, "sq": 0, "rq": 0, "n": 0}, {})


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda found: found.pop(), r"image 5: predicted segments \[\d+\] are in the PNG and not in the JSON"),
        (
            lambda found: found.append({"id": 1234, "category_id": 1}),
            r"image 5: .*\[1234\] are in the JSON file and not",
        ),
        (lambda found: found[0].update(category_id=99), r"image 5: .* unknown category_id \[99\]"),
        (None, "no prediction for 1 image.*id 5"),
    ],
)
def test_predictions_that_contradict_themselves(files, tmp_path, change, message):
    content = json.loads(Path(files[1]).read_text())
    if change is None:
        del content["annotations"][5]
    else:
        change(content["annotations"][5]["segments_info"])
    (tmp_path / "predictions.json").write_text(json.dumps(content))
    with pytest.raises(KeyError, match=message):
        panoptic.pq_compute(files[0], str(tmp_path / "predictions.json"), pred_folder=files[1].removesuffix(".json"))


def test_a_missing_folder(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="PNGs of predictions does not exist"):
        panoptic.pq_compute(*files, pred_folder=str(tmp_path / "missing"))


FIND = """
import sys
import dinat_mmcv_finder
from importlib.util import find_spec
if {hide}:  # as in an environment without it
    for finder in sys.meta_path[:-1]:
        find = finder.find_spec
        finder.find_spec = lambda name, *rest, find=find: None if name.startswith("panopticapi") else find(name, *rest)
assert "dinat_backbones" not in sys.modules and "numpy" not in sys.modules  # every start of Python pays for this
import panopticapi, panopticapi.evaluation, panopticapi.utils
from panopticapi.evaluation import OFFSET, VOID, PQStat, pq_compute
from panopticapi.utils import id2rgb, rgb2id
print(PQStat.__module__, rgb2id.__module__)
"""


@pytest.mark.parametrize(
    "hide, expected",
    [pytest.param(False, "panopticapi.evaluation panopticapi.utils", marks=compares), (True, None)],
)
def test_an_installed_panopticapi_is_preferred(hide, expected):
    ours = panoptic.__name__
    run = subprocess.run([sys.executable, "-c", FIND.format(hide=hide)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == (expected or f"{ours} {ours}")


def test_what_is_not_here_names_the_command():
    module = type(panoptic)("panopticapi.utils")
    panoptic.fill_module(module)
    with pytest.raises(AttributeError, match="IdGenerator.*pip install git"):
        _ = module.IdGenerator


METRIC = (
    FIND
    + """
import json
import numpy as np, torch
import mmdet.evaluation.functional.panoptic_utils as panoptic_utils
from mmdet.evaluation import CocoPanopticMetric

assert panoptic_utils.PQStat is PQStat
annotations, prefix = sys.argv[1:]
content = json.load(open(annotations))
folder = annotations.removesuffix(".json")
names = [info["name"] for info in content["categories"]]
label = {{info["id"]: index for index, info in enumerate(content["categories"])}}
results = []
for options in (dict(), dict(outfile_prefix=prefix, nproc=2)):  # as in training; files, and PQ by worker processes
    metric = CocoPanopticMetric(ann_file=annotations, seg_prefix=folder, **options)
    metric.dataset_meta = dict(classes=names)
    for info in content["annotations"]:
        image_id = info["image_id"]
        found = np.random.default_rng(image_id).integers(0, 8, (info["height"] // 4 + 1, info["width"] // 4 + 1))
        found = found.repeat(4, 0).repeat(4, 1)[: info["height"], : info["width"]]  # blocks of classes and, 7, of VOID
        ids = rgb2id(np.asarray(panoptic_utils.mmcv.imread(f"{{folder}}/{{info['file_name']}}", channel_order="rgb")))
        for number, segment in enumerate(info["segments_info"][::2]):  # every other segment is found
            found[ids == segment["id"]] = label[segment["category_id"]] + 1000 * (number + 1)
        metric.process(None, [dict(
            img_id=image_id, img_path=f"{{image_id}}.jpg", ori_shape=found.shape,
            pred_panoptic_seg=dict(sem_seg=torch.from_numpy(found)[None]),
        )])
    results.append(metric.evaluate(len(content["annotations"])))
print(json.dumps(results))
"""
)


@compares
def test_metric_of_mmdet_is_the_same_without_panopticapi(files, tmp_path):
    pytest.importorskip("mmdet", reason="mmdet is missing: pip install 'dinat_backbones[openmmlab]'")
    content = json.loads(Path(files[0]).read_text())
    content["images"] = [
        {"id": info["image_id"], "width": info["width"], "height": info["height"], "file_name": info["file_name"]}
        for info in content["annotations"]
    ]
    annotations = Path(files[0]).with_name("images.json")
    annotations.write_text(json.dumps(content))
    annotations.with_suffix("").symlink_to("annotations")
    found = []
    for hide in (False, True):
        command = [sys.executable, "-c", METRIC.format(hide=hide), str(annotations), str(tmp_path / f"hide-{hide}")]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout.splitlines()[-1]))
    expected, ours = found
    assert all(10 < value < 99.9 for value in expected[0].values()), expected
    for one, other in zip(ours, expected, strict=True):
        assert_same(one, other)
