"""What several commands share."""

import os
import signal
import subprocess
import sys
import time

import pytest

from helpers import environment

ENDLESS = """
import os, sys, time
from pathlib import Path
from dinat_backbones.cli.common import parallel_map

def work(folder):
    Path(folder, str(os.getpid())).touch()
    time.sleep(600 if len(os.listdir(folder)) == 1 else 0)  # one works on, the others wait for more work

parallel_map(work, [sys.argv[1]] * 3, "working", 3)
"""


def is_running(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # one that ended and that nobody waited for
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="this system has no /proc")
def test_processes_of_a_pool_end_after_their_parent_was_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path)], env=environment())
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the others have started
    with open(f"/proc/{parent.pid}/task/{parent.pid}/children") as file:
        children = [int(word) for word in file.read().split()]
    assert children
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(is_running, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [child for child in children if is_running(child)]
    for child in left:
        os.kill(child, signal.SIGKILL)
    assert not left
