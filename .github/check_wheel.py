"""What an installed wheel or sdist has to do outside the checkout: compute with its kernel, and bring its configs."""

import importlib.metadata
from pathlib import Path

import torch

import dinat_backbones

package = Path(dinat_backbones.__file__).parent
assert package.parent.name == "site-packages", package
assert importlib.metadata.version("dinat_backbones") == dinat_backbones.__version__
assert (package / "py.typed").is_file()
assert list((package / ".mim" / "configs").rglob("*_coco.py"))
assert list((package / ".mim" / "mask2former" / "configs").rglob("*.yaml"))

qkv = [torch.randn(1, 14, 15, 2, 8, requires_grad=True) for _ in range(3)]
bias = torch.randn(2, 13, 13, requires_grad=True)
results = {}
for backend in ("cpu", "reference"):
    out = dinat_backbones.neighborhood_attention_2d(*qkv, bias, kernel_size=7, dilation=2, backend=backend)
    results[backend] = [out, *torch.autograd.grad(out.square().sum(), (*qkv, bias))]
for got, expected in zip(results["cpu"], results["reference"], strict=True):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
print(package, "computes with its kernel what the reference does")
