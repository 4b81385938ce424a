"""Where a checkpoint folder came from: its revision, and the hashes that its files are known to have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_zeda.conversion.folders import MANIFEST_FILE, read_errors
from megatron_zeda.models.hf_config import read_json_object

_DOWNLOADS = ".cache/huggingface/download"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def known_hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of the weight files of a folder, as far as something beside them says it.

    Three sources are known: our manifest, the notes that ``hf download --local-dir`` leaves (a commit, an ETag that is
    the SHA-256 of a large file, a time), and the cache of the Hugging Face hub, whose links end in
    ``blobs/<SHA-256>``. ``config.json`` is not checked: people edit it on purpose.
    """
    return {name: digest for name, (digest, _) in _known(folder).items()}


def record_of(file: Path) -> Path | None:
    """What :func:`known_hashes` has the hash of a weight file from."""
    for folder in (file.parent, file.parent.parent):
        found = _known(folder).get(file.relative_to(folder).as_posix())
        if found is not None:
            return found[1]
    return None


def _known(folder: Path) -> dict[str, tuple[str, Path]]:
    """Name -> SHA-256, and the file that says so."""
    known: dict[str, tuple[str, Path]] = {}
    manifest = folder / MANIFEST_FILE
    files = read_json_object(manifest).get("files") if manifest.is_file() else None
    for name, record in (files if isinstance(files, dict) else {}).items():
        if _is_weight_file(name) and isinstance(record, dict) and _SHA256.fullmatch(str(record.get("sha256"))):
            known[name] = str(record["sha256"]), manifest
    for name, _, etag in _download_notes(folder):
        if _is_weight_file(name) and _SHA256.fullmatch(etag):
            known[name] = etag, folder / _DOWNLOADS / f"{name}.metadata"
    for path in folder.glob("*.safetensors"):
        target = path.readlink() if path.is_symlink() else None
        if target is not None and target.parent.name == "blobs" and _SHA256.fullmatch(target.name):
            known[path.name] = target.name, path
    return known


def source_revision(folder: Path) -> str | None:
    """The commit on the hub that a folder was downloaded from, if it can be known and is one."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and _COMMIT.fullmatch(real.name):
        return real.name
    commits = {commit for _, commit, _ in _download_notes(folder) if _COMMIT.fullmatch(commit)}
    return commits.pop() if len(commits) == 1 else None


def source_name(folder: Path) -> str:
    """``owner/name`` for a snapshot in the cache of the hub, otherwise the name of the folder."""
    real = folder.resolve()
    cached = real.parent.parent.name
    if real.parent.name == "snapshots" and cached.startswith("models--"):
        return cached.removeprefix("models--").replace("--", "/")
    return real.name


def _is_weight_file(name: str) -> bool:
    return name.endswith((".safetensors", ".distcp", ".metadata", ".pt"))


def _download_notes(folder: Path) -> Iterator[tuple[str, str, str]]:
    """(file name, commit, ETag) of every file that was downloaded into this folder."""
    notes = folder / _DOWNLOADS
    for path in sorted(notes.rglob("*.metadata")):
        with read_errors(path):
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if len(lines) >= 2:
            name = path.relative_to(notes).as_posix().removesuffix(".metadata")
            yield name, lines[0].strip(), lines[1].strip().strip('"')
