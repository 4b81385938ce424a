"""Jsonl files, one JSON object a line, read strictly: whatever is wrong is named with its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_zeda.errors import InputError


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ``("file:line", object)`` for every line of a jsonl file.

    Raises:
        InputError: no such file, an empty file, an empty or malformed line, or text that is not UTF-8.
    """
    if not path.is_file():
        raise InputError("no such file", where=path, rule="a jsonl file, one JSON object a line", fix="check the path")
    number = 0
    with path.open(encoding="utf-8") as file:
        try:
            for number, text in enumerate(file, start=1):
                yield f"{path}:{number}", parse_line(text, f"{path}:{number}")
        except UnicodeDecodeError as error:
            raise InputError(
                "not UTF-8 text", where=path, fix="give a jsonl file, not a compressed or binary one"
            ) from error
    if number == 0:
        raise InputError("the file is empty", where=path, rule="one JSON object a line", fix="check how it was made")


def parse_line(text: str, where: str) -> dict[str, Any]:
    """Return the JSON object of one line, or raise an :class:`InputError` that names ``where``."""
    if not text.strip():
        raise InputError("empty line", where=where, rule="one JSON object a line", fix="delete the line")
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"malformed JSON: {error.msg} at column {error.colno}", where=where, fix="mend or delete the line"
        ) from error
    if not isinstance(line, dict):
        raise InputError("not a JSON object", where=where, value=line, rule="one JSON object a line")
    return line
