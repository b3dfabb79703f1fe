"""Write files that replace their target only when they are complete, and check the target before the work."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


def check_target(path: Path) -> None:
    """Raise an error if a file cannot be written at `path`.

    Raises:
        ValueError: the folder of `path` is missing or cannot be written; or `path` is a folder, is not a regular file,
            or is a file that cannot be written.
    """
    folder = path.resolve().parent  # the folder of the file that a link points to
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, so {path.name} cannot be written")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'not a regular file'}, so it cannot be written")
    for needed in (folder, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise ValueError(f"{path}: {needed} cannot be written (permission denied)")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`. At the end it replaces `path`; after an error it is deleted.

    So the target is never half written, and after an error the old file is unchanged. If `path` is a link, the file
    that it points to is replaced.

    Raises:
        ValueError: `path` cannot be written; raised before the ``with`` block runs.
    """
    check_target(path)
    target = path.resolve()
    new = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        yield new
        new.replace(target)
    finally:
        new.unlink(missing_ok=True)
