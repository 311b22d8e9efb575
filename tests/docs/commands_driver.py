"""Runs commands, or only parses them, each in a forked child of one process that has imported the frameworks before.

    python commands_driver.py JOBS RESULTS

JOBS is a JSON file with a list of [mode, words], mode "run" or "parse"; RESULTS becomes a list of [status, output].
"""

import argparse
import contextlib
import importlib
import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


class ParsedError(BaseException):
    """Raised where a command has understood its arguments and would begin to work."""


def execute(words: list[str]) -> None:
    """Start what the words of a command line name, in this process."""
    from dinat_backbones import cli

    program, *arguments = words
    if program == "dinat":
        cli.main(arguments)
    elif program == "python":
        sys.argv = [str(ROOT / arguments[0]), *arguments[1:]]
        runpy.run_path(sys.argv[0], run_name="__main__")
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed = get_args_parser().parse_args(arguments)
        execute([*(["dinat"] if parsed.module else ["python", parsed.training_script]), *parsed.training_script_args])
    elif program == "srun":
        execute(arguments[next(i for i, word in enumerate(arguments) if not word.startswith("-")) :])
    else:
        raise ValueError(f"no way to start {program!r}")


def parse_only(words: list[str]) -> None:
    """`execute` up to the point where an argument parser has accepted the arguments."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        parsed = original(self, *args, **kwargs)
        if self.prog.startswith("torchrun") or "training_script" in vars(parsed):
            return parsed
        raise ParsedError

    argparse.ArgumentParser.parse_args = parse_args
    try:
        execute(words)
    except ParsedError:
        return
    raise AssertionError(f"{words} parsed no arguments")


def in_child(mode: str, words: list[str]) -> tuple[int, str]:
    """Exit status and output of a command."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            status = 1
            try:
                {"run": execute, "parse": parse_only}[mode](words)
                status = 0
            except SystemExit as stopped:
                status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
                if isinstance(stopped.code, str):
                    print(stopped.code)
            except BaseException:
                traceback.print_exc(file=sys.stdout)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return status, output.read()


def main() -> None:
    jobs, results = map(Path, sys.argv[1:])
    for module in ("torch", "dinat_backbones.adapters.openmmlab", "mmdet.apis", "mmseg.apis"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    results.write_text(json.dumps([in_child(mode, words) for mode, words in json.loads(jobs.read_text())]))


if __name__ == "__main__":
    main()
