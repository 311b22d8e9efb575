"""Package metadata, and the CPU kernel as an optional extension.

The kernel is a plain shared library with a C interface: it needs a C++17 compiler (GCC, Clang or MSVC), but neither
torch nor Python headers, so one build serves every torch and Python version. Without a compiler the installation goes
on.
"""

import contextlib
import glob
import os
import shutil
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70
    from wheel.bdist_wheel import bdist_wheel

CPU = "dinat_backbones/ops/backends/cpu"
# What is built for, which on macOS need not be the machine it is built on; "universal2" gets the baseline alone.
X86 = sysconfig.get_platform().endswith(("x86_64", "amd64"))
# name, vector width in floats, flags of GCC and Clang, flags of MSVC; kernel.cpp is compiled once for each
INSTRUCTION_SETS = [("baseline", 4, [], [])]
if X86:
    AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mprefer-vector-width=512"]
    INSTRUCTION_SETS += [
        ("avx2", 8, ["-mavx2", "-mfma"], ["/arch:AVX2"]),
        ("avx512", 16, AVX512, ["/arch:AVX512"]),
    ]
# Products of bfloat16: name, source, flags. Known to GCC from 10 and 11 on, to Clang from 9 and 11 on; a set that the
# compiler does not know is left out, and what comes after it.
BF16_SETS = []
if X86:
    BF16 = [*AVX512, "-mavx512bf16"]
    BF16_SETS = [
        ("avx512_bf16", "kernel.cpp", BF16),
        ("amx_bf16", "amx.cpp", [*BF16, "-mamx-tile", "-mamx-bf16"]),
    ]
FLAGS = ["-std=c++17", "-O3", "-g0", "-fPIC", "-fvisibility=hidden"]
MSVC_FLAGS = ["/std:c++17", "/O2", "/EHsc"]


class BuildKernel(build_ext):
    """Compiles kernel.cpp per instruction set and links everything into one library."""

    def build_extension(self, ext):
        msvc = self.compiler.compiler_type == "msvc"

        def compile_(source, flags, macros, folder=""):
            return self.compiler.compile(
                [f"{CPU}/csrc/{source}"],
                f"{self.build_temp}/{folder}",
                macros,
                depends=ext.depends,
                extra_postargs=(MSVC_FLAGS if msvc else FLAGS) + flags,
            )

        objects, available = [], [("NA2D_X86", "1")] if X86 else []
        for name, lanes, unix_flags, msvc_flags in INSTRUCTION_SETS:
            macros = [("NA2D_ISA", name), ("NA2D_LANES", str(lanes))]
            objects += compile_("kernel.cpp", msvc_flags if msvc else unix_flags, macros, folder=name)
        with contextlib.suppress(CompileError):
            for name, source, flags in [] if msvc else BF16_SETS:
                macros = [("NA2D_ISA", name), ("NA2D_LANES", "16"), ("NA2D_BF16_PRODUCTS", "1")]
                objects += compile_(source, flags, macros, folder=name)
                available.append((f"NA2D_{name.upper()}", "1"))
        objects += compile_("na2d.cpp", [], available)
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), target_lang="c++", extra_postargs=[] if msvc else ["-pthread"]
        )

    def get_ext_filename(self, fullname):
        # a plain library: no Python ABI in its name
        return fullname.replace(".", "/") + (".dll" if os.name == "nt" else ".so")


def write_startup_file(folder):
    """Python reads it in site-packages at start-up, so that mmcv finds its operators whatever is imported first."""
    Path(folder, "dinat_mmcv_finder.pth").write_text("import dinat_mmcv_finder\n")


class BuildWithConfigs(build_py):
    """Adds the configs in the place where mim and mmengine look for them in an installed package, with their index;
    those of Detectron2 are beside them."""

    def run(self):
        super().run()
        if not self.editable_mode:
            write_startup_file(self.build_lib)
            mim = f"{self.build_lib}/dinat_backbones/.mim"
            for folder in ("configs", "mask2former/configs"):
                shutil.copytree(folder, f"{mim}/{folder}", dirs_exist_ok=True)
            shutil.copy("model-index.yml", mim)


class EditableWheel(editable_wheel):
    """Adds the start-up file to an editable installation."""

    def _run_build_commands(self, dist_name, unpacked_wheel, build_lib, tmp_dir):
        write_startup_file(unpacked_wheel)
        return super()._run_build_commands(dist_name, unpacked_wheel, build_lib, tmp_dir)


class PlatformWheel(bdist_wheel):
    """One wheel per platform, for every Python version."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_packages(include=["dinat_backbones", "dinat_backbones.*"]),
    py_modules=["dinat_mmcv_finder"],
    ext_modules=[
        Extension(
            "dinat_backbones.ops.backends.cpu._na2d",
            sources=[f"{CPU}/csrc/na2d.cpp", f"{CPU}/csrc/kernel.cpp", f"{CPU}/csrc/amx.cpp"],
            depends=sorted(glob.glob(f"{CPU}/csrc/*.h")),
            optional=True,
        )
    ],
    cmdclass={
        "build_py": BuildWithConfigs,
        "build_ext": BuildKernel,
        "bdist_wheel": PlatformWheel,
        "editable_wheel": EditableWheel,
    },
)
