"""Run Megatron-Core 0.19 on CPUs over gloo: the adapter, and the only patches of the project.

Megatron-Core names CUDA in many places where any device would do: ``device="cuda"`` in tensor factories, the current
device and streams, the random number generator of a GPU, type names such as ``torch.cuda.FloatTensor`` in optimizers.
:func:`install` gives those names a CPU meaning. Nothing here changes arithmetic; it is what lets every parallel layout
be tested on any machine. It must never run where a GPU is present, and :func:`megatron_zeda.platform.install` sees to
that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
_FACTORIES = (
    "arange",
    "empty",
    "empty_like",
    "full",
    "ones",
    "ones_like",
    "rand",
    "randn",
    "tensor",
    "zeros",
    "zeros_like",
)
_installed = False


class _Stream:
    """A CUDA stream or event where there is only one queue: everything is already in order."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream)

    def __hash__(self) -> int:
        return 0

    def record_event(self, *_: Any) -> _Stream:
        return self

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait_stream = wait_event = synchronize = record = wait = _nothing


def _is_cuda(device: Any) -> bool:
    return device is not None and not isinstance(device, bool) and (isinstance(device, int) or "cuda" in str(device))


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that reads ``device="cuda"`` as the CPU, and pins no memory: there is no GPU to copy it to."""

    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _patch_tensors() -> None:
    # ``with torch.device("meta")`` keeps a cached set of the factories it redirects. It must hold the real ones, which
    # the wrappers below call; filled later it would hold the wrappers, and transformers would load models with rubbish
    # in their buffers.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))

    to, type_ = torch.Tensor.to, torch.Tensor.type

    def tensor_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and (isinstance(args[0], (str, torch.device)) or type(args[0]) is int) and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        return to(self, *args, **kwargs)

    def tensor_type(self: torch.Tensor, dtype: Any = None, **kwargs: Any) -> Any:
        # Megatron's optimizers sort parameters by type names such as "torch.cuda.BFloat16Tensor".
        if dtype is None:
            return type_(self).replace("torch.", "torch.cuda.", 1)
        return type_(self, dtype.replace("torch.cuda.", "torch.") if isinstance(dtype, str) else dtype, **kwargs)

    torch.Tensor.to = tensor_to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = tensor_type  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]


def _patch_cuda_module() -> None:
    def nothing() -> Callable[..., None]:
        # A function of its own each time: torch's compiler keeps a table by function and refuses duplicates.
        return lambda *_, **__: None

    def set_rng_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    replacements: dict[str, Any] = {
        "current_device": lambda: _CPU,
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "current_stream": lambda *_, **__: _Stream(),
        "default_stream": lambda *_, **__: _Stream(),
        "stream": lambda stream: stream if stream is not None else _Stream(),
        "Stream": _Stream,
        "Event": _Stream,
        # One generator serves as the CPU's and as the GPU's: the tracker's named states then work unchanged.
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *_, **__: torch.get_rng_state(),
        "set_rng_state": set_rng_state,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)
    torch.cuda.nvtx.range_push = nothing()  # type: ignore[assignment]
    torch.cuda.nvtx.range_pop = nothing()  # type: ignore[assignment]


def _patch_random_states() -> None:
    from megatron.core.tensor_parallel import random as megatron_random

    def set_state(new_state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(new_state)

    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = set_state


def _patch_split_sizes() -> None:
    """All-to-all wants split sizes as numbers; Megatron converts them only when they come from a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def move_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = move_to_cpu
    token_dispatcher.maybe_move_tensor_to_cpu = move_to_cpu


def _patch_uneven_collectives() -> None:
    """NCCL gathers and scatters parts of different sizes, gloo does not; expert tensor parallelism needs it.

    With zero experts the ranks of a tensor-parallel group never hold the same number of rows.
    """
    gather, scatter = torch.distributed.all_gather, torch.distributed.reduce_scatter

    def all_gather(tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, **kwargs: Any) -> Any:
        longest = max(part.shape[0] for part in tensor_list) if tensor.dim() else 0
        if all(part.shape == tensor_list[0].shape for part in tensor_list):
            return gather(tensor_list, tensor, group=group, **kwargs)
        padded = tensor.new_zeros(longest, *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        parts = [torch.empty_like(padded) for _ in tensor_list]
        gather(parts, padded, group=group)
        for part, source in zip(tensor_list, parts, strict=True):
            part.copy_(source[: part.shape[0]])
        return None

    def reduce_scatter(output: torch.Tensor, input_list: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        if all(part.shape == input_list[0].shape for part in input_list):
            return scatter(output, input_list, *args, **kwargs)
        group = kwargs.get("group")
        whole = torch.cat(input_list)
        torch.distributed.all_reduce(whole, group=group)
        rank = torch.distributed.get_rank(group)
        output.copy_(whole.split([part.shape[0] for part in input_list])[rank])
        return None

    torch.distributed.all_gather = all_gather  # type: ignore[assignment]
    torch.distributed.reduce_scatter = reduce_scatter


def _patch_norm() -> None:
    """The stock torch norm refuses sequence parallelism, which MoE training with TP > 1 requires.

    All it lacks is the mark that makes ``finalize_model_grads`` add its gradient over the tensor-parallel ranks.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def build(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> torch.nn.Module:
        kind = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    WrappedTorchNorm.__new__ = staticmethod(build)


def install() -> None:
    """Patch torch and Megatron-Core for a machine without CUDA. Idempotent.

    Raises:
        RuntimeError: if CUDA is available, where these patches would be wrong.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the CPU adapter must not be installed on a machine with CUDA")
    from megatron_zeda.platform.cpu_optimizer import patch_offloaded_optimizer

    # Megatron decorates small functions with torch.compile; compiling them needs a C++ compiler and minutes.
    torch.compiler.set_stance("force_eager")
    _patch_tensors()
    _patch_cuda_module()
    _patch_random_states()
    _patch_split_sizes()
    _patch_uneven_collectives()
    _patch_norm()
    patch_offloaded_optimizer()
    _installed = True
