"""Stop cleanly when the scheduler asks for it: the next step boundary saves, then the run ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def helpers_outlive_signals() -> Iterator[None]:
    """Processes started within the block are deaf to the signals that ask us to stop.

    Schedulers signal every process of a job. Megatron-Core's checkpoints have helper processes that would end at once,
    and take the checkpoint that the signal is about to cause with them. They end when this process does, unless it is
    killed with SIGKILL: then they stay until they are killed too, as a scheduler does at the end of a job.
    """
    # Starting it unblocks the signals, so it has to be there before they are blocked.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class StopRequest:
    """Remembers that SIGTERM or SIGINT came, or that the time is up; polled once per step.

    A second signal does what it would have done without us, so that a hanging run can still be ended.
    """

    def __init__(self, *, minutes: float | None = None) -> None:
        """Args:
        minutes: ask for a stop by itself this long after construction.
        """
        self.reason: str | None = None
        self._deadline = None if minutes is None else time.monotonic() + 60.0 * minutes
        self._minutes = minutes
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us
        self._previous.clear()

    def _received(self, number: int, _: FrameType | None) -> None:
        self.reason = signal.Signals(number).name
        self._restore()

    def requested(self) -> bool:
        """Whether this process wants to stop; :attr:`reason` says why."""
        if self.reason is None and self._deadline is not None and time.monotonic() >= self._deadline:
            self.reason = f"train.exit_duration_in_mins={self._minutes:g} is over"
        return self.reason is not None
