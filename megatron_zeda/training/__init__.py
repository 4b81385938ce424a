"""Stage 1 on stock Megatron-Core: set-up, step, loop, checkpoint, signals, metrics. Read ``loop.py`` first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_zeda.config import Config


def train(config: Config) -> int:
    """Run stage 1; see :func:`megatron_zeda.training.loop.train`."""
    from megatron_zeda import platform

    platform.install()
    from megatron_zeda.training.loop import train as run

    return run(config)


__all__ = ["train"]
