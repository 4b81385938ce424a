"""Run a conversion in a process of its own that is killed (SIGKILL) at a chosen point.

Nothing on a disk changes but by calls to the system, so a point is a call that writes, syncs, renames or removes: the
process dies before it, after it, or when half of it is done.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CALLS = ("fsync", "fdatasync", "replace", "rename", "pwrite", "write", "mkdir", "unlink", "rmdir", "ftruncate")
MANNERS = ("before", "half", "after")
TOOLS = ("inject", "import", "export")
POINTS = 20
"""At how many random points each tool is killed."""
SHARES = (0.05, 0.5, 0.95)
"""Which part of its calls finds space on a disk that fills up."""
SIZES = (0.1, 0.3, 0.6)
"""Which part of the output a small disk holds."""
SMALL_FILES = 20_000


def convert(tool: str, source: Path, out: Path) -> None:
    """Run a converter so that it writes several files."""
    from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf

    if tool == "inject":
        inject_zero_experts(source, out, shard_bytes=SMALL_FILES)
    elif tool == "import":
        hf_to_megatron(source, out, file_bytes=SMALL_FILES)
    else:
        megatron_to_hf(source, out, shard_bytes=SMALL_FILES)


class _Points:
    """Counts the calls, and dies at one of them."""

    def __init__(self, at: int | None, manner: str) -> None:
        self.count, self.at, self._manner = 0, at, manner
        for name in _CALLS:
            setattr(os, name, self._watched(getattr(os, name), name))
        torch.save = self._watched(torch.save, "save")

    def _watched(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            number, self.count = self.count, self.count + 1
            if number != self.at:
                return call(*args, **options)
            if self._manner == "half" and name in ("pwrite", "write"):
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])
            elif self._manner != "before":
                call(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        return watched


def _child(pipe: Any, tool: str, source: Path, out: Path, at: int | None, manner: str, file_limit: int | None) -> None:
    torch.set_num_threads(1)
    if file_limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the call fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    points = _Points(at, manner)
    answer: Any
    try:
        convert(tool, source, out)
        answer = points.count
    except Exception as error:
        answer = error
    points.at = None  # answering is a call too
    pipe.send(answer)


def in_child(
    tool: str, source: Path, out: Path, at: int | None = None, manner: str = "before", file_limit: int | None = None
) -> Any:
    """Convert in a new process.

    Args:
        tool: inject, import or export.
        source: checkpoint.
        out: folder to create.
        at: number of the call at which the process dies.
        manner: before, half or after.
        file_limit: largest file that the process may write, in bytes.

    Returns:
        How many points there were; the exception that was raised; or None if the process was killed.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, tool, source, out, at, manner, file_limit))
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = None
    process.join()
    assert (process.exitcode == -signal.SIGKILL) == (answer is None)
    return answer
