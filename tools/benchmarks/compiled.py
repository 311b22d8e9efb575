"""`torch.compile`: how many graphs the image sizes of a training run need; inference and training steps, compiled."""

import random

import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend

from . import baselines
from .backbones import backbone, forward_backward, random_image, training_step
from .core import Bar, Bench, Row, agree, inference, seconds

IMAGES = 40
MODEL = "DiNAT-Mini"


def recipe_sizes(bench: Bench) -> list[tuple[int, int]]:
    """Sizes of batches in the 3x recipe: short side 480 to 800, long side up to 1333, padded to multiples of 32."""
    rng, sizes = random.Random(0), []
    for _ in range(IMAGES):
        short, ratio = rng.choice(range(480, 801, 32)), rng.choice([1.0, 1.33, 1.5, 1.78])
        scale = bench.sizes.image[0] / 800
        sides = [-(-int(side * scale) // 32) * 32 for side in (short, min(1333, short * ratio))]
        sizes.append(tuple(sides if rng.random() < 0.7 else reversed(sides)))
    return sizes


def parity_compiled(bench: Bench) -> None:
    torch.compiler.reset()
    model = backbone("dinat_mini")
    compiled = torch.compile(model, dynamic=True, backend="aot_eager")
    for size in ((96, 128), (160, 64)):
        image = random_image(size)
        agree(f"{MODEL} compiled, {size}", inference(compiled, image)(), inference(model, image)())
    bench.say("parity: the compiled backbone agrees with the eager one")


def compiled_rows(bench: Bench) -> list[Row]:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = backbone("dinat_mini").train()
    training = torch.compile(model, backend=counter)  # the second size makes sizes dynamic
    graphs = []
    for number, size in enumerate(recipe_sizes(bench), 1):
        before = counter.frame_count
        training(random_image(size, 2))
        if counter.frame_count > before:
            graphs.append(number)
            bench.say(f"image {number}, {size[0]}x{size[1]}: a graph was compiled")
    name = f"graphs compiled in {IMAGES} images of the 3x recipe"
    rows = [Row(name, len(graphs), bar=Bar("<=", 2), unit="")]

    torch.compiler.reset()
    model, image = backbone("dinat_mini"), random_image(bench.sizes.image)
    compiled = inference(torch.compile(model, backend=bench.sizes.compiler), image)
    bench.say(f"compiling {MODEL}")
    agree(f"{MODEL} compiled for the full size", compiled(), inference(model, image)())
    bar = Bar(">=", 1.15)
    rows.append(bench.speedup(f"{MODEL} forward, compiled", compiled, "eager", inference(model, image), bar))
    return rows


def compile_for_training(bench: Bench, name: str, model: nn.Module, image: torch.Tensor) -> nn.Module:
    """The compiled model, whose outputs and gradients are those of the eager one."""
    compiled, got = torch.compile(model.train(), backend=bench.sizes.compiler), []
    bench.say(f"compiling {name}, forward and backward, which takes minutes")
    took = seconds(lambda: got.extend(forward_backward(compiled, image)))
    expected = forward_backward(model, image)
    outs = len(expected) - len(list(model.parameters()))
    agree(f"{name} compiled, outputs", got[:outs], expected[:outs])
    scale = max(gradient.abs().max() for gradient in expected[outs:])
    pairs = ([gradient / scale for gradient in gradients[outs:]] for gradients in (got, expected))
    agree(f"{name} compiled, gradients over the largest of them", *pairs)
    bench.say(f"parity: {name}, compiled in {took:.0f} s, agrees with the eager one, outputs and gradients")
    return compiled


def train_step_rows(bench: Bench) -> list[Row]:
    """Without drop path, whose random numbers are others when compiled."""
    torch.compiler.reset()
    image = random_image(bench.sizes.train_image, bench.sizes.train_batch)
    name, swin = f"DiNAT-Tiny training step, batch {len(image)}, compiled", "torchvision Swin-T"
    model, theirs = backbone("dinat_tiny", drop_path_rate=0.0), baselines.SwinPyramid(drop_path_rate=0.0)
    calls = {
        "ours": training_step(compile_for_training(bench, "DiNAT-Tiny", model, image), image),
        "eager": training_step(model, image),
    }
    bars, failed = {"eager": None, f"{swin}, compiled": Bar(">=", 1.25)}, []
    try:
        calls[f"{swin}, compiled"] = training_step(compile_for_training(bench, swin, theirs, image), image)
    except BackendCompilerFailed as error:  # Swin with torch 2.11 on AVX-512
        note = f"not timed: torch.compile fails on {swin}, {str(error.inner_exception).splitlines()[0]}"
        failed = [Row(name, against=f"{swin}, compiled", bar=bars[f"{swin}, compiled"], note=note)]
    times = bench.times(name, calls)
    ours = times.pop("ours")
    return [Row(name, ours, other, ms, ms / ours, bars[other]) for other, ms in times.items()] + failed
