#!/usr/bin/env python
"""Random calls, damaged files, sanitizers and killed commands, for as long as you like:

    python tools/fuzz.py op|files|sanitizers|memory|commands|kills|all [--seconds N] [--seed N] [--count N]

    op          calls of the op on all backends of this machine, beside float64
    files       mutated checkpoints: no code runs, no memory, no hang, one sentence
    sanitizers  the C++ kernel under AddressSanitizer, UBSan and ThreadSanitizer (needs g++)
    memory      2,000 training steps and 2,000 predictions of ever new sizes: it does not grow
    commands    wrong words, configs, data and disks: a sentence, no traceback, nothing half-written (mmdet and mmseg)
    kills       commands ended by SIGKILL or Ctrl-C at any moment, then run again (needs mmdet and mmseg)

Case n depends on the number n alone; a failure is printed with the command that repeats it. Ctrl-C ends a run with its
counts. The status is 1 if anything failed.
"""

import argparse
import importlib
import sys

from fuzzing.core import Session

# Share of the time that each gets of `all`.
TARGETS = {"op": 0.2, "files": 0.1, "sanitizers": 0.2, "memory": 0.1, "commands": 0.15, "kills": 0.25}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*TARGETS, "all"])
    parser.add_argument("--seconds", type=float, default=1800, help="of all targets together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--count", type=int, help="cases of each target at most; of memory, steps")
    args = parser.parse_args(arguments)
    targets = TARGETS if args.target == "all" else {args.target: 1.0}
    sessions = []
    for target, share in targets.items():
        session = Session(target, args.seconds * share, args.seed, args.count)
        sessions.append(session)
        try:
            importlib.import_module(f"fuzzing.{target}").run(session)
        except KeyboardInterrupt:
            session.say("stopped")
            break
    print("\n".join(session.summary() for session in sessions))
    for session in sessions:
        print("".join(f"{session.target}: {failure}\n" for failure in session.failures), end="")
    return int(any(session.failures for session in sessions))


if __name__ == "__main__":
    sys.exit(main())
