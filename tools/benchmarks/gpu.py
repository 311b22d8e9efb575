"""The GPU suite: our kernel with bias against natten without and FlexAttention with, and DiNAT-L against Swin-L.

Everything is in bfloat16 on the maps that DiNAT-Tiny and -Large have on a COCO image. Dry, the same code runs on a CPU
at tiny sizes, a Triton kernel in Triton's interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from dinat_backbones import zoo
from dinat_backbones.backbone import DiNAT
from dinat_backbones.ops import BACKENDS, neighborhood_attention_2d

from . import baselines
from .core import Bar, Bench, ParityError, Row, agree

KERNEL, HEAD_DIM = 7, 32
FLEX_STAGES = (0, 2)  # compiling FlexAttention for every shape would take longer than all the rest
BUDGET = 400.0  # seconds after which no more baselines are compiled
ROUNDING = 3e-2  # bfloat16 keeps 8 bits


@dataclass(frozen=True)
class Setting:
    """Where and at which size; `dry` runs on a CPU."""

    dry: bool
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    image: tuple[int, int] = (800, 1216)
    batch: int = 2
    train_batch: int = 1

    @classmethod
    def of(cls, dry: bool) -> "Setting":
        return cls(dry, "cpu", torch.float32, (32, 64), 1, 1) if dry else cls(dry)


@dataclass(frozen=True)
class Case:
    """One call of the op as it happens in a published model; `size` after padding."""

    name: str
    size: tuple[int, int]
    heads: int
    dilation: int
    stage: int


def cases(setting: Setting) -> list[Case]:
    found = []
    for arch in ("dinat_tiny", "dinat_large"):
        for stage, dilations in enumerate(zoo.dilations(arch, "coco")):
            if setting.dry and (stage or arch == "dinat_large"):
                continue
            for dilation in sorted({1, 2 if setting.dry else max(dilations)}):
                size = tuple(max(-(-side // 4 // 2**stage), KERNEL * dilation) for side in setting.image)
                name = f"{arch} stage {stage + 1} {size[0]}x{size[1]} d={dilation}"
                found.append(Case(name, size, zoo.ARCHS[arch].num_heads[stage], dilation, stage))
    return found


class Inputs:
    """Leaves of one call: query, key and value apart, in the op's layout, a bias table, and a gradient."""

    def __init__(self, case: Case, setting: Setting):
        generator = torch.Generator(setting.device).manual_seed(0)
        options = dict(generator=generator, device=setting.device)
        shape = (setting.batch, *case.size, case.heads, HEAD_DIM)
        self.qkv = [torch.randn(shape, **options).to(setting.dtype).requires_grad_() for _ in range(3)]
        span = 2 * KERNEL - 1
        self.rpb = (0.5 * torch.randn(case.heads, span, span, **options)).requires_grad_()
        self.grad_out = torch.randn(shape, **options).to(setting.dtype)

    def step(self, function: Callable, rpb: bool = True) -> tuple[torch.Tensor, ...]:
        """Output, then the gradients of all inputs."""
        inputs = (*self.qkv, self.rpb) if rpb else tuple(self.qkv)
        out = function(*self.qkv, self.rpb if rpb else None)
        return out.detach(), *torch.autograd.grad(out, inputs, self.grad_out)


def ours(case: Case, setting: Setting) -> str:
    """The backend that is measured: `triton` where it runs."""
    inputs = Inputs(Case("", (KERNEL, KERNEL), 1, 1, 0), setting)
    triton = BACKENDS.get("triton")
    runs = triton is not None and not triton.unsupported(inputs.qkv, inputs.rpb, KERNEL, 1, HEAD_DIM**-0.5)
    return "triton" if runs else "tiled"


def attend(case: Case, backend: str) -> Callable:
    def call(query, key, value, rpb):
        return neighborhood_attention_2d(
            query, key, value, rpb, kernel_size=KERNEL, dilation=case.dilation, backend=backend
        )

    return call


