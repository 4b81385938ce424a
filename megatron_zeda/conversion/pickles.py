"""Opening the pickles of a ``torch_dist`` checkpoint without trusting them.

A ``torch_dist`` folder has one pickle that cannot be avoided, ``.metadata``; Python objects such as the common state
are pickled too, inside the data files. PyTorch and Megatron-Core load both without restrictions. Here every global that
such a pickle names is compared with a list first. Objects other than ``.metadata`` are walked with inert stand-ins:
nothing of theirs is built or called at all.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from megatron_zeda.conversion.folders import read_errors
from megatron_zeda.errors import InputError, ZedaError

_DTYPES = frozenset(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))
_STORAGES = frozenset(("torch", name) for name in dir(torch) if name.endswith("Storage"))
_DCP = "torch.distributed.checkpoint."

METADATA_GLOBALS = _DTYPES | {
    (_DCP + "metadata", "Metadata"),
    (_DCP + "metadata", "MetadataIndex"),
    (_DCP + "metadata", "StorageMeta"),
    (_DCP + "metadata", "TensorStorageMetadata"),
    (_DCP + "metadata", "BytesStorageMetadata"),
    (_DCP + "metadata", "ChunkStorageMetadata"),
    (_DCP + "metadata", "TensorProperties"),
    (_DCP + "metadata", "_MEM_FORMAT_ENCODING"),
    (_DCP + "filesystem", "_StorageInfo"),
    (_DCP + "planner", "SavePlan"),
    (_DCP + "planner", "WriteItem"),
    (_DCP + "planner", "WriteItemType"),
    (_DCP + "planner", "TensorWriteData"),
    (_DCP + "planner", "BytesIOWriteData"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}
"""What ``.metadata`` may name."""

OBJECT_GLOBALS = (
    _DTYPES
    | _STORAGES
    | {
        ("torch", "Size"),
        ("torch", "device"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "UntypedStorage"),
        ("torch.storage", "TypedStorage"),
        ("collections", "OrderedDict"),
        ("collections", "defaultdict"),
        ("builtins", "set"),
        ("builtins", "dict"),
        ("builtins", "list"),
        ("builtins", "int"),
        ("builtins", "bytes"),
        ("builtins", "bytearray"),
        ("builtins", "slice"),
        ("pathlib", "PosixPath"),
        ("argparse", "Namespace"),
        ("_io", "BytesIO"),
        ("_codecs", "encode"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy.core.multiarray", "scalar"),
        ("signal", "Signals"),
        ("megatron.core.enums", "ModelType"),
        ("megatron.core.enums", "Fp8Recipe"),
        ("megatron.core.enums", "Fp4Recipe"),
        ("megatron.core.transformer.enums", "ModelType"),
        ("megatron.core.transformer.enums", "AttnBackend"),
        ("megatron.core.transformer.enums", "CudaGraphModule"),
        ("megatron.core.transformer.enums", "CudaGraphScope"),
        ("megatron.core.transformer.enums", "InferenceCudaGraphScope"),
        ("megatron.core.rerun_state_machine", "RerunMode"),
        ("megatron.core.rerun_state_machine", "RerunState"),
    }
)
"""What Python objects inside the data files may name: containers, tensors, random states, Megatron's arguments."""


class AllowListUnpickler(pickle.Unpickler):
    """Builds only what is on a list."""

    def __init__(self, file: io.BufferedIOBase, allowed: Iterable[tuple[str, str]], where: str | Path) -> None:
        super().__init__(file, fix_imports=False)  # names are compared as they are resolved
        self._allowed, self._where = frozenset(allowed), where

    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module  # torch.save writes the old spelling
        if (module, name) not in self._allowed:
            raise ZedaError(
                f"its pickle refers to {module}.{name}, which is not on the list of what a checkpoint may contain",
                where=self._where,
                rule="nothing was executed",
                fix="do not load checkpoints from a source that you do not trust",
            )
        return super().find_class(module, name)


