"""What Triton's interpreter needs to run the kernels. Imported with TRITON_INTERPRET=1 in the environment, or

    TRITON_INTERPRET=1 python tests/triton_interpreter.py SCRIPT [ARGUMENT ...]

which runs a script in it.

Triton reads that switch when kernels are defined, so that tests in it run in processes of their own. Everything in here
reaches into Triton's private parts, as of Triton 3.6.
"""

import runpy
import sys
from pathlib import Path

import triton.language as tl
from triton.runtime import interpreter


def add_missing_operations() -> None:
    """range() over numbers of NumPy 2.4, and bfloat16 in matrix products."""
    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_lang_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def to_float32(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        bits = handle.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), tl.float32)

    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, to_float32(a), to_float32(b), *rest)


def run_faster(patch) -> None:
    """Patch the language once per kernel and module, not at every call of a helper, and do not look for overflow.

    Args:
        patch: pytest's monkeypatch.
    """
    patched = set()
    launch = interpreter.GridExecutor.__call__

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    patch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
    detect_overflow(patch, False)


def detect_overflow(patch, on: bool) -> None:
    """Whether integers are watched for overflow at every step, which takes a third of the interpreter's time."""
    patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=on))


def only_groups(patch, batch: int, dilation: int, chosen: list[tuple[int, int]]) -> None:
    """Run the programs of some dilation groups alone, given as (row, column): a dilation of 28 has 784 groups."""

    def programs(*bounds):
        if len(bounds) > 1 or bounds[0] == 1:
            return range(*bounds)
        each = bounds[0] // (batch * dilation**2)
        return [
            (image * dilation**2 + row * dilation + column) * each + at
            for image in range(batch)
            for row, column in chosen
            for at in range(each)
        ]

    patch.setattr(interpreter, "range", programs, raising=False)


if __name__ == "__main__":
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).parent.resolve())
    add_missing_operations()
    runpy.run_path(sys.argv[0], run_name="__main__")