def floor_ms(case: Case, setting: Setting, flops_per_s: float, bytes_per_s: float) -> float:
    """Least time of forward and backward: two products forward and five backward over K * K keys per query; q, k, v
    read and the output written, then all four read with a gradient and three gradients written."""
    pixels = setting.batch * case.size[0] * case.size[1] * case.heads * HEAD_DIM
    flops = 2 * 7 * pixels * KERNEL**2
    moved = 12 * pixels * setting.dtype.itemsize
    return 1e3 * max(flops / flops_per_s, moved / bytes_per_s)


def machine(bench: Bench, setting: Setting) -> tuple[float, float]:
    """Multiply-adds as operations per second of a large product, and bytes per second of a large copy."""
    side = 64 if setting.dry else 8192
    square = torch.randn(side, side, device=setting.device, dtype=setting.dtype)
    block = torch.empty(side**2 * 4, device=setting.device)
    target = torch.empty_like(block)
    times = bench.times("machine", {"product": lambda: square @ square, "copy": lambda: target.copy_(block)})
    return 2e3 * side**3 / times["product"], 2e3 * block.nbytes / times["copy"]


def parity(bench: Bench, setting: Setting) -> None:
    """Ours against the reference in float32 of the same numbers, at a small size, forward and all gradients."""
    for dilation in (1, 2):
        case = Case("parity", (KERNEL * dilation + 3, KERNEL * dilation + 9), 2, dilation, 0)
        inputs = Inputs(case, setting)
        exact = Inputs(case, setting)
        exact.qkv = [t.detach().float().requires_grad_() for t in inputs.qkv]
        exact.rpb, exact.grad_out = inputs.rpb.detach().requires_grad_(), inputs.grad_out.float()
        backend = ours(case, setting)
        expected = exact.step(attend(case, "reference"))
        agree(f"{backend}, d={dilation}, against reference", inputs.step(attend(case, backend)), expected, ROUNDING)
        flex = baselines.Flex(case.size, KERNEL, dilation, setting.device)
        with torch.no_grad():
            got = flex(*map(flex.sort, exact.qkv), exact.rpb)
        agree(f"FlexAttention, d={dilation}, against reference", [got], [flex.sort(expected[0])], ROUNDING)
    bench.say(f"parity: {backend} and FlexAttention agree with the reference, forward and our gradients")


def op_rows(bench: Bench, setting: Setting) -> list[Row]:
    speed = machine(bench, setting)
    rows = []
    for case in cases(setting):
        inputs, backend = Inputs(case, setting), ours(case, setting)
        call = attend(case, backend)
        calls = {backend: lambda inputs=inputs, call=call: inputs.step(call)}
        reasons = BACKENDS["natten"].unsupported(inputs.qkv, None, KERNEL, case.dilation, 1.0)
        if not reasons:
            plain = attend(case, "natten")
            agree(f"{case.name}: natten without bias", [plain(*inputs.qkv, None)], [call(*inputs.qkv, None)], ROUNDING)
            calls["natten"] = lambda inputs=inputs, plain=plain: inputs.step(plain, rpb=False)
        flex_note = _add_flex(bench, setting, case, inputs, call, calls)
        times = bench.times(case.name, calls)
        mine = times[backend]
        name = f"{case.name}, {backend} with rpb"
        for baseline, bar, note in (
            ("natten", Bar(">=", 1), "; ".join(reasons)),
            ("FlexAttention", Bar(">=", 2), flex_note),
        ):
            against = f"{baseline} {'without' if baseline == 'natten' else 'with'} rpb"
            if baseline in times:
                rows.append(Row(name, mine, against, times[baseline], times[baseline] / mine, bar))
            else:
                rows.append(Row(name, mine, against, note=note))
        floor = floor_ms(case, setting, *speed)
        rows.append(Row(f"{case.name}, fraction of floor", mine, "bytes or FLOPs", floor, floor / mine))
        rows.append(_memory(case, setting, inputs, calls[backend]))
        bench.curve(
            "tokens" if case.dilation == 1 else "tokens, dilated", case.size[0] * case.size[1] * case.heads, times
        )
    return rows


