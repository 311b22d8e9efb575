"""What tests share: where things are, golden arrays, random inputs of the op, and running a command."""

import contextlib
import io
import json
import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from dinat_backbones import neighborhood_attention_2d
from dinat_backbones.cli import convert
from dinat_backbones.ops import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
GOLDEN = DATA / "golden"
# what was published about every model: architecture, recipe, results, checkpoint
PUBLISHED = json.loads((DATA / "published.json").read_text())

# The backends that need no further package and so run on any machine; the others have files of their own.
EVERYWHERE = [name for name, backend in BACKENDS.items() if not backend.requires]


# arguments of the smallest backbone that has two stages
SMALL = dict(embed_dim=16, depths=[1, 2], num_heads=[1, 2], mlp_ratio=2.0, kernel_size=3, drop_path_rate=0.0)


def taking(dtype: torch.dtype, *but: str) -> list[str]:
    """Those of EVERYWHERE that run calls in `dtype`, and are not one of `but`."""
    qkv = [torch.zeros(1, 3, 3, 1, 8, dtype=dtype)] * 3
    return [name for name in EVERYWHERE if name not in but and not BACKENDS[name].unsupported(qkv, None, 3, 1, 1.0)]


def load_golden(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """A golden file's `meta` and arrays (outputs and gradients of the original code with natten 0.14.6)."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return json.loads(str(arrays.pop("meta"))), arrays


def fill_by_name(model: torch.nn.Module) -> torch.nn.Module:
    """The weights of the golden runs: every entry drawn from a generator seeded by its published name alone."""
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("rpb"):
            value = 0.5 * noise
        elif "gamma" in name:
            value = 0.3 + 0.1 * noise
        elif tensor.dim() == 1:
            value = float(name.endswith("weight")) + 0.1 * noise
        else:
            value = noise / tensor[0].numel() ** 0.5
        tensor.copy_(value)
    model.load_state_dict(state)
    return model


def published_state(family, embed_dim, depths, num_heads, mlp_ratio, layer_scale):
    """Names and shapes of a published backbone, typed from the description of the release (facts, not our modules)."""
    shapes = {}
    conv = family != "DiNAT_s"
    if conv:
        shapes |= {"patch_embed.proj.0.weight": (embed_dim // 2, 3, 3, 3), "patch_embed.proj.0.bias": (embed_dim // 2,)}
        shapes |= {
            "patch_embed.proj.1.weight": (embed_dim, embed_dim // 2, 3, 3),
            "patch_embed.proj.1.bias": (embed_dim,),
        }
    else:
        shapes |= {"patch_embed.proj.weight": (embed_dim, 3, 4, 4), "patch_embed.proj.bias": (embed_dim,)}
    norms = ["patch_embed.norm"]
    widths = {"patch_embed.norm": embed_dim}
    for i, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
        dim, stage = embed_dim * 2**i, f"{'levels' if conv else 'layers'}.{i}"
        for j in range(depth):
            block = f"{stage}.blocks.{j}"
            for layer, (rows, columns) in {
                "attn.qkv": (3 * dim, dim),
                "attn.proj": (dim, dim),
                "mlp.fc1": (int(dim * mlp_ratio), dim),
                "mlp.fc2": (dim, int(dim * mlp_ratio)),
            }.items():
                shapes |= {f"{block}.{layer}.weight": (rows, columns), f"{block}.{layer}.bias": (rows,)}
            shapes[f"{block}.attn.rpb"] = (heads, 13, 13)
            if layer_scale is not None:
                shapes |= {f"{block}.gamma1": (dim,), f"{block}.gamma2": (dim,)}
            widths |= {f"{block}.norm1": dim, f"{block}.norm2": dim}
        if i + 1 < len(depths):
            down = f"{stage}.downsample"
            shapes[f"{down}.reduction.weight"] = (2 * dim, dim, 3, 3) if conv else (2 * dim, 4 * dim)
            widths[f"{down}.norm"] = 2 * dim if conv else 4 * dim
        widths[f"norm{i}"] = dim
    for norm in {*norms, *widths}:
        shapes |= {f"{norm}.weight": (widths[norm],), f"{norm}.bias": (widths[norm],)}
    return shapes


# ---- the op


@pytest.fixture
def poison(monkeypatch):
    """Freshly allocated memory holds NaN, so that an element nobody wrote is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(batch, height, width, heads, dim, kernel_size, *, rpb=True, dtype=torch.float64, seed=0, fused=False):
    generator = torch.Generator().manual_seed(seed)
    if fused:  # views of one qkv projection, as the module makes them
        qkv = torch.randn(batch, height, width, 3, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
        tensors = list(qkv.unbind(3))
    else:
        shape = (batch, height, width, heads, dim)
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]
    table = torch.randn(heads, 2 * kernel_size - 1, 2 * kernel_size - 1, generator=generator, dtype=torch.float64)
    grad_out = torch.randn(batch, height, width, heads, dim, generator=generator, dtype=torch.float64).to(dtype)
    return tensors, table.to(dtype) if rpb else None, grad_out


def sample(index):
    """Shape number `index`: kernel 3..13, dilation 1..28, borders, H or W exactly K * d, strided or not."""
    rng = random.Random(index)
    kernel_size = rng.choice([3, 3, 5, 5, 7, 7, 9, 11, 13])
    limit = max(1, 60 // kernel_size)
    dilation = rng.choice([1, 1, 2, 3, rng.randint(1, limit), limit if kernel_size > 3 else 28])
    reach = kernel_size * dilation
    height, width = (reach + rng.choice([0, 0, 1, rng.randint(0, dilation), rng.randint(0, 20)]) for _ in range(2))
    if index % 10 == 0:
        width += 40  # several vectors of lanes
    dim = rng.choice([1, 3, 8, 8, 12, 16, 20])
    large = height * width > 1500
    return dict(
        shape=(1 if large else rng.randint(1, 2), height, width, 1 if large else rng.randint(1, 3), dim),
        kernel_size=kernel_size,
        dilation=dilation,
        rpb=rng.random() < 0.8,
        fused=rng.random() < 0.5,
    )


def run(tensors, rpb, grad_out, **settings):
    """Output and gradients of query, key, value (and rpb)."""
    inputs = [t.detach().requires_grad_() for t in (*tensors, rpb) if t is not None]
    query, key, value, *table = inputs
    out = neighborhood_attention_2d(query, key, value, *table, **settings)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]


def worst(got, expected):
    assert len(got) == len(expected)
    return max((a.double() - b.double()).abs().max().item() for a, b in zip(got, expected, strict=True))


def assert_near(got, expected, tolerance=1e-5):
    """Each tensor within `tolerance` of the largest magnitude in the one expected, whatever machine rounds how."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, (index, a.shape, b.shape)
        error, size = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
        assert error <= tolerance * size, f"tensor {index}: off by {error:.3g}, largest magnitude {size:.3g}"


def to_dtype(values, dtype):
    return [None if v is None else v.to(dtype) for v in values]


# ---- commands


def environment(*paths, **variables):
    """The environment for a process: this one's with `variables`, and `paths` before those of PYTHONPATH."""
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*map(str, paths), *([inherited] if inherited else [])])
    return {**os.environ, **({"PYTHONPATH": path} if path else {}), **variables}


def run_tool(*arguments, code=0):
    """`dinat convert` in this process: what it prints, or the message of an expected failure."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            convert.main([str(word) for word in arguments])
        except SystemExit as stopped:
            status = stopped.code
    if isinstance(status, str):
        err.write(status)
        status = 1
    assert status == code, err.getvalue()
    return out.getvalue() if code == 0 else err.getvalue()


def output_and_gradients(module, images):
    """The output, and the gradients of the sum of its squares."""
    out = module(images)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), list(module.parameters()))]


def send_output_and_gradients(pipe, module, images):
    """What a spawned process runs: it imports this file by its name."""
    pipe.send([tensor.numpy() for tensor in output_and_gradients(module, images)])
