"""Bookkeeping that every tensor is used exactly once."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from pathlib import Path

from megatron_zeda.errors import ZedaError


class Ledger:
    """A list of entries that must each be ticked once, no more and no less.

    A failure here is a fault of this program, never of its input; it stops the conversion before anything is visible.
    """

    def __init__(self, entries: Iterable[Hashable], *, what: str, where: str | Path) -> None:
        """``what`` names the act in messages, for instance ``"read"``."""
        self._open: dict[Hashable, None] = {}
        self._what, self._where = what, where
        for entry in entries:
            if entry in self._open:
                raise ZedaError(f"{entry} is planned to be {what} twice", where=where)
            self._open[entry] = None
        self._size = len(self._open)

    def tick(self, entry: Hashable) -> None:
        """Note that ``entry`` was used."""
        if entry not in self._open:
            raise ZedaError(f"{entry} was {self._what} twice or was never planned", where=self._where)
        del self._open[entry]

    def close(self) -> int:
        """Check that nothing is left; return how many entries there were."""
        if self._open:
            names = ", ".join(str(entry) for entry in list(self._open)[:3])
            raise ZedaError(f"{len(self._open)} entries were never {self._what}: {names}", where=self._where)
        return self._size
