"""Whole backbones: inference and training steps, beside the same on natten, Swin and ConvNeXt."""

import contextlib
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import nn

from dinat_backbones.backbone import DiNAT
from dinat_backbones.ops import BACKENDS

from . import baselines
from .core import Bar, Bench, Row, agree, inference, relative, seconds


def backbone(arch: str, backend: str | None = "cpu", drop_path_rate: float = 0.2) -> DiNAT:
    torch.manual_seed(0)
    model = DiNAT(arch=arch, dilations="coco", drop_path_rate=drop_path_rate, backend=backend)
    random_bias(model)
    return model.eval()


def random_bias(model: nn.Module) -> None:
    """Bias tables as large as trained ones, so that parity notices them."""
    for name, parameter in model.named_parameters():
        if name.endswith("rpb"):
            nn.init.normal_(parameter, std=0.5)


def random_image(size: tuple[int, int], batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def parity_backbone(bench: Bench) -> None:
    small = random_image((96, 128))
    for arch in ("dinat_mini", "dinat_tiny"):
        ours = inference(backbone(arch), small)()
        agree(f"{arch} against its reference", ours, inference(backbone(arch, "reference"), small)())
    bench.say("parity: the backbones agree with the reference op inside")
    if baselines.natten2dav:
        model, image = backbone("dinat_mini"), random_image(bench.sizes.image)
        ours = inference(model, image)()
        with baselines.on_natten():
            theirs = inference(model, image)()
        agree(f"dinat_mini against itself on {baselines.NATTEN}", ours, theirs)
        bench.say(f"parity: dinat_mini agrees with itself on {baselines.NATTEN} at full size")


def inside_network(bench: Bench, model: nn.Module, image: torch.Tensor) -> Row:
    """Every call of the op in one forward pass, then the same calls on the same tensors with nothing in between."""
    cpu = BACKENDS["cpu"]
    run, calls, spent = cpu.attention, [], [0.0]

    def timed(*arguments):
        begin = time.perf_counter()
        out = run(*arguments)
        spent[0] += time.perf_counter() - begin
        calls.append(arguments)
        return out

    def inside() -> float:
        calls.clear()
        spent[0] = 0.0
        with mock.patch.object(cpu, "attention", timed):
            model(image)
        return spent[0]

    def alone() -> float:
        return sum(seconds(lambda arguments=arguments: run(*arguments)) for arguments in calls)

    name, samples = "op inside the network", {"ours": [], "alone": []}
    with torch.inference_mode():
        for turn in range(2 + bench.rounds):
            pair = inside(), alone()
            if turn >= 2:
                samples["ours"].append(pair[0])
                samples["alone"].append(pair[1])
    times = bench.medians(name, samples)
    return relative(f"{name} ({len(calls)} calls)", times["ours"], "alone", times["alone"], Bar("<=", 1.15))


def backbone_rows(bench: Bench) -> list[Row]:
    image = random_image(bench.sizes.image)
    mini, name, bar = backbone("dinat_mini"), "DiNAT-Mini forward", Bar(">=", 2.4)
    rows = [inside_network(bench, mini, image)]
    if baselines.natten2dav:

        def theirs():
            with baselines.on_natten():
                return inference(mini, image)()

        rows.append(bench.speedup(name, inference(mini, image), f"same on {baselines.NATTEN}", theirs, bar))
    else:
        bench.times(name, {"ours": inference(mini, image)})
        rows.append(Row(name, against=f"same on {baselines.NATTEN}", bar=bar, note=baselines.NEEDS_NATTEN))
    tiny, swin = inference(backbone("dinat_tiny"), image), inference(baselines.SwinPyramid().eval(), image)
    rows.append(bench.speedup("DiNAT-Tiny forward", tiny, "torchvision Swin-T", swin, Bar(">=", 1.9)))
    convnext = inference(baselines.ConvNeXtPyramid().eval(), image)
    rows.append(bench.speedup("DiNAT-Tiny forward", tiny, "torchvision ConvNeXt-T", convnext, Bar(">=", 1.15)))
    del tiny, swin, convnext
    large, swin = inference(backbone("dinat_large"), image), inference(baselines.swin_large().eval(), image)
    bar = Bar(">=", 1.3)
    rows.append(
        bench.speedup("DiNAT-Large forward", large, "torchvision Swin-L", swin, bar, rounds=min(3, bench.rounds))
    )
    return rows


def training_step(model: nn.Module, image: torch.Tensor) -> Callable[[], None]:
    """A call that trains for one step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def call():
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(image)).backward()
        optimizer.step()

    return call


def train_step_rows(bench: Bench) -> list[Row]:
    image = random_image(bench.sizes.train_image, bench.sizes.train_batch)
    name, ours = f"DiNAT-Tiny training step, batch {len(image)}", training_step(backbone("dinat_tiny"), image)
    swin, convnext = (training_step(model(), image) for model in (baselines.SwinPyramid, baselines.ConvNeXtPyramid))
    return [
        bench.speedup(name, ours, "torchvision Swin-T", swin, Bar(">=", 1.15)),
        bench.speedup(name, ours, "torchvision ConvNeXt-T", convnext, Bar(">=", 1.0)),
    ]


def forward_backward(
    model: nn.Module, image: torch.Tensor, precision: Callable = contextlib.nullcontext
) -> tuple[torch.Tensor, ...]:
    """Outputs and gradients of all parameters."""
    with precision():
        outs = model(image)
        loss = sum(out.float().square().mean() for out in outs)
    return *outs, *torch.autograd.grad(loss, tuple(model.parameters()))
