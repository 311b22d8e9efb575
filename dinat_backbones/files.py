"""Files that are complete or absent, also if the process is killed while it writes."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What torch.save and safetensors say, instead of an OSError, when a file cannot be written to its end.
_WRITE_ERRORS = re.compile(r"inline_container|PytorchStreamWriter|iostream error|I/O error|os error \d+")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary name to write to, with the suffix of `path`; it replaces `path` when the block ends without an
    error and is removed otherwise. Missing folders are made.

    Raises:
        OSError: the file cannot be written, whatever the block raised for that.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    except Exception as error:
        if isinstance(error, OSError) or not _WRITE_ERRORS.search(str(error)):
            raise
        raise OSError(errno.EIO, "cannot be written to its end; is the disk full?", str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
