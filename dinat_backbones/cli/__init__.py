"""The commands: `dinat COMMAND ...`, `python -m dinat_backbones COMMAND ...`, and the scripts in tools/.

One module per command, imported only when the command runs: its docstring is the manual, its `main(arguments)` the
command. `common` holds what several commands share. The frameworks are imported by the commands that need them.
"""

import importlib
import logging
import sys
from collections.abc import Sequence

COMMANDS = {
    "train": "train a detector, a segmentor or a classifier",
    "test": "evaluate a checkpoint, or check that the data is complete",
    "predict": "draw the predictions of a model on images",
    "attend": "draw where a pixel of an image looks, block by block",
    "config": "write a config of mmdet or mmseg with its backbone replaced",
    "convert": "rewrite a checkpoint in the layout of another framework",
    "export": "export a backbone or a segmentor to ONNX or torch.export",
    "flops": "count parameters and MACs, beside the published figures",
    "validate": "measure classifiers on ImageNet-1k",
    "prepare": "make the label maps and annotations that Mask2Former reads",
    "shapes": "make a small synthetic data set",
    "info": "print versions, backends and GPUs, for a bug report",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """`dinat` with the given arguments, by default those of this process.

    Raises:
        SystemExit: as command lines do.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from .. import __version__

        print(f"dinat_backbones {__version__}")
        return
    if words[0] not in COMMANDS:
        print(f"dinat: unknown command {words[0]!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"dinat {words[0]}", *words[1:]]  # what argparse and the frameworks' own scripts read
    run(words[0])


def run(command: str) -> None:
    """Run one of `COMMANDS` with the arguments in `sys.argv`. What is wrong with them, or with the files that they
    name, is one sentence, see `errors`."""
    logging.raiseExceptions = False  # a log that cannot be written prints a traceback for each of its lines
    try:
        importlib.import_module(f"{__name__}.{command}").main()
    except Exception as error:
        from .errors import describe

        sentence = describe(error)
        if sentence is None:
            raise
        sys.exit(f"{sys.argv[0]}: {sentence}")


def _usage() -> str:
    commands = "\n".join(f"  {name:10}{summary}" for name, summary in COMMANDS.items())
    return (
        f"usage: dinat COMMAND ...\n\nNAT, DiNAT and DiNAT_s: backbones, detectors, segmentors, classifiers.\n\n"
        f"commands:\n{commands}\n\n`dinat COMMAND --help` lists the options of a command; `dinat --version`."
    )
