"""`fetch` against a local web server."""

import hashlib
import http.server
import subprocess
import sys
import threading

import numpy
import pytest
import torch

from dinat_backbones.checkpoint import fetch, read
from helpers import ROOT


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the server's `files` and, asked for a Range, the rest of one. It breaks off after `breaks_after` bytes."""

    def do_GET(self):
        self.server.requests.append(dict(self.headers))
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if self.server.ranges else 0
        if start and start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", len(content) - start)
        self.end_headers()
        self.wfile.write(content[start:][: self.server.breaks_after])

    def log_message(self, *args): ...


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local web server with the `files` of a dictionary; `cache` is where downloads go."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("no_proxy", "*")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.files, running.requests, running.ranges, running.breaks_after = {}, [], True, None
        running.address = f"http://127.0.0.1:{running.server_port}"
        running.cache = tmp_path / "cache/hub/checkpoints"
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


CONTENT = numpy.random.default_rng(0).bytes(300_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def downloaded(server):
    """Names of the complete and the partial files in the cache."""
    return [path.name for path in server.cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


def break_off(server, address, after=100_000):
    server.breaks_after = after
    with pytest.raises(FileNotFoundError) as caught:
        fetch(address)
    server.breaks_after = None
    return str(caught.value)


def test_an_address_is_downloaded_once(server, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    server.files["/a.pth?x=1"] = (tmp_path / "a.pth").read_bytes()
    for _ in range(2):  # the second time from the cache
        assert torch.equal(read(f"{server.address}/a.pth?x=1")["a"], torch.ones(3))
    assert downloaded(server) == ["a.pth"] and len(server.requests) == 1


def test_addresses_with_the_same_file_name_do_not_collide(server):
    names = ["/one/a.pth", "/two/a.pth", "/two/a.pth?version=2"]
    server.files |= {name: name.encode() for name in names}
    paths = [fetch(server.address + name) for name in names]
    assert [path.read_bytes().decode() for path in paths] == names
    assert {path.name for path in paths} == {"a.pth"} and all(server.cache in path.parents for path in paths)


def test_offline_names_file_and_place(server):
    with pytest.raises(FileNotFoundError) as caught:
        read(f"{server.address}/b.pth")
    message = str(caught.value)
    assert f"{server.address}/b.pth" in message and "\n" not in message
    place = message.rpartition("put it at ")[2]
    (server.cache / place).write_bytes(CONTENT)  # by hand; an absolute path stays as it is
    assert fetch(f"{server.address}/b.pth").read_bytes() == CONTENT


def test_a_broken_download_is_refused_and_started_anew(server, capfd):
    server.files["/a.pth"] = CONTENT
    assert "100000 of 300000 bytes" in break_off(server, f"{server.address}/a.pth")
    server.files["/a.pth"] = CONTENT[::-1]  # without a hash nothing could tell that these are two files
    assert fetch(f"{server.address}/a.pth").read_bytes() == CONTENT[::-1]
    assert [request.get("Range") for request in server.requests] == [None, None]
    assert downloaded(server) == ["a.pth"] and "a.pth" in capfd.readouterr().err  # progress


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_with_a_hash_is_continued(server, ranges):
    server.files["/a.pth"], server.ranges = CONTENT, ranges
    address = f"{server.address}/a.pth#sha256={DIGEST}"
    break_off(server, address)
    assert fetch(address).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=100000-"]
    assert downloaded(server) == ["a.pth"]


def test_a_complete_file_that_was_not_renamed(server):
    """Killed between the last byte and the renaming."""
    server.files["/a.pth"] = CONTENT
    address = f"{server.address}/a.pth#sha256={DIGEST}"
    break_off(server, address)
    next(server.cache.rglob("*.partial")).write_bytes(CONTENT)
    assert fetch(address).read_bytes() == CONTENT and downloaded(server) == ["a.pth"]


def test_a_file_that_changed_between_two_downloads_is_refused(server):
    address = f"{server.address}/a.pth#sha256={DIGEST}"
    server.files["/a.pth"] = CONTENT[::-1]
    break_off(server, address)
    server.files["/a.pth"] = CONTENT
    with pytest.raises(ValueError, match="changed on its way"):
        fetch(address)
    assert fetch(address).read_bytes() == CONTENT


@pytest.mark.parametrize("stated", ["a.pth#sha256=" + "0" * 64, "a-00000000.pth"])
def test_hash_in_the_address(server, stated):
    server.files |= {"/" + stated.partition("#")[0]: CONTENT}
    with pytest.raises(ValueError, match=f"SHA-256 is {DIGEST}, expected 0+"):
        fetch(f"{server.address}/{stated}")
    assert downloaded(server) == []


@pytest.mark.parametrize("stated", [f"a.pth#sha256={DIGEST.upper()}", f"a-{DIGEST[:8]}.pth"])
def test_hash_of_a_file_in_the_cache(server, stated):
    server.files |= {"/" + stated.partition("#")[0]: CONTENT}
    path = fetch(f"{server.address}/{stated}")
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match="delete it to download it again"):
        fetch(f"{server.address}/{stated}")


def test_what_is_no_hash(server):
    server.files |= {"/a-20240229.pth": CONTENT}
    assert fetch(f"{server.address}/a-20240229.pth").read_bytes() == CONTENT
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        fetch(f"{server.address}/a-20240229.pth#sha256=abc")


def test_processes_that_want_the_same_file_get_it_once(server):
    server.files["/a.pth"] = CONTENT
    script = "import sys; from dinat_backbones.checkpoint import fetch; print(fetch(sys.argv[1]).stat().st_size)"
    command = [sys.executable, "-c", script, f"{server.address}/a.pth"]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in running] == ["300000"] * 3
    assert len(server.requests) == 1 and downloaded(server) == ["a.pth"]
