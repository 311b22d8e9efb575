"""Downloads that can be interrupted, and are complete or not there."""

import contextlib
import hashlib
import http.client
import os
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import quote, unquote, urlparse
from urllib.request import Request, urlopen

import torch

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TIMEOUT = 30  # seconds without any answer
CHUNK = 1 << 20


def fetch(address: str) -> Path:
    """Download a file once into torch.hub's cache, ``torch.hub.get_dir() + "/checkpoints"``; later calls find it there.

    An interrupted download is resumed by the next call if the server still has the same file. The size is compared
    with the one the server stated. Of several processes that ask for one file, one downloads and the others wait.

    Args:
        address: http(s) address; with ``#sha256=`` and 64 hexadecimal digits at its end the content is verified, too.

    Raises:
        FileNotFoundError: the download failed or broke off; says where the file can be put by hand.
        ValueError: the content is not that of the hash. It is deleted.
    """
    url = urlparse(address)
    path = Path(torch.hub.get_dir(), "checkpoints", Path(unquote(url.path)).name)
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _sole_process(path.with_name(f".{path.name}.lock")):
            if not path.exists():
                complete = _download(url._replace(fragment="").geturl(), path)
                _verify(complete, url.fragment, address)
                complete.replace(path)
    except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError included
        raise FileNotFoundError(
            f"cannot download {address} ({error}); try again, or fetch it on another machine and put it at {path}"
        ) from error
    return path


@contextlib.contextmanager
def _sole_process(lock: Path) -> Iterator[None]:
    while fcntl:
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # the process that held it before may have removed the file: lock the new one then
            if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                try:
                    yield
                finally:
                    lock.unlink()
                return
    yield


def _download(address: str, path: Path) -> Path:
    """Fetch `address` into a file beside `path`, going on where the last call stopped; returns that file, complete."""
    # The name of an unfinished file holds what told the server's file from other versions of it (RFC 9110, If-Range).
    begin, end = f".{path.name}.", ".partial"
    unfinished = [file for file in path.parent.iterdir() if file.name.startswith(begin) and file.name.endswith(end)]
    partial = next((file for file in unfinished if file.name != begin + end), None)
    headers = {"User-Agent": "dinat_backbones"}
    if partial:
        version = unquote(partial.name[len(begin) : -len(end)])
        headers |= {"Range": f"bytes={partial.stat().st_size}-", "If-Range": version}
    try:
        response = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if partial is None or error.code != 416:  # 416: nothing is left after that many bytes
            raise
        partial.unlink()
        return _download(address, path)
    with response:
        if partial is None or response.status != 206:
            for old in unfinished:
                old.unlink()
            version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            if version.startswith("W/"):  # a weak one may stand for other bytes
                version = ""
            partial = path.with_name(begin + quote(version, safe="") + end)
        start = partial.stat().st_size if response.status == 206 else 0
        left = response.headers.get("Content-Length")
        total = None if left is None else start + int(left)
        with (
            open(partial, "ab") as file,
            torch.hub.tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=path.name) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = partial.stat().st_size
    if total is not None and size != total:
        raise OSError(f"only {size} of {total} bytes came")
    return partial


def _verify(file: Path, fragment: str, address: str) -> None:
    kind, _, expected = fragment.partition("=")
    if kind != "sha256":
        return
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != expected.lower():
        file.unlink()
        raise ValueError(
            f"{address} came with SHA-256 {digest.hexdigest()} instead of {expected}: it was changed on its way or at "
            "its source; it was deleted"
        )