class _Inert:
    """Stands for any object while a pickle is walked: swallows every act of building it."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def __call__(self, *args: object, **kwargs: object) -> _Inert:
        return self

    def __setstate__(self, state: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...

    def append(self, value: object) -> None: ...

    def extend(self, values: object) -> None: ...

    def add(self, value: object) -> None: ...


class _InertUnpickler(AllowListUnpickler):
    """Checks the names and builds nothing."""

    def find_class(self, module: str, name: str) -> Any:
        super().find_class(module, name)  # refuses what is not on the list
        return _Inert

    def persistent_load(self, pid: object) -> Any:
        return _Inert()


def read_metadata(iteration_dir: Path) -> Metadata:
    """Load ``.metadata`` through the allow-list and check the files it points to.

    Raises:
        InputError: if it is not there, or points to files that are missing, too short or outside the folder.
        ZedaError: if it refers to anything that is not checkpoint metadata.
    """
    path = iteration_dir / ".metadata"
    if not path.is_file():
        raise InputError(
            "no such file", where=path, rule="a complete torch_dist checkpoint has one", fix="check the folder"
        )
    with read_errors(path), path.open("rb") as file:
        metadata = _load(AllowListUnpickler(file, METADATA_GLOBALS, path), path)
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise InputError("not the metadata of a torch_dist checkpoint", where=path)
    _check_files(metadata, iteration_dir)
    return metadata


def check_pickles(iteration_dir: str | Path) -> Metadata:
    """Check every pickle of a checkpoint; call it before ``dist_checkpointing.load``.

    Raises:
        InputError: for a checkpoint that is incomplete.
        ZedaError: for a pickle that refers to anything not on the lists of this module. Nothing of it was executed.
    """
    iteration_dir = Path(iteration_dir)
    metadata = read_metadata(iteration_dir)
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(entry, TensorStorageMetadata):
            continue  # PyTorch reads tensors with weights_only=True
        if not isinstance(entry, BytesStorageMetadata):
            raise InputError("an entry has no type", where=iteration_dir / ".metadata", value=index.fqn)
        path = iteration_dir / info.relative_path
        with read_errors(path), path.open("rb") as file:
            file.seek(info.offset)
            data = file.read(info.length)
        _check_torch_file(data, f"{path} ({index.fqn})")
    with read_errors(iteration_dir):
        paths = sorted(iteration_dir.iterdir())
    for path in paths:
        if path.suffix in (".pt", ".pth"):
            with read_errors(path):
                data = path.read_bytes()
            _check_torch_file(data, path)
        elif path.suffix in (".pkl", ".pickle"):
            raise ZedaError("a pickle that no checkpoint needs", where=path, fix="remove it")
    return metadata


def _check_torch_file(data: bytes, where: str | Path) -> None:
    """Walk the pickle of a ``torch.save`` archive, read with the same reader that ``torch.load`` uses."""
    if not data.startswith(b"PK\x03\x04"):
        raise ZedaError("not a torch archive", where=where, rule="the old pickle-only format is not read")
    try:
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))
        records = reader.get_all_records()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # PyTorch writes checksums and does not look at them
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"CRC-32 of {damaged} is wrong")
    except (RuntimeError, zipfile.BadZipFile) as error:
        raise InputError("the torch archive cannot be read", where=where, fix="copy the checkpoint again") from error
    if "constants.pkl" in records or "data.pkl" not in records:
        raise ZedaError("not a plain torch archive", where=where, value=sorted(records)[:5])
    _load(_InertUnpickler(io.BytesIO(reader.get_record("data.pkl")), OBJECT_GLOBALS, where), where)


def _load(unpickler: pickle.Unpickler, where: str | Path) -> Any:
    try:
        return unpickler.load()
    except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the pickle cannot be read ({error})", where=where, fix="copy the checkpoint again"
        ) from error


def _check_files(metadata: Metadata, folder: Path) -> None:
    sizes: dict[str, int] = {}
    for index, info in metadata.storage_data.items():
        name = info.relative_path
        if name not in sizes:
            if Path(name).name != name or name in ("", ".", ".."):
                raise InputError("the metadata names a file outside the folder", where=folder / ".metadata", value=name)
            path = folder / name
            if path.is_symlink():
                raise InputError(
                    "a data file is a link", where=path, rule="links are not followed", fix="copy the file"
                )
            if not path.is_file():
                raise InputError("a data file is missing", where=path, rule="named by .metadata", fix="copy it again")
            sizes[name] = path.stat().st_size
        if info.offset < 0 or info.length < 0 or info.offset + info.length > sizes[name]:
            raise InputError("the data file is truncated", where=folder / name, value=index.fqn, fix="copy it again")
