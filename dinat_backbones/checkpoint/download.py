"""Downloads that are complete and verified, or not there."""

import hashlib
import http.client
import re
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlparse
from urllib.request import Request, urlopen

import torch
from filelock import FileLock

TIMEOUT = 30  # seconds without any answer
CHUNK = 1 << 20


def fetch(address: str) -> Path:
    """Download a file once; later calls find it in torch.hub's cache.

    The place is ``torch.hub.get_dir() + "/checkpoints/KEY/NAME"``, KEY being a hash of the whole address. Of several
    processes that ask for one file, one downloads and the others wait. A hash that the address states is verified at
    every call. Where it states one, a download that broke off is continued by the next call.

    Args:
        address: http(s) address. Its hash is ``#sha256=`` and 64 hexadecimal digits at its end, or, as torch.hub and
            OpenMMLab name files, the first 8 in the file's name, ``NAME-xxxxxxxx.pth``.

    Raises:
        FileNotFoundError: the download failed or broke off; says where the file can be put by hand.
        ValueError: the content is not that of the hash. A new download is deleted, a file in the cache is not.
    """
    url = urlparse(address)
    whole = url._replace(fragment="").geturl()
    name = Path(unquote(url.path)).name or "index"
    path = Path(torch.hub.get_dir(), "checkpoints", hashlib.sha256(whole.encode()).hexdigest()[:16], name)
    expected = _stated_hash(url.fragment, name)
    if not path.exists():
        partial = path.with_name(f"{name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f"{name}.lock")):
                if not path.exists():
                    _download(whole, partial, resume=bool(expected))
                    _verify(partial, expected, f"{address} was changed on its way or at its source", delete=True)
                    partial.replace(path)
        except (OSError, http.client.HTTPException) as error:  # URLError and HTTPError included
            raise FileNotFoundError(
                f"cannot download {address} ({error}); try again, or fetch it on another machine and put it at {path}"
            ) from error
    else:
        _verify(path, expected, f"{path} is not the file of {address}: delete it to download it again")
    return path


def _stated_hash(fragment: str, name: str) -> str:
    """The first digits of the SHA-256 that an address states, "" for none."""
    kind, _, digits = fragment.partition("=")
    if kind == "sha256":
        if not re.fullmatch("[0-9a-fA-F]{64}", digits):
            raise ValueError(f"#{fragment}: expected #sha256= and 64 hexadecimal digits")
        return digits.lower()
    named = re.search(r"-([0-9a-f]{8})\.\w+$", name)
    return named[1] if named and not re.fullmatch(r"20\d{6}", named[1]) else ""  # a date is no hash


def _download(address: str, partial: Path, *, resume: bool) -> None:
    """Fetch `address` into the file `partial`, behind what it has if `resume`."""
    start = partial.stat().st_size if resume and partial.exists() else 0
    headers = {"User-Agent": "dinat_backbones"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        response = urlopen(Request(address, headers=headers), timeout=TIMEOUT)
    except HTTPError as error:
        if start and error.code == 416:  # nothing is left after that many bytes: the hash will tell
            return
        raise
    with response:
        if response.status != 206:
            start = 0
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        with (
            open(partial, "ab" if start else "wb") as file,
            torch.hub.tqdm(  # tqdm's own, or a few lines where it is not installed
                total=total, initial=start, unit="B", unit_scale=True, desc=partial.stem
            ) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    size = partial.stat().st_size
    if total is not None and size != total:
        raise OSError(f"only {size} of {total} bytes came")


def _verify(file: Path, expected: str, problem: str, *, delete: bool = False) -> None:
    if not expected:
        return
    digest = hashlib.sha256()
    with open(file, "rb") as content:
        while chunk := content.read(CHUNK):
            digest.update(chunk)
    if not digest.hexdigest().startswith(expected):
        if delete:
            file.unlink()
        raise ValueError(f"{problem} (its SHA-256 is {digest.hexdigest()}, expected {expected})")
