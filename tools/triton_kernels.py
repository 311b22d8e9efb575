#!/usr/bin/env python
"""What the Triton kernels need on a GPU, and which tiles suit them best.

    python tools/triton_kernels.py compile [--arch 80 90] [--kernel-size 7] [--head-dim 32] [--dtype bfloat16]
    python tools/triton_kernels.py tune    [--kernel-size 7] [--head-dim 32] [--dtype bfloat16] [--map 200 320]

`compile` needs no GPU: it compiles the kernels for an architecture and prints registers and spilled bytes per thread,
shared memory per program, instructions in the inner loop per logit, and how many programs fit on one multiprocessor.
`tune` tries the candidates on the GPU at hand, each checked against the present choice before it is timed, and prints
the line to paste into `TUNED` of dinat_backbones/ops/backends/triton_backend.py. With TRITON_INTERPRET=1 and --quick
the tests run it on a CPU, where the figures mean nothing.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from dinat_backbones.ops import BACKENDS
from dinat_backbones.ops.backends import triton_backend as op

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# shared memory that one program may use, in KiB, by compute capability (CUDA C++ Programming Guide, table 30)
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227}
SHARED_ALL_KIB = {80: 164, 86: 100, 89: 100, 90: 228}
THREADS = {80: 2048, 86: 1536, 89: 1536, 90: 2048}


@dataclass
class Report:
    kernel: str
    arch: int
    tiles: op.Tiles
    registers: int  # per thread
    spilled: int  # bytes stored and loaded per thread
    shared: int  # bytes per program
    instructions: float  # of the inner loop, per logit

    @property
    def programs(self) -> int:
        """On one multiprocessor at a time."""
        threads = 32 * self.tiles.warps
        by_registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        by_shared = SHARED_ALL_KIB[self.arch] * 1024 // (self.shared + 1024)
        return min(by_registers, by_shared, THREADS[self.arch] // threads)


def compile_kernel(
    kernel: str, tiles: op.Tiles, kernel_size: int, head_dim: int, dtype: torch.dtype, arch: int, rpb: bool = True
) -> Report:
    """Compile one of `op.KERNELS` without a GPU, as a call with aligned tensors would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dinat_backbones.ops.backends import triton_kernels

    function = getattr(triton_kernels, f"{kernel}_kernel")
    constants = op.constants(kernel_size, head_dim, rpb) | tiles.constants()
    constants |= op.gradient_constants(kernel_size, atomic=True)
    signature, attributes = {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "scale":
            signature[name] = "fp32"
        elif name in triton_kernels.SIZES:
            signature[name] = "i32"
        else:
            float32 = name in ("rpb", "lse", "delta", "grad_rpb")
            signature[name] = "i32" if name.startswith("stride") else "*fp32" if float32 else f"*{SHORT[dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
    used = {name: value for name, value in constants.items() if name in function.arg_names}
    source = ASTSource(function, signature, used, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=tiles.options())
    programs = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(compiled.asm["ptx"])
        target = re.search(r"\.target (sm_\w+)", ptx.read_text())[1]
        usage = subprocess.run(
            [programs / "ptxas", "-v", f"--gpu-name={target}", ptx, "-o", cubin],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
        code = subprocess.run([programs / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    spilled = sum(int(count) for count in re.findall(r"(\d+) bytes spill", usage))
    registers = int(re.search(r"Used (\d+) registers", usage)[1])
    per_thread = tiles.tile_rows * tiles.tile_columns * tiles.rows * tiles.columns / (32 * tiles.warps)
    instructions = _inner_loop(code) / per_thread
    return Report(kernel, arch, tiles, registers, spilled, compiled.metadata.shared, instructions)


def _inner_loop(code: str) -> int:
    """Instructions of the loop that holds a matrix product and no other such loop; 0 if there is none."""
    lines, labels, loops = [], {}, []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?);", line):
            lines.append(instruction[1])
            jump = re.search(r"BRA.*?(\.L\w+)", instruction[1])
            if jump and jump[1] in labels:
                loops.append(lines[labels[jump[1]] :])
    products = [len(loop) for loop in loops if any("MUFU.EX2" in instruction for instruction in loop)]
    return min(products, default=0)


def print_reports(arguments: argparse.Namespace) -> None:
    print("kernel          arch  tile   keys   warps stages  registers  spilled  shared  per logit  programs/SM")
    dtype = DTYPES[arguments.dtype]
    for arch in arguments.arch:
        for kernel, tiles in zip(op.KERNELS, op.tiles(arguments.kernel_size, arguments.head_dim, dtype), strict=True):
            report = compile_kernel(kernel, tiles, arguments.kernel_size, arguments.head_dim, dtype, arch)
            print(
                f"{kernel:15s} sm_{arch} {tiles.tile_rows:2d}x{tiles.tile_columns:<2d} "
                f" {tiles.rows:2d}x{tiles.columns:<2d}"
                f"  {tiles.warps:5d} {tiles.stages:6d}  {report.registers:9d}  {report.spilled:7d}  {report.shared:6d}"
                f"  {report.instructions:9.1f}  {report.programs:11d}",
                flush=True,
            )


def candidates(kernel_size: int, quick: bool) -> Iterator[op.Tiles]:
    """Tiles whose threads hold 8 to 32 logits at a time and that waste no more than two thirds of the columns."""
    shapes = [(8, 4), (8, 8), (16, 4), (4, 16), (16, 8)]
    for (rows, columns), at_a_time, warps, stages in itertools.product(shapes, (32, 64), (2, 4, 8), (1, 2, 3)):
        width = op.power_of_two(columns + kernel_size - 1)
        logits = rows * columns * at_a_time / (32 * warps)
        if (
            width > at_a_time
            or columns + kernel_size - 1 < width / 3
            or not 8 <= logits <= 32
            or rows * at_a_time < 16 * width
        ):
            continue
        yield op.Tiles(rows, columns, at_a_time // width, width, warps, stages)
        if quick:
            return


def tune(arguments: argparse.Namespace) -> None:
    from triton.testing import do_bench

    kernel_size, head_dim, dtype = arguments.kernel_size, arguments.head_dim, DTYPES[arguments.dtype]
    if not torch.cuda.is_available() and not (op._interpreted and arguments.quick):
        raise SystemExit("tune: no CUDA GPU; without one, TRITON_INTERPRET=1 with --quick shows that it runs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    height, width = (2 * kernel_size,) * 2 if arguments.quick else arguments.map
    heads, scale = 1 if arguments.quick else arguments.heads, head_dim**-0.5
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    qkv, rpb = draw(1, height, width, 3, heads, head_dim), draw(heads, 2 * kernel_size - 1, 2 * kernel_size - 1).float()
    grad_out = draw(1, height, width, heads, head_dim)
    settings = [[qkv], rpb, kernel_size, arguments.dilation, scale]
    backend = BACKENDS["triton"]
    out, lse = backend.op(*settings)
    calls = {
        "forward": lambda: backend.op(*settings),
        "query_gradient": lambda: backend.backward_op(grad_out, out, lse, *settings),
    }
    calls["key_gradient"] = calls["query_gradient"]

    def milliseconds(call) -> float:
        if device == "cuda":
            return do_bench(call, warmup=25, rep=100, return_mode="median")
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)

    key = kernel_size, head_dim, dtype
    best = list(op.tiles(*key))
    for index, kernel in enumerate(op.KERNELS):
        expected = [t.float() for t in calls[kernel]()]
        fastest = milliseconds(calls[kernel])
        print(f"{kernel}: {tuple(best[index])} as it is {fastest:.3f} ms", flush=True)
        for tiles in candidates(kernel_size, arguments.quick):
            op.TUNED[key] = (*best[:index], tiles, *best[index + 1 :])
            try:
                got = [t.float() for t in calls[kernel]()]
                worst = max((((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)))
                if not worst < 1e-2:
                    raise RuntimeError(f"differs from the present choice by {worst:.1e}")
                took = milliseconds(calls[kernel])
            except Exception as error:  # too much shared memory, a compiler that gives up: not a candidate
                print(f"{kernel}: {tuple(tiles)} does not run: {str(error).splitlines()[0]}", flush=True)
                continue
            print(f"{kernel}: {tuple(tiles)} {took:.3f} ms{' *' if took < fastest else ''}", flush=True)
            if took < fastest:
                fastest, best[index] = took, tiles
        op.TUNED[key] = tuple(best)
    where = torch.cuda.get_device_name() if device == "cuda" else "the interpreter: means nothing"
    chosen = ", ".join(f"Tiles{tuple(tiles)}" for tiles in best)
    print(f"    ({kernel_size}, {head_dim}, {dtype}): ({chosen}),  # {where}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("compile", "tune"))
    parser.add_argument("--kernel-size", type=int, default=7)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, default=[80, 90], help="for compile")
    parser.add_argument("--map", type=int, nargs=2, default=(200, 320), metavar=("HEIGHT", "WIDTH"), help="for tune")
    parser.add_argument("--heads", type=int, default=4, help="for tune")
    parser.add_argument("--dilation", type=int, default=1, help="for tune")
    parser.add_argument("--quick", action="store_true", help="for tune: a tiny map and one candidate")
    arguments = parser.parse_args()
    (print_reports if arguments.command == "compile" else tune)(arguments)


if __name__ == "__main__":
    main()
