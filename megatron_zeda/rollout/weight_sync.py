"""New weights for a server: exported as a Hugging Face folder, complete or not at all, and loaded by number.

The number of a version is the number of updates that the weights have had. ``<folder>/<number>`` exists only when every
file in it is written; the server is told to load it, and only then do responses carry the number. Whoever trains on
them compares it with its own (``rollout.max_staleness``).
"""

from __future__ import annotations

import os
import shutil
import time
import urllib.error
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from megatron_zeda.errors import ZedaError, disk_errors
from megatron_zeda.rollout.first_rank import on_first
from megatron_zeda.rollout.openai_engine import OpenAIEngine, send_json

Reload = Literal["vllm", "sglang"]
# The version before is kept: a server that loads lazily, or is restarted by hand, may still want it.
_KEPT = 2
# Loading tens of gigabytes from a shared file system.
_LOAD_SECONDS = 3600.0
# Waits before a server is asked again to forget; after the last one its running requests have to begin anew.
_FORGET_WAITS = (0.0, 1.0, 4.0)


class WeightSync:
    """Brings the student's weights to a server."""

    def __init__(
        self, folder: Path, engine: OpenAIEngine, export: Callable[[Path], None], *, reload: Reload | None
    ) -> None:
        """Begin without any version: what a run that was killed left may be of weights that will never come back.

        Args:
            folder: of the versions; the server sees it under the same path.
            engine: whose responses get the number.
            export: writes the student as a Hugging Face folder of this path, a collective call.
            reload: how the server is told; None: it is not, and has version 0 for ever.
        """
        self.folder, self.engine, self.export, self.reload = folder, engine, export, reload
        self._first = not dist.is_initialized() or dist.get_rank() == 0
        self.engine.weights_version = 0 if reload is None else None
        if self._first and reload is not None:
            with disk_errors(folder):
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)

    def __call__(self, version: int) -> None:
        """Give the server these weights, unless it has them; a collective call.

        Args:
            version: number of updates that the weights have had.

        Raises:
            ZedaError: the folder could not be written, or the server did not load it.
        """
        if self.reload is None or self.engine.weights_version == version:
            return
        # From now on nobody knows what the server has, until it says that it has loaded.
        self.engine.weights_version = None
        final = self.folder / str(version)
        partial = self.folder / f".{version}.partial"
        if self._first:
            with disk_errors(self.folder):
                for left in (partial, final):
                    shutil.rmtree(left, ignore_errors=True)
        _together(None)
        self.export(partial)
        reload = self.reload

        def load() -> None:
            with disk_errors(self.folder):
                os.replace(partial, final)
            load_weights(self.engine.url, final, reload)
            self._forget(version)

        try:
            on_first(load)
        except ZedaError as error:
            text = f"the server did not get the weights of step {version}: {error}"
            raise ZedaError(text, where="rollout.reload") from error
        self.engine.weights_version = version

    def _forget(self, newest: int) -> None:
        numbers = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())
        for number in [n for n in numbers if n <= newest][:-_KEPT]:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)


def load_weights(url: str, folder: Path, reload: Reload, *, seconds: float = _LOAD_SECONDS) -> None:
    """Make a server load the weights of a Hugging Face folder, and forget what it computed with the old ones.

    Args:
        url: ``http://host:port/v1``.
        folder: of the same form as the one the server was started with; its name is the version that SGLang gives
            with its answers.
        reload: ``vllm``: its method ``reload_weights`` on all workers (``VLLM_SERVER_DEV_MODE=1``); ``sglang``:
            ``/update_weights_from_disk``.
        seconds: longest wait.

    Raises:
        ZedaError: it did not.
    """
    root, path = url.rstrip("/").removesuffix("/v1"), str(folder.resolve())
    if reload == "vllm":
        body = {"method": "reload_weights", "kwargs": {"weights_path": path}}
        _post(f"{root}/collective_rpc", body, seconds, "start the server with VLLM_SERVER_DEV_MODE=1")
        _forget_prefixes(root, seconds)
        return
    body = {"model_path": path, "weight_version": folder.name}
    answer = _post(f"{root}/update_weights_from_disk", body, seconds, "look at the server's log")
    if not answer.get("success"):
        raise ZedaError(f"SGLang says: {answer.get('message', answer)}", where=root, fix="look at the server's log")
    told = _get(f"{root}/get_model_info", seconds).get("model_path")
    if told != path:
        raise ZedaError(f"SGLang says that it serves {told}", where=root, rule=f"it was told to load {path}")