def _add_flex(bench: Bench, setting: Setting, case: Case, inputs: Inputs, call: Callable, calls: dict) -> str:
    """Adds FlexAttention to the calls, or says why not."""
    if case.stage not in FLEX_STAGES:
        return "stages 1 and 3 only, each shape compiles anew"
    if bench.elapsed > BUDGET:
        return f"not compiled: {BUDGET:.0f} s had passed"
    try:
        flex = baselines.Flex(case.size, KERNEL, case.dilation, setting.device)
        sorted_inputs = Inputs.__new__(Inputs)
        sorted_inputs.qkv = [flex.sort(t.detach()).requires_grad_(not setting.dry) for t in inputs.qkv]
        sorted_inputs.rpb, sorted_inputs.grad_out = inputs.rpb, flex.sort(inputs.grad_out)
        with torch.no_grad():
            got, expected = flex(*(t.detach() for t in sorted_inputs.qkv), inputs.rpb), call(*inputs.qkv, inputs.rpb)
        agree(f"{case.name}: FlexAttention", [got], [flex.sort(expected)], ROUNDING)
        if setting.dry:  # torch refuses its gradients on a CPU
            calls["FlexAttention"] = torch.no_grad()(lambda: flex(*sorted_inputs.qkv, inputs.rpb))
        else:
            sorted_inputs.step(flex)
            calls["FlexAttention"] = lambda: sorted_inputs.step(flex)
    except ParityError:
        raise
    except Exception as error:  # a baseline that does not compile or run is a result, too
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}" if str(error) else type(error).__name__
    return ""


def _memory(case: Case, setting: Setting, inputs: Inputs, call: Callable) -> Row:
    """Peak of forward and backward over inputs, output and all gradients, as a ratio."""
    name, bar = f"{case.name}, peak memory", Bar("<=", 1.05)
    if setting.device != "cuda":
        return Row(name, unit="MB", bar=bar, note="needs a GPU")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    peak = torch.cuda.max_memory_allocated() - before
    held = sum(t.nbytes for t in (*results, *inputs.qkv, inputs.rpb, inputs.grad_out))
    peak += sum(t.nbytes for t in (*inputs.qkv, inputs.rpb, inputs.grad_out))
    return Row(name, peak / 1e6, "inputs and outputs", held / 1e6, peak / held, bar, unit="MB")


def train_rows(bench: Bench, setting: Setting) -> list[Row]:
    torch.manual_seed(0)
    if setting.dry:
        small = dict(embed_dim=32, depths=[1, 1], num_heads=[1, 2])
        model = DiNAT(**small, mlp_ratio=2.0, dilations=[[1], [2]], kernel_size=3)
        swin = baselines.swin_large(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4))
    else:
        model, swin = DiNAT(arch="dinat_large", dilations="coco"), baselines.swin_large()
    image = torch.randn(setting.train_batch, 3, *setting.image, device=setting.device)

    def step(network) -> Callable:
        network.to(setting.device).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

        def call():
            optimizer.zero_grad()
            with torch.autocast(setting.device, torch.bfloat16, enabled=not setting.dry):
                loss = sum(out.float().square().mean() for out in network(image))
            loss.backward()
            optimizer.step()

        return call

    name = f"DiNAT-L training step {setting.image[0]}x{setting.image[1]}, batch {setting.train_batch}"
    calls = {"ours": step(model), "Swin-L": step(swin)}
    times = bench.times(name, calls)
    ratio = times["Swin-L"] / times["ours"]
    return [Row(name, times["ours"], "torchvision Swin-L", times["Swin-L"], ratio, Bar(">=", 1))]


def run(bench: Bench, setting: Setting) -> list[Row]:
    """The whole suite, parity first."""
    parity(bench, setting)
    rows = op_rows(bench, setting) + train_rows(bench, setting)
    if setting.dry:
        for row in rows:
            row.bar, row.note = None, row.note or "dry run: the figures mean nothing"
    return rows
