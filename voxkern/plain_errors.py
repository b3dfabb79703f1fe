"""Print a known error of a command as one sentence."""

import contextlib
import traceback
from collections.abc import Iterator

import torch
import typer
from rich.console import Console
from soundfile import LibsndfileError

err = Console(stderr=True)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn a known error into one printed sentence and exit status 1. Other errors keep their traceback.

    The known errors are those of files, memory and missing packages, and a ValueError or FloatingPointError that
    voxkern raises. A ValueError or FloatingPointError that another package raises is a bug and keeps its traceback.
    """
    own = (ValueError, FloatingPointError)
    try:
        yield
    except (*own, OSError, MemoryError, ModuleNotFoundError, torch.OutOfMemoryError, LibsndfileError) as error:
        *_, (raised_in, _) = traceback.walk_tb(error.__traceback__)
        if isinstance(error, own) and not raised_in.f_globals["__name__"].startswith("voxkern."):
            raise
        err.print(f"voxkern: {error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(1) from None
