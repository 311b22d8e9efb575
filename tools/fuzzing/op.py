"""Random calls of the op on every backend of this machine, beside float64, within bounds that follow from the dtype.

The bounds are those of a first-order error analysis, element by element: every logit, weight and sum may be off by what
an implementation loses that rounds in the dtype of its inputs; the C++ kernel rounds in float32 up to its results.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from dinat_backbones import neighborhood_attention_2d
from dinat_backbones.ops import BACKENDS

from .core import Session

LARGEST = 300_000  # products of one query and one key: what a case may cost
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")
NAMES = ("out", "grad_query", "grad_key", "grad_value", "grad_rpb", "grad_padding")


class Case(NamedTuple):
    """One call. `qkv` and `grad_out` are ``[B, H, W, heads, dim]``, `rpb` is ``[heads, 2K-1, 2K-1]`` or None, `padding`
    ``[3, heads, dim]`` or None."""

    backend: str
    qkv: list[Tensor]
    rpb: Tensor | None
    padding: Tensor | None
    grad_out: Tensor
    kernel_size: int
    dilation: int
    scale: float
    threads: int
    instruction_set: str
    backward: bool

    def __str__(self) -> str:
        query = self.qkv[0]
        table = "no rpb" if self.rpb is None else f"rpb {self.rpb.dtype} up to {self.rpb.abs().max():.3g}"
        return (
            f"{self.backend} {self.instruction_set} {query.dtype} {list(query.shape)} strides {query.stride()} "
            f"K={self.kernel_size} d={self.dilation} scale={self.scale:.3g} {table} "
            f"{self.threads} threads{' backward' * self.backward}{' padding' * (self.padding is not None)}"
        )


def draw(seed: int) -> list[Case]:
    """Case number `seed`: one call for every backend that takes it and every instruction set of the C++ kernel."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    kernel_size = rng.choice([3, 3, 5, 5, 7, 7, 7, 9, 11, 13])
    dilation = rng.choice([1, 1, 2, 3, 4, rng.randint(1, 9)])
    extent = 160 if rng.random() < 0.2 else 36  # of the window; most maps are small, for many calls
    dilation = min(dilation, max(1, extent // kernel_size))
    reach = kernel_size * dilation
    more = [0, 0, 1, rng.randint(0, dilation), rng.randint(0, reach), rng.randint(0, extent // 3)]
    height, width = reach + rng.choice(more), reach + rng.choice(more)
    padded = rng.random() < 0.3
    if padded:
        height, width = (rng.choice([size, rng.randint(1, reach)]) for size in (height, width))
    heads, dim, batch = (
        rng.choice([1, 1, 2, 3, 5]),
        rng.choice([1, 2, 3, 8, 12, 16, 20, 32, 33]),
        rng.choice([1, 1, 2, 3]),
    )
    area = max(height, reach) * max(width, reach)
    while batch * heads * area * kernel_size**2 * dim > LARGEST and max(batch, heads, dim) > 1:
        batch, heads, dim = (max(1, size // 2) for size in (batch, heads, dim))
    batch = 0 if rng.random() < 0.02 else batch
    shape = (batch, height, width, heads, dim)

    magnitude = rng.choice([0.1, 1.0, 1.0, 1.0, 4.0])
    qkv = [_strided(rng, generator, shape, dtype, magnitude) for _ in range(3)]
    if rng.random() < 0.4:  # of one projection, as the module has them
        qkv = list((magnitude * torch.randn((*shape[:3], 3, *shape[3:]), generator=generator)).to(dtype).unbind(3))
    padding = None
    if padded:
        padding = _strided(rng, generator, (1, 1, 3, heads, dim), dtype, magnitude)[0, 0]
    grad_out = _strided(rng, generator, shape, dtype, 1.0)
    if rng.random() < 0.1:  # of a sum or a mean
        grad_out = torch.ones((), dtype=dtype).expand(shape)
    rpb = None
    if rng.random() < 0.8:
        size = rng.choice([0.0, 0.5, 1.0, 1.0, 30.0, 1000.0 if dtype in (torch.float32, torch.float64) else 5.0])
        span = 2 * kernel_size - 1
        rpb = (size * torch.randn(heads, span, span, generator=generator)).to(rng.choice([dtype, torch.float32]))
    backward = rng.random() < 0.9
    with torch.set_grad_enabled(backward):
        asked = [t.detach().requires_grad_(backward) for t in qkv]
        backends = [n for n, b in BACKENDS.items() if not b.unsupported(asked, rpb, kernel_size, dilation, 1.0)]
    scale = rng.choice([dim**-0.5, dim**-0.5, rng.uniform(0.01, 2.0)])
    call = Case("", qkv, rpb, padding, grad_out, kernel_size, dilation, scale, 1, "", backward)
    cases = [call._replace(backend=backend) for backend in backends if backend != "cpu"]
    if "cpu" in backends:
        sets = [n for n in INSTRUCTION_SETS if BACKENDS["cpu"].use_instruction_set(n)]  # type: ignore[attr-defined]
        threads = rng.choice([1, 1, 1, 2, 3])  # torch's own would wait for each other on a busy machine
        cases += [call._replace(backend="cpu", instruction_set=name, threads=threads) for name in sets or [""]]
    return cases


def _strided(
    rng: random.Random, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, magnitude: float
) -> Tensor:
    """Random numbers in some layout: dense, permuted, every other element, one image for all."""
    layout = rng.choice(["dense", "dense", "permuted", "sliced", "expanded"])
    order = rng.sample(range(5), 5) if layout == "permuted" else list(range(5))
    sizes = [shape[axis] for axis in order]
    if layout == "sliced":
        sizes = [size * 2 for size in sizes]
    if layout == "expanded":
        sizes[0] = min(1, sizes[0])
    values = (magnitude * torch.randn(sizes, generator=generator, dtype=torch.float64)).to(dtype)
    if layout == "sliced":
        values = values[tuple(slice(rng.randint(0, 1), None, 2) for _ in shape)]
    return values.permute([order.index(axis) for axis in range(5)]).expand(shape)


def neighbors(length: int, kernel_size: int, dilation: int) -> tuple[Tensor, Tensor]:
    """For each position its K neighbors, and their rows of the bias table, both ``[length, K]``."""
    keys, rows = [], []
    for i in range(length):
        residue, position = i % dilation, i // dilation
        group = (length - residue + dilation - 1) // dilation
        start = min(max(position - kernel_size // 2, 0), group - kernel_size)
        keys.append([(start + k) * dilation + residue for k in range(kernel_size)])
        rows.append([start + k - position + kernel_size - 1 for k in range(kernel_size)])
    return torch.tensor(keys), torch.tensor(rows)


def rounds_weights(case: Case) -> bool:
    """Whether the C++ kernel multiplies in bfloat16."""
    return case.instruction_set in ("avx512_bf16", "amx_bf16") and case.qkv[0].dtype == torch.bfloat16


def expected(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients in float64, and how much each element may be off."""
    batch, map_height, map_width, heads, dim = case.qkv[0].shape
    height, width = map_height, map_width
    tensors = [t.double() for t in (*case.qkv, case.grad_out)]
    if case.padding is not None:
        reach = case.kernel_size * case.dilation
        height, width = max(height, reach), max(width, reach)
        for i, outside in enumerate((*case.padding.double(), torch.zeros(heads, dim, dtype=torch.float64))):
            whole = outside.expand(batch, height, width, heads, dim).clone()
            whole[:, :map_height, :map_width] = tensors[i]
            tensors[i] = whole
    query, key, value, grad_out = (t.permute(0, 3, 1, 2, 4).flatten(2, 3) for t in tensors)
    K, span = case.kernel_size, 2 * case.kernel_size - 1
    (rows, row_bias), (columns, column_bias) = (neighbors(size, K, case.dilation) for size in (height, width))
    index = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # [HW, K*K]
    table = (row_bias[:, None, :, None] * span + column_bias[None, :, None, :]).flatten(2).flatten(0, 1)
    keys, values = key[:, :, index], value[:, :, index]  # [B, heads, HW, K*K, dim]
    bias = torch.zeros(()) if case.rpb is None else case.rpb.double().flatten(1)[:, table]

    def over_dims(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bhqd,bhqkd->bhqk", a, b)

    def over_keys(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("bhqk,bhqkd->bhqd", a, b)

    def onto_keys(weights: Tensor, rows: Tensor) -> Tensor:
        out = torch.zeros_like(key).transpose(1, 2).flatten(2).transpose(0, 1).clone()  # [HW, B, heads * dim]
        terms = torch.einsum("bhqk,bhqd->qkbhd", weights, rows).flatten(3).flatten(0, 1)
        out.index_add_(0, index.flatten(), terms)
        return out.unflatten(2, (heads, dim)).permute(1, 2, 0, 3)

    def onto_table(weights: Tensor) -> Tensor:
        out = torch.zeros(heads, span * span, dtype=torch.float64)
        return out.index_add_(1, table.flatten(), weights.sum(0).flatten(1)).view(heads, span, span)

    logits = case.scale * over_dims(query, keys) + bias
    p = logits.softmax(-1)
    out = over_keys(p, values)
    grad_p = over_dims(grad_out, values)
    delta = (p * grad_p).sum(-1, keepdim=True)
    ds = p * (grad_p - delta)
    results = [out, case.scale * over_keys(ds, keys), case.scale * onto_keys(ds, query), onto_keys(p, grad_out)]

    # the same with magnitudes: what rounding in steps of `u` may change
    dtype = case.qkv[0].dtype
    last = torch.finfo(dtype).eps
    u = min(last, torch.finfo(torch.float32).eps) if case.backend == "cpu" else last
    # weights and their gradients are rounded for products of bfloat16
    w = last / 2 if rounds_weights(case) else 0.0
    n, many = K * K + 8, min(4 * K * K, 64) + 8  # terms of sums over a window, and over the queries that see a key
    q_, k_, v_, g_ = query.abs(), keys.abs(), values.abs(), grad_out.abs()
    e_logits = u * ((dim + 4) * case.scale * over_dims(q_, k_) + 4 * bias.abs())
    below = (logits - logits.amax(-1, keepdim=True)).abs()
    relative = 2 * e_logits.amax(-1, keepdim=True) + 2 * u * (below + (p * below).sum(-1, keepdim=True)) + n * u
    # 2: weights below exp(-87), 1.4 times the smallest normal number, are zeros in the C++ kernel
    e_p = p * torch.expm1(relative.clamp(max=20)) + 2 * torch.finfo(dtype).tiny
    e_out = over_keys(e_p + (n * u + w) * p, v_) + 2 * u * out.abs()
    e_grad_p = u * (dim + 2) * over_dims(g_, v_)
    e_delta = (e_p * grad_p.abs() + p * e_grad_p + n * u * p * grad_p.abs()).sum(-1, keepdim=True)
    e_delta = e_delta + (g_ * e_out).sum(-1, keepdim=True) + u * dim * (g_ * out.abs()).sum(-1, keepdim=True)
    e_ds = e_p * (grad_p - delta).abs() + p * (e_grad_p + e_delta) + 4 * u * p * (grad_p.abs() + delta.abs())
    e_ds = e_ds + torch.finfo(dtype).tiny
    bounds = [
        e_out + 2 * last * out.abs(),
        case.scale * over_keys(e_ds + (n * u + w) * ds.abs(), k_) + 2 * last * results[1].abs(),
        case.scale * onto_keys(e_ds + (many * u + w) * ds.abs(), q_) + 2 * last * results[2].abs(),
        onto_keys(e_p + (many * u + w) * p, g_) + 2 * last * results[3].abs(),
    ]
    maps = [[t.unflatten(2, (height, width)).permute(0, 2, 3, 1, 4) for t in tensors] for tensors in (results, bounds)]
    if case.rpb is not None:
        last = torch.finfo(case.rpb.dtype).eps
        u = max(u, last) if case.backend != "cpu" else u
        terms = min(batch * height * width, 64) + 8
        maps[0].append(onto_table(ds))
        maps[1].append(onto_table(e_ds + terms * u * ds.abs()) + 2 * last * maps[0][-1].abs())
    if case.padding is not None:
        terms = min(batch * height * width * K * K, 64) + 8
        sizes = case.scale * onto_keys(ds.abs(), q_), onto_keys(p, g_)
        bounds = [bound + terms * u * size for bound, size in zip(bounds[2:], sizes, strict=True)]
        last = torch.finfo(dtype).eps
        sums = [_outside(t, height, width, map_height, map_width) for t in (*results[2:], *bounds)]
        nothing = torch.zeros_like(sums[0])
        maps[0].append(torch.stack([nothing, *sums[:2]]))
        maps[1].append(torch.stack([nothing, *sums[2:]]) + 2 * last * maps[0][-1].abs())
    for tensors in maps:
        tensors[:4] = [t[:, :map_height, :map_width] for t in tensors[:4]]
    return maps[0], maps[1]


def _outside(keys: Tensor, height: int, width: int, map_height: int, map_width: int) -> Tensor:
    """``[B, heads, height * width, dim]`` summed over images and over what is outside of the map: ``[heads, dim]``."""
    inside = torch.zeros(height, width, dtype=torch.bool)
    inside[:map_height, :map_width] = True
    return keys[:, :, ~inside.flatten()].sum((0, 2))


def compute(case: Case) -> list[Tensor]:
    """Output and gradients of the backend."""
    query, key, value, rpb, padding = (
        None if t is None else t.detach().requires_grad_() for t in (*case.qkv, case.rpb, case.padding)
    )
    inputs = [t for t in (query, key, value, rpb, padding) if t is not None]
    settings = dict(kernel_size=case.kernel_size, dilation=case.dilation, scale=case.scale, backend=case.backend)
    if case.instruction_set:
        BACKENDS["cpu"].use_instruction_set(case.instruction_set)  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with torch.set_grad_enabled(case.backward):
            out = neighborhood_attention_2d(query, key, value, rpb, padding=padding, **settings)  # type: ignore[arg-type]
        return [
            out.detach(),
            *(torch.autograd.grad(out, inputs, case.grad_out, materialize_grads=True) if case.backward else ()),
        ]
    finally:
        torch.set_num_threads(before)


def compare(cases: list[Case]) -> list[float]:
    """For each of the cases, which have the same inputs, the largest share of its bound that an element is off.

    Raises:
        AssertionError: it is more than 1, or a shape or dtype is not that of the input.
    """
    shares = []
    references: dict[tuple[bool, bool], tuple[list[Tensor], list[Tensor]]] = {}  # by how often a backend rounds
    for case in cases:
        rounding = case.backend == "cpu", rounds_weights(case)
        if rounding not in references:
            references[rounding] = expected(case)
        largest = 0.0
        names = [name for name in NAMES if name != "grad_rpb" or case.rpb is not None]
        for name, got, reference, bound in zip(names, compute(case), *references[rounding], strict=False):
            assert got.shape == reference.shape, f"{name} has shape {list(got.shape)}; {case}"
            if got.numel():
                # not exceeding NaN is no pass
                share = (got.double() - reference).abs() / bound.clamp(min=torch.finfo(got.dtype).tiny)
                worst = share.max().item() if not share.isnan().any() else float("nan")
                assert worst <= 1, f"{name} is off by {worst:.3g} times the bound; {case}"
                largest = max(largest, worst)
        shares.append(largest)
    return shares


def run(session: Session) -> None:
    """`python tools/fuzz.py op`."""
    shares: dict[str, float] = {}

    def one(seed: int) -> str:
        cases = draw(seed)
        for case, share in zip(cases, compare(cases), strict=True):
            dtype = str(case.qkv[0].dtype).removeprefix("torch.")
            name = " ".join(filter(None, (case.backend, case.instruction_set, dtype)))
            shares[name] = max(shares.get(name, 0.0), share)
            session.outcomes[f"calls of {name}"] += 1
            session.outcomes["calls"] += 1
        return "inputs"

    session.try_each(one)
    session.notes.append(
        "largest error in bounds: " + ", ".join(f"{name} {share:.2g}" for name, share in sorted(shares.items()))
    )
