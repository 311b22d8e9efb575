"""Mutated checkpoints through `checkpoint.read`, in a process that watches what reading them does.

Allowed are a dictionary, or one ValueError that names the file in one line. Not allowed: any other exception, a call
that reaches the system (an audit hook sees it), a new file, 10 seconds, 256 MiB, a crash.
"""

import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dinat_backbones.checkpoint import read

from .core import Session
from .mutations import CALLS, mutate, safetensors_sample, samples

SECONDS = 10
MEMORY = 256 << 20
# Audit events that no reading of a file needs, by their beginnings; "open" is looked at more closely.
EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "exec", "compile", "import", "ctypes.dlopen", "marshal.", "pty.")
READS = ("os.stat", "os.listdir", "os.scandir")


class Watch:
    """What an audit hook saw while `active`; a hook cannot be removed again."""

    def __init__(self) -> None:
        self.active, self.seen = False, list[str]()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or (event.startswith(EVENTS) and event not in READS):
            self.seen.append(f"{event} {arguments!r:.200}")

    @contextmanager
    def on(self) -> Iterator[None]:
        self.active, self.seen = True, []
        try:
            yield
        finally:
            self.active = False


def good_files() -> list[tuple[str, bytes]]:
    """Suffixes and contents."""
    files = [(".pth", content) for content in (*samples(), *CALLS.values())]
    return files + ([(".safetensors", safetensors_sample())] * 3 if find_spec("safetensors") else [])


def try_one(seed: int, files: list[tuple[str, bytes]], watch: Watch, reader: Callable[[Path], object]) -> str:
    """Mutate a file and read it, in the current folder, which has to be empty.

    Raises:
        AssertionError: something happened that is not allowed.
    """
    rng = random.Random(seed)
    suffix, content = rng.choice(files)
    path = Path(f"file{suffix}")
    path.write_bytes(mutate(content, rng))
    outcome = f"{suffix} read"
    signal.alarm(SECONDS)  # ends this process, which its parent notices
    try:
        with watch.on():
            found = reader(path)
        assert isinstance(found, dict), f"a {type(found).__name__}"
    except ValueError as error:
        outcome = f"{suffix} refused"
        message = str(error)
        assert message.isprintable() and str(path) in message and len(message) < 1000, f"message {message!r:.1500}"
    finally:
        signal.alarm(0)
    assert not watch.seen, f"the file made a call: {watch.seen}"
    assert os.listdir() == [path.name], f"the file wrote {os.listdir()}"
    path.unlink()
    return outcome


def work(connection: Connection, reader: Callable[[Path], object] = read) -> None:
    """Answer every number that comes with its outcome, "" for a failure, and its reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    folder, files, watch = tempfile.mkdtemp(prefix="dinat-fuzz-"), good_files(), Watch()
    os.chdir(folder)
    for suffix, content in files:  # imports what is imported at the first use
        Path(f"good{suffix}").write_bytes(content)
        with suppress(ValueError):
            reader(Path(f"good{suffix}"))
        Path(f"good{suffix}").unlink()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    while True:
        seed = connection.recv()
        try:
            answer = try_one(seed, files, watch, reader), ""
        except Exception as error:
            answer = "", f"{type(error).__name__}: {error}"
            for name in os.listdir():
                path = Path(name)
                path.rmdir() if path.is_dir() else path.unlink()
        connection.send(answer)


class Worker:
    """The process; a new one takes over where one ended."""

    def __init__(self, reader: Callable[[Path], object]) -> None:
        self.reader = reader
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, end = context.Pipe()
        self.process = context.Process(target=work, args=(end, self.reader), daemon=True)
        self.process.start()
        end.close()

    def ask(self, seed: int) -> str:
        """The outcome of a case.

        Raises:
            AssertionError: its failure.
        """
        try:
            self.connection.send(seed)
            outcome, reason = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.start()
            ended = "it took too long" if code == -signal.SIGALRM else f"the process ended with status {code}"
            raise AssertionError(ended) from None
        assert outcome, reason
        return outcome

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def run(session: Session, reader: Callable[[Path], object] = read) -> None:
    """`python tools/fuzz.py files`."""
    worker = Worker(reader)
    try:
        session.try_each(worker.ask)
    finally:
        worker.stop()
