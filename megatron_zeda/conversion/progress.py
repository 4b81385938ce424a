"""A progress bar that only speaks to people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized

from tqdm import tqdm


def progress[T](items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate with a bar on standard error, silent when that is not a terminal."""
    total = len(items) if isinstance(items, Sized) else None
    yield from tqdm(items, desc=what, total=total, unit="tensor", disable=not sys.stderr.isatty(), leave=False)
