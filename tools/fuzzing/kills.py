"""Commands ended at a random moment, by SIGKILL or as by Ctrl-C, and run again.

Afterwards no file is half-written: what has its final name can be read. The second run ends well, going on from what
there is or starting anew, and leaves what an undisturbed run leaves. Commands are forked from this process, which has
imported the frameworks. Not looked at are logs, which grow line by line, and configs that mmengine dumps.
"""

import contextlib
import functools
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dinat_backbones import cli
from dinat_backbones.checkpoint import read

from .core import Session
from .processes import check_files, files_of, fork, kill, to_the_end, wait, wait_for_processes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
_base_ = "{root}/configs/demo/upernet_dinat_shapes.py"
train_dataloader = dict(batch_size=1, dataset=dict(data_root="{data}/"))
val_dataloader = dict(batch_size=1, dataset=dict(data_root="{data}/"))
test_dataloader = dict(batch_size=1, dataset=dict(data_root="{data}/"))
train_cfg = dict(max_epochs=3, val_begin=9)
model = dict(backbone=dict(drop_path_rate=0.3))
default_hooks = dict(logger=dict(interval=1))
custom_hooks = [dict(type="SeedStepsHook")]
"""


class Command(NamedTuple):
    """What is run in an empty folder, what after it was ended, and what is compared of the result."""

    run: Callable[[], None]
    again: Callable[[], None]
    result: Callable[[Path], Any]


def dinat(*words: object) -> Callable[[], None]:
    """A command line of `dinat`."""
    return lambda: cli.main([str(word) for word in words])


def weights_of(name: str) -> Callable[[Path], Any]:
    """A checkpoint by name in the folder: the bytes of its tensors."""

    def result(folder: Path) -> Any:
        checkpoint = read(folder / name)
        state = checkpoint.get("state_dict", checkpoint)
        return {
            key: value.contiguous().view(torch.uint8).numpy().tobytes() for key, value in state.items() if value.dim()
        }

    return result


def metrics_of(folder: Path) -> dict[str, float]:
    """The last evaluation's metrics."""
    files = sorted(folder.glob("out/*/*.json"), key=lambda path: path.stat().st_mtime)
    metrics = json.loads(files[-1].read_text())
    return {name: value for name, value in metrics.items() if "time" not in name}


def slow_server(content: bytes) -> str:
    """The address of a file that takes a second and more to download; it can be continued."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client was ended
                for position in range(start, len(content), 1 << 18):
                    self.wfile.write(content[position : position + (1 << 18)])
                    time.sleep(0.05)

        def log_message(self, *args: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}/file.pth#sha256={hashlib.sha256(content).hexdigest()}"


def download(address: str) -> None:
    """Into the present folder."""
    torch.hub.set_dir(".")
    read(address)


def prepare(folder: Path) -> dict[str, Command]:
    """The commands, with the data and weights that they need in `folder`."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    from dinat_backbones import DiNAT
    from dinat_backbones.cli import export, shapes

    data, config, model = folder / "shapes", folder / "config.py", folder / "model.pth"
    shapes.make_shapes(data, train=2, val=3, size=64, layouts=["ade20k"])
    config.write_text(CONFIG.format(root=ROOT, data=data))
    cfg = Config.fromfile(config)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        segmentor = MODELS.build(cfg.model)
    torch.save({"meta": {}, "state_dict": segmentor.state_dict()}, model)
    small = DiNAT(embed_dim=8, depths=[1, 1], num_heads=[1, 2], kernel_size=3, dilations=[[2], [1]], mlp_ratio=2.0)
    exported = export.Exported(small.eval(), ("stage0", "stage1"))

    def export_small(*words: str) -> None:
        export.build = lambda *arguments: exported  # of this process, which is a child
        cli.main(["export", "dinat_mini", "--format", "pt2", "--size", "40x40", "--out", "out/model.pt2", *words])

    def graph(folder: Path) -> list[torch.Tensor]:
        module = torch.export.load(folder / "out/model.pt2").module()
        return [t.detach().numpy().tobytes() for t in module(torch.ones(1, 3, 40, 40))]

    images = data / "images/validation"
    predict = "predict", images, "--config", config, "--checkpoint", model, "--out", "out", "--device", "cpu"
    convert = "convert", model, "out/target.pth", "--to", "imagenet"
    train = "train", config, "--work-dir", "out"
    torch.save({"weight": torch.randn(2 << 20)}, folder / "large.pth")
    address = slow_server((folder / "large.pth").read_bytes())
    return {
        "train": Command(dinat(*train), dinat(*train, "--resume"), weights_of("out/epoch_3.pth")),
        "test": Command(*[dinat("test", config, model, "--work-dir", "out")] * 2, metrics_of),
        "predict": Command(dinat(*predict), dinat(*predict), files_of),
        "convert": Command(dinat(*convert), dinat(*convert, "--force"), weights_of("out/target.pth")),
        "export": Command(export_small, functools.partial(export_small, "--force"), graph),
        "shapes": Command(
            *[dinat("shapes", "out", "--train", 20, "--val", 5, "--size", 64, "--replace")] * 2, files_of
        ),
        "download": Command(*[functools.partial(download, address)] * 2, files_of),
    }


def end(child: int, number: int, name: str) -> None:
    """Send a signal, after which the process has a minute; raise if it takes longer."""
    os.kill(child, number)
    if wait(child, 60) is None:
        kill(child)
        raise AssertionError(f"{name} went on for a minute after {signal.Signals(number).name}")


def run(session: Session) -> None:
    """`python tools/fuzz.py kills`."""
    import mmseg.apis  # noqa: F401
    import torch._dynamo  # noqa: F401  # what exporting imports

    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="dinat-kills-"))
    try:
        session.say(f"undisturbed runs, in {root}")
        commands, expected, duration = prepare(root), {}, {}
        for name, command in commands.items():
            folder = root / f"undisturbed-{name}"
            folder.mkdir()
            begin = time.monotonic()
            to_the_end(command.run, folder, name)
            duration[name] = time.monotonic() - begin
            check_files(folder)
            expected[name] = command.result(folder)
        session.say(", ".join(f"{name} {seconds:.1f} s" for name, seconds in duration.items()))

        def one(seed: int) -> str:
            rng = random.Random(seed)
            name = list(commands)[seed % len(commands)]
            number = rng.choice([signal.SIGKILL, signal.SIGINT])
            moment = rng.uniform(0, 1.1) * duration[name]
            folder = root / f"case-{seed}"
            folder.mkdir()
            child = fork(commands[name].run, folder)
            ended = wait(child, moment)
            what = f"{name}, {signal.Signals(number).name} after {moment:.2f} of {duration[name]:.2f} s"
            if ended is None:
                end(child, number, what)
            check_files(folder)
            if number == signal.SIGINT and name != "download":  # which goes on with what it has
                left = [str(path) for path in folder.rglob("*.partial*")]
                assert not left, f"{what}: left {left}"
            to_the_end(commands[name].again, folder, f"again after {what}")
            check_files(folder)
            assert commands[name].result(folder) == expected[name], f"{what}: another result than undisturbed"
            wait_for_processes(folder, 20, what)
            shutil.rmtree(folder)
            return f"{name} {'ended before' if ended is not None else signal.Signals(number).name}"

        session.try_each(one)
    finally:
        if not session.failures:
            shutil.rmtree(root)
