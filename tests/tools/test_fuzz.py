"""tools/fuzz.py: it finds what is made wrong on purpose, and nothing in what is right."""

import os
import pickle
import signal
import time

import fuzz
import pytest
import torch
from fuzzing import files, memory, op
from fuzzing.core import Session

from dinat_backbones.checkpoint import read
from dinat_backbones.ops import BACKENDS


def test_calls(capsys):
    assert fuzz.main(["op", "--count", "40"]) == 0
    assert "op: 40 cases (seeds 0 to 39), 0 failures" in capsys.readouterr().out


def test_preparations_that_take_all_the_time_leave_a_case(capsys):
    session = Session("op", seconds=0.0)
    session.try_each(lambda seed: "right")
    assert session.summary() == "op: 1 cases (seeds 0 to 0), 0 failures; 1 right"


def test_float64_is_that_of_the_reference_backend():
    """Two computations that share no code, within what float64 rounds."""
    for seed in range(20):
        case = op.draw(seed)[0]
        case = case._replace(
            backend="reference",
            qkv=[t.double() for t in case.qkv],
            rpb=None if case.rpb is None else case.rpb.double(),
            padding=None if case.padding is None else case.padding.double(),
            grad_out=case.grad_out.double(),
        )
        assert op.compare([case])[0] <= 1


@pytest.mark.parametrize("wrong", ["window", "bias", "scale", "nan"])
def test_wrong_calls_are_found(monkeypatch, capsys, wrong):
    """A window that is shifted at the border alone, a transposed table, a scale off by a thousandth, a NaN."""
    right = type(BACKENDS["tiled"]).attention

    def attention(self, qkv, rpb, kernel_size, dilation, scale):
        if wrong == "bias" and rpb is not None:
            rpb = rpb.mT
        out = right(self, qkv, rpb, kernel_size, dilation, scale * (1.001 if wrong == "scale" else 1))
        if wrong == "window":
            out = torch.cat([out[:, :1].roll(1, 2), out[:, 1:]], 1)
        return out * float("nan") if wrong == "nan" else out

    monkeypatch.setattr(type(BACKENDS["tiled"]), "attention", attention)
    monkeypatch.setattr(op, "BACKENDS", {"tiled": BACKENDS["tiled"]})
    assert fuzz.main(["op", "--count", "30"]) == 1
    said = capsys.readouterr().out
    assert "times the bound; tiled" in said and "tools/fuzz.py op --seed" in said


def test_files(capsys):
    assert fuzz.main(["files", "--count", "300"]) == 0
    said = capsys.readouterr().out
    assert "files: 300 cases (seeds 0 to 299), 0 failures" in said and " refused" in said and " read" in said


def unpickle(path):
    """Runs what the file asks for."""
    try:
        return dict(pickle.loads(path.read_bytes()))
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}") from None


def hang(path):
    time.sleep(60)


def crash(path):
    if path.name.startswith("good"):
        return
    os.kill(os.getpid(), signal.SIGSEGV)


def fill_memory(path):
    if path.name.startswith("good"):
        return {}
    return dict(content=bytearray(1 << 30))


def complain(path):
    if path.name.startswith("good"):
        return
    raise KeyError(path)


@pytest.mark.parametrize(
    "reader, count, reason",
    [
        (unpickle, 60, "the file made a call"),
        (crash, 1, "ended with status -11"),
        (fill_memory, 2, "MemoryError"),
        (complain, 2, "KeyError"),
    ],
)
def test_readers_that_do_what_they_should_not(reader, count, reason):
    session = Session("files", seconds=60, count=count)
    files.run(session, reader)
    assert any(reason in failure for failure in session.failures), session.failures


def test_a_reader_that_hangs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "SECONDS", 1)
    monkeypatch.setattr(signal, "alarm", lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds))
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("alarm")))
    try:
        with pytest.raises(TimeoutError):
            files.try_one(0, files.good_files(), files.Watch(), hang)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_interruption_prints_the_counts(monkeypatch, capsys):
    def interrupted(seed):
        if seed == 3:
            raise KeyboardInterrupt
        return "done"

    monkeypatch.setattr("fuzzing.op.run", lambda session: session.try_each(interrupted))
    assert fuzz.main(["op"]) == 0
    said = capsys.readouterr().out
    assert "stopped" in said and "op: 3 cases (seeds 0 to 2), 0 failures; 3 done" in said


def test_time_is_kept():
    session = Session("op", seconds=0.2)
    session.try_each(lambda seed: time.sleep(0.05) or "slept")
    assert 2 <= session.done <= 6


def test_the_reader_that_is_tried_is_the_one_of_the_package():
    assert files.run.__defaults__ == (read,)


def test_sizes_are_new_ones_after_the_largest():
    found = memory.sizes(2000, seed=0)
    assert len(found) == len(set(found)) == 2000 and found[0] == (memory.SIZES[1],) * 2
    assert max(max(size) for size in found) == memory.SIZES[1]


LEAKED = []


def leak(model, size, optimizer):
    LEAKED.append(torch.ones(4 << 20))


def test_leaks_are_found():
    session = Session("memory", seconds=60, count=8)
    memory.run(session, leak)
    assert len(session.failures) == 2 and "8 predictions: " in session.failures[0], session.failures
    assert "8 training steps: " in session.failures[1]
