"""`torch.compile`: how many graphs the image sizes of a training run need, and compiled inference beside eager."""

import random

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from .backbones import backbone, random_image
from .core import Bar, Bench, Row, agree, inference

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
    compiled = inference(torch.compile(model), image)
    bench.say(f"compiling {MODEL}")
    agree(f"{MODEL} compiled by Inductor", compiled(), inference(model, image)())
    bar = Bar(">=", 1.15)
    rows.append(bench.speedup(f"{MODEL} forward, compiled", compiled, "eager", inference(model, image), bar))
    return rows
