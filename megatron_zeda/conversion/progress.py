"""A progress bar that only speaks to people."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Self

from tqdm import tqdm


def progress[T](items: Iterable[T], what: str) -> Iterator[T]:
    """Iterate with a bar on standard error, silent when that is not a terminal."""
    total = len(items) if isinstance(items, Sized) else None
    yield from tqdm(items, desc=what, total=total, unit="tensor", disable=not sys.stderr.isatty(), leave=False)


class ByteProgress:
    """A bar of bytes, with the rate and the time that remains; silent when standard error is not a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._bar = tqdm(
            desc=what,
            total=total,
            unit="B",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            leave=False,
        )

    def advance(self, num_bytes: int) -> None:
        """So many bytes were converted now."""
        self._bar.update(num_bytes)

    def skip(self, num_bytes: int) -> None:
        """So many bytes are there from an earlier run: they count for the position, not for the rate."""
        if not self._bar.disable:
            self._bar.initial += num_bytes
        self._bar.update(num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
