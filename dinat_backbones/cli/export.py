"""Export a backbone, a classifier or an UPerNet to ONNX or to a torch.export program:

    dinat export dinat_tiny --dilations coco --format onnx --size 800x1280 [--dynamic-batch] [--dynamic-size]
    dinat export dinat_mini --classifier --checkpoint FILE --format onnx --size 224x224
    dinat export upernet_dinat_mini --checkpoint FILE --format pt2 --size 512x512 --check [--out FILE]

MODEL is a backbone (dinat_mini, dinat_s_tiny, ...), a published classifier (with --classifier where a backbone has the
same name), a published segmentation model (its name in `dinat_backbones.zoo`) or an mmseg config. The exported
graph takes normalised images ``[batch, 3, H, W]``, float32; a backbone returns its maps `stage0` ... as
``[batch, C_i, H / stride, W / stride]``, a classifier `logits` ``[batch, classes]``, a segmentor `logits`
``[batch, classes, H, W]``. It has standard operations only. Without a checkpoint the weights are random.

--check runs it (ONNX in onnxruntime), at other sizes too where these are dynamic, compares with eager PyTorch, and says
how large it is and how long both take. Exit status 1, and no file, if any value is off by more than 1e-4.
"""

import argparse
import contextlib
import importlib
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

import dinat_backbones

from .. import zoo
from ..checkpoint import read
from ..checkpoint.loading import bare_state
from ..files import atomic_write
from .common import load_config, stop

TOLERANCE = 1e-4
OPSET = 18
SUFFIX = {"onnx": ".onnx", "pt2": ".pt2"}
CONFIGS = {row.name: row.config for row in zoo.SEGMENTATION.values()}
TIMED_CALLS = 5


class ExportError(Exception):
    """What went wrong, for the user."""


class Exported(NamedTuple):
    """A model in the form it is exported in."""

    model: nn.Module
    outputs: tuple[str, ...]


class AveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two matrix products, which any size can go through: bins of ``floor(i * L / n)`` to
    ``ceil((i + 1) * L / n)``."""

    def __init__(self, output_size: Any):  # one number
        super().__init__()
        self.bins: int = output_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._weights(x.shape[2], x) @ x @ self._weights(x.shape[3], x).T

    def _weights(self, length: int, like: torch.Tensor) -> torch.Tensor:
        """``[bins, length]``, each row sums to 1."""
        bins = torch.arange(self.bins, device=like.device)[:, None]
        index = torch.arange(length, device=like.device)
        begin, end = bins * length // self.bins, ((bins + 1) * length + self.bins - 1) // self.bins
        inside = ((index >= begin) & (index < end)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


class Segmentor(nn.Module):
    """Backbone and decode head of an mmseg `EncoderDecoder`, its logits resized to the image."""

    def __init__(self, model: Any):
        super().__init__()
        self.backbone, self.head = model.backbone, model.decode_head
        for parent in list(self.head.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.AdaptiveAvgPool2d):
                    setattr(parent, name, AveragePool(child.output_size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.backbone(x))
        return F.interpolate(logits, size=x.shape[2:], mode="bilinear", align_corners=self.head.align_corners)


def build(name: str, dilations: str | None, checkpoint: str | None, classifier: bool = False) -> Exported:
    """The model of MODEL, for inference.

    Raises:
        ExportError: unknown names, packages that are missing, a checkpoint that does not fit.
    """
    try:
        if classifier or (name in zoo.CLASSIFICATION and name not in zoo.ARCHS):
            return _classifier(name, dilations, checkpoint)
        if name in zoo.ARCHS:
            return _backbone(name, dilations, checkpoint)
        if dilations:
            raise ExportError(f"--dilations {dilations} goes with the name of a backbone; {name} has its own")
        return _segmentor(name, checkpoint)
    except (OSError, ValueError) as error:
        raise ExportError(str(error)) from error


def _backbone(name: str, dilations: str | None, checkpoint: str | None) -> Exported:
    if dilations is None and zoo.ARCHS[name].family != "NAT":
        also = "; the classifier of that name is exported with --classifier" if name in zoo.CLASSIFICATION else ""
        raise ExportError(f"{name} needs --dilations, one of: {', '.join(zoo.DILATION_SETTINGS)}{also}")
    family = getattr(dinat_backbones, zoo.ARCHS[name].family)
    model = family(arch=name, dilations=dilations)
    if checkpoint:
        from ..checkpoint import load_backbone

        print(load_backbone(model, checkpoint))
    else:
        _randomise_bias(model)
    return Exported(model.eval(), tuple(f"stage{i}" for i in model.out_indices))


def _classifier(name: str, dilations: str | None, checkpoint: str | None) -> Exported:
    overrides = {"dilations": dilations} if dilations else {}
    classes = None
    if checkpoint:  # which may have been trained for other classes
        head = bare_state(read(checkpoint)).get("head.weight")
        classes = None if head is None else len(head)
    model = dinat_backbones.create_classifier(name, classes, pretrained=checkpoint or False, **overrides)
    if not checkpoint:
        _randomise_bias(model)
    return Exported(model.eval(), ("logits",))


def _segmentor(name: str, checkpoint: str | None) -> Exported:
    path = zoo.config_folder() / CONFIGS[name] if name in CONFIGS else zoo.find_config(name)
    if not path.is_file():
        raise ExportError(f"{name} is neither a config nor one of: {', '.join((*zoo.ARCHS, *CONFIGS))}")
    cfg = load_config(str(path))
    from mmengine.model import revert_sync_batchnorm
    from mmengine.registry import MODELS, DefaultScope

    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmseg")):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if not hasattr(model, "decode_head") or hasattr(model.decode_head, "pixel_decoder"):
        raise ExportError(f"{name}: a {type(model).__name__} of this kind is not exported; expected an UPerNet")
    if checkpoint:
        from ..checkpoint import load_model

        load_model(model, checkpoint)
    else:
        _randomise_bias(model)
    return Exported(Segmentor(model).eval(), ("logits",))


def _randomise_bias(model: nn.Module) -> None:
    """Random bias tables of the size of trained ones, so that --check covers them without a checkpoint."""
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            nn.init.normal_(parameter, std=0.5)


def program(exported: Exported, size: tuple[int, int], dynamic_batch: bool, dynamic_size: bool) -> Any:
    """`torch.export.ExportedProgram` of the model."""
    if not hasattr(torch.compiler, "is_exporting"):
        raise ExportError(f"torch {torch.__version__} is too old for this; expected 2.7 or later")
    dynamic = torch.export.Dim.DYNAMIC
    dims = {0: dynamic} if dynamic_batch else {}
    if dynamic_size:
        dims |= {2: dynamic, 3: dynamic}
    image = torch.randn(2 if dynamic_batch else 1, 3, *size)  # torch.export specializes a batch of 1
    with torch.no_grad():
        return torch.export.export(exported.model, (image,), dynamic_shapes=(dims or None,), strict=False)


def least_size(graph: Any) -> str:
    """HEIGHTxWIDTH of the smallest image that a graph with dynamic sizes takes: torch assumes that no dynamic dimension
    is 1, so the last map has at least two pixels a side."""
    (name,) = graph.graph_signature.user_inputs
    image = next(node for node in graph.graph.nodes if node.name == name)
    return "x".join(str(graph.range_constraints[side.node.expr].lower) for side in image.meta["val"].shape[2:])


def write_onnx(exported: Exported, graph: Any, opset: int, path: Path) -> str:
    """Write the file; returns a summary of its operators."""
    onnx = _optional_package("onnx")
    _optional_package("onnxscript")
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
        result: Any = torch.onnx.export(
            graph, dynamo=True, opset_version=opset, input_names=["image"], output_names=list(exported.outputs),
            optimize=True, verbose=False,
        )  # fmt: skip
    result.save(str(path), external_data=False)
    model = onnx.load(str(path))
    foreign = {node.domain for node in model.graph.node} - {"", "ai.onnx"}
    if foreign or model.functions:
        raise ExportError(f"the graph has operators that are not ONNX's own: {', '.join(sorted(foreign))}")
    counts = Counter(node.op_type for node in model.graph.node)
    most = ", ".join(f"{count} {name}" for name, count in counts.most_common(5))
    return f"opset {model.opset_import[0].version}, {sum(counts.values())} nodes ({most}, ...)"


def write_program(exported: Exported, graph: Any, opset: int, path: Path) -> str:
    """Write the file; returns a summary. `opset` does not apply."""
    foreign = {str(n.target) for n in graph.graph.nodes if n.op == "call_function"}
    foreign = {name for name in foreign if name.startswith("dinat_backbones")}
    if foreign:
        raise ExportError(f"the graph has operators of ours: {', '.join(sorted(foreign))}")
    torch.export.save(graph, path)
    return f"torch {torch.__version__}, {len(graph.graph.nodes)} nodes"


def _onnx_runner(path: Path) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    runtime = _optional_package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(out) for out in session.run(None, {"image": image.numpy()})]


def _program_runner(path: Path) -> Callable[[torch.Tensor], list[torch.Tensor]]:
    module = torch.export.load(path).module()
    return lambda image: _list(module(image))


def _list(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


FORMATS = {"onnx": (write_onnx, _onnx_runner), "pt2": (write_program, _program_runner)}


def _optional_package(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ExportError(f'{package} is not installed: pip install "dinat_backbones[export]"') from error


def check_sizes(size: tuple[int, int], dynamic_batch: bool, dynamic_size: bool) -> Iterator[tuple[int, int, int]]:
    """The cases of --check, (batch, height, width): the size itself, then odd, smaller and larger ones and a batch."""
    height, width = size
    yield 1, height, width
    if dynamic_size:
        yield 1, height * 3 // 4 + 1, width + 13
        yield 1, height + 32, width * 2 // 3
    if dynamic_batch:
        yield 3, height, width


def check(exported: Exported, run: Callable[[torch.Tensor], list[torch.Tensor]], cases: Any) -> float:
    """Compare the exported model with the eager one and print the figures; returns the largest error."""
    worst = 0.0
    for number, (batch, height, width) in enumerate(cases):
        image = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(number))
        with torch.no_grad():
            expected, got = _list(exported.model(image)), run(image)
            if [t.shape for t in got] != [t.shape for t in expected]:
                raise ExportError(
                    f"{batch}x3x{height}x{width}: shapes {[list(t.shape) for t in got]} are not the eager ones"
                )
            error = max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))
            worst = max(worst, error) if error == error else float("nan")
            line = f"{batch}x3x{height}x{width}: largest error {error:.1e}"
            if number == 0:
                times: dict[str, list[float]] = {"exported": [], "eager": []}
                for _ in range(TIMED_CALLS):
                    for name, call in (("exported", run), ("eager", exported.model)):
                        begin = time.perf_counter()
                        call(image)
                        times[name].append(1e3 * (time.perf_counter() - begin))
                line += "".join(f", {name} {statistics.median(values):.0f} ms" for name, values in times.items())
        print(line, flush=True)
    return worst


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0):
        raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH such as 800x1280, not {text!r}")
    return int(height), int(width)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        metavar="MODEL|CONFIG",
        help="a backbone, a published classifier or segmentation model, an mmseg config",
    )
    parser.add_argument(
        "--classifier", action="store_true", help="MODEL is a classifier, not the backbone of that name"
    )
    parser.add_argument(
        "--dilations",
        choices=zoo.DILATION_SETTINGS,
        help="published setting of a DiNAT or DiNAT_s backbone, which need one",
    )
    parser.add_argument("--checkpoint", help="file or http(s) address")
    parser.add_argument("--format", choices=FORMATS, default="onnx", help="default: %(default)s")
    parser.add_argument("--size", type=_size, required=True, metavar="HxW", help="of the image, as in 800x1280")
    parser.add_argument("--dynamic-batch", action="store_true", help="any batch size")
    parser.add_argument("--dynamic-size", action="store_true", help="any height and width")
    parser.add_argument("--opset", type=int, default=OPSET, help="of ONNX, 17 at least (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file to write (default: MODEL with the format's suffix)")
    parser.add_argument("--force", action="store_true", help="overwrite it")
    parser.add_argument("--check", action="store_true", help="run it and compare it with eager PyTorch")
    args = parser.parse_args(arguments)
    out = args.out or Path(Path(args.model).stem + SUFFIX[args.format])
    if out.suffix != SUFFIX[args.format]:
        parser.error(f"--out {out}: expected a name that ends in {SUFFIX[args.format]}")
    if out.exists() and not args.force:
        parser.error(f"--out {out} exists; name another file or add --force")
    if args.opset < 17:
        parser.error(f"--opset {args.opset}: expected 17 at least, which has LayerNormalization")
    write, load = FORMATS[args.format]
    begin = time.perf_counter()
    try:
        exported = build(args.model, args.dilations, args.checkpoint, args.classifier)
        graph = program(exported, args.size, args.dynamic_batch, args.dynamic_size)
        with atomic_write(out) as partial:
            words = write(exported, graph, args.opset, partial)
            print(f"{partial.stat().st_size / 1e6:.1f} MB, {words}, exported in {time.perf_counter() - begin:.0f} s")
            if args.dynamic_size:
                print(f"images of {least_size(graph)} and larger")
            if args.check:
                cases = check_sizes(args.size, args.dynamic_batch, args.dynamic_size)
                worst = check(exported, load(partial), cases)
                if not worst <= TOLERANCE:
                    raise ExportError(f"off by {worst:.1e}, allowed is {TOLERANCE:.0e}; nothing was written")
    except ExportError as error:
        stop(str(error))
    print(f"wrote {out}")
