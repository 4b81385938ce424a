"""What the four tools share: run from a checkout, one line per error, exit codes, ``--json``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_zeda.errors import ZedaError, is_out_of_memory

Work = Callable[[argparse.Namespace], tuple[int, dict[str, Any], list[str]]]


class _Terminated(KeyboardInterrupt):
    """SIGTERM: ``kill``, or the time limit of a scheduler."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options every tool has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def add_file_size(parser: argparse.ArgumentParser, option: str, default: float, note: str = "") -> None:
    """The option of the tools that write weights."""
    parser.add_argument(
        option, dest="file_gb", type=_positive, default=default, help=f"largest weight file in GB{note}"
    )


def file_bytes(args: argparse.Namespace) -> int:
    """What :func:`add_file_size` asked for."""
    return int(args.file_gb * 10**9)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def run(parser: argparse.ArgumentParser, work: Work, argv: list[str] | None = None) -> int:
    """Parse, work, print.

    Args:
        parser: from :func:`make_parser`.
        work: gives the exit code, the result for ``--json`` and the lines for people.
        argv: command line, by default the process's.

    Returns:
        0 done, 1 failed (or checkpoints differ), 2 wrong input, 130 interrupted, 143 terminated.
    """
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore")  # libraries announcing which optional kernels this machine lacks
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a conversion reads folders only
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code, result, lines = work(args)
    except ZedaError as error:
        return _failed("; ".join([str(error), *_notes(error)]), error.exit_code, args.json)
    except KeyboardInterrupt as error:
        code = 143 if isinstance(error, _Terminated) else 130  # as shells and schedulers expect of the signals
        return _failed("; ".join(["interrupted", *_notes(error)]), code, args.json)
    except OSError as error:  # of a kind that nobody below knows
        where = f"{error.filename}: " if error.filename else ""
        said = f"{where}the system failed ({error.strerror or error})"
        return _failed("; ".join([said, *_notes(error)]), 1, args.json)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _failed("; ".join(["not enough memory", *_notes(error)]), 1, args.json)
    print(json.dumps(result) if args.json else "\n".join(lines))
    return code


def size_of(result: dict[str, Any]) -> str:
    """Tensors and bytes of a conversion, in words."""
    carried = f" ({result['num_carried']} of them carried)" if result.get("num_carried") else ""
    return f"{result['num_tensors']} tensors{carried}, {result['num_bytes']} bytes"


def _notes(error: BaseException) -> list[str]:
    """What stays of an unfinished output, or that the output is complete."""
    return getattr(error, "__notes__", [])


def _failed(message: str, code: int, as_json: bool) -> int:
    print(f"error: {message}", file=sys.stderr)
    if as_json:
        print(json.dumps({"error": message}))
    return code


def _terminate(number: int, frame: object) -> NoReturn:
    # An exception, so that the way out is the one of an interruption: finished files stay, anything else goes.
    raise _Terminated