def _forget_prefixes(root: str, seconds: float) -> None:
    """Make vLLM forget the keys and values of the old weights, which it refuses while a request holds any of them."""
    url, fix = f"{root}/reset_prefix_cache", "start the server with VLLM_SERVER_DEV_MODE=1"
    for wait in _FORGET_WAITS:
        time.sleep(wait)
        if _post(url, None, seconds, fix).get("success", True):  # older versions say nothing
            return
    if not _post(f"{url}?reset_running_requests=true", None, seconds, fix).get("success", True):
        raise ZedaError("vLLM keeps what it computed with the old weights", where=url, fix="look for others' requests")


def _post(url: str, body: Any, seconds: float, fix: str) -> Any:
    try:
        return send_json("POST", url, body, seconds)
    except urllib.error.HTTPError as error:
        text = " ".join(error.read().decode(errors="replace").split())[:200]
        raise ZedaError(f"HTTP {error.code}: {text}", where=url, fix=fix) from error
    except (OSError, ValueError) as error:
        raise ZedaError(f"{type(error).__name__}: {error}", where=url, fix=fix) from error


def _get(url: str, seconds: float) -> Any:
    try:
        return send_json("GET", url, None, seconds)
    except (OSError, ValueError) as error:
        raise ZedaError(f"{type(error).__name__}: {error}", where=url, fix="look at the server's log") from error


def export_weights(chunks: Sequence[Any], folder: Path, *, hf: Path, format: str) -> None:
    """Write model chunks at any layout as a Hugging Face folder; a collective call.

    Args:
        chunks: this rank's, wrapped or plain; with ``ddp.overlap_param_gather`` every rank must hold its whole
            parameters.
        folder: to create, on a file system that all ranks see.
        hf: folder with the model's ``config.json`` and tokenizer.
        format: ``zeda``, ``dense-zeros`` or ``vllm-mone`` (docs/export_formats.md).

    Raises:
        ZedaError: on every rank, when one could not write.
    """
    from megatron.core import dist_checkpointing

    from megatron_zeda.conversion import megatron_to_hf
    from megatron_zeda.conversion.megatron_io import HF_FOLDER, drop_extra_state, iteration_dir, write_latest_iteration

    first = not dist.is_initialized() or dist.get_rank() == 0
    saved = folder.with_name(f"{folder.name}.megatron")
    place = iteration_dir(saved, 0)
    trouble = None
    if first:
        try:
            with disk_errors(saved):
                shutil.rmtree(saved, ignore_errors=True)
                place.mkdir(parents=True)
        except ZedaError as error:
            trouble = str(error)
    _raise_together(trouble, saved)
    names = ["model"] if len(chunks) == 1 else [f"model{index}" for index in range(len(chunks))]
    state = {
        name: drop_extra_state(_unwrap(chunk).sharded_state_dict()) for name, chunk in zip(names, chunks, strict=True)
    }
    dist_checkpointing.save(state, str(place))
    if first:
        try:
            with disk_errors(saved):
                write_latest_iteration(saved, 0)
                shutil.copytree(hf, saved / HF_FOLDER)
            megatron_to_hf(saved, folder, format=format)
        except ZedaError as error:
            trouble = str(error)
        finally:
            shutil.rmtree(saved, ignore_errors=True)
    _raise_together(trouble, folder)


def _unwrap(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _together(trouble: str | None) -> str | None:
    """What went wrong on the first rank, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return trouble
    box = [trouble]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _raise_together(trouble: str | None, where: Path) -> None:
    trouble = _together(trouble)
    if trouble is not None:
        raise ZedaError(trouble, where=where)
