"""The frozen teacher, and the gate that the student must pass before its first step (law 8)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megatron_zeda.data import GlobalBatch, MicroBatch
from megatron_zeda.distillation.forward import Scores, TeacherStates, forward_hidden, response_states, score
from megatron_zeda.distillation.host_weights import HostWeights, tensors_of
from megatron_zeda.errors import ZedaError
from megatron_zeda.zero_experts import masked_zero_experts, router_statistics

# A wider router GEMM rounds differently, and a near-tie may then choose another expert: so many tokens may be far off.
_NEAR_TIES = 1e-3
_FP32_TOLERANCE = 1e-5
_MEAN_KL = 1e-3

Placement = Literal["device", "host"]


class FrozenTeacher:
    """The original model at the student's parallel layout: read, never written.

    It is in eval mode without gradients, and belongs to no optimizer, DDP wrapper or checkpoint of the student.
    """

    def __init__(self, chunks: Iterable[nn.Module], *, placement: Placement = "device", fp8: bool = False) -> None:
        """Args:
        chunks: this rank's model chunks with their weights loaded (``Float16Module`` or plain ``GPTModel``); they are
            switched to eval mode and their parameters stop requiring gradients.
        placement: where the weights are between passes. ``host``: in (pinned) host memory; every pass brings all of
            them to where they are now and frees that memory again. The output layer's stays there.
        fp8: whether passes compute in FP8; only for chunks that were built for it.
        """
        self.chunks: list[Any] = list(chunks)
        self.fp8 = fp8
        self._weight_VH: Tensor | None = None
        for chunk in self.chunks:
            chunk.eval()
            chunk.requires_grad_(False)
        self._host = HostWeights(self.chunks) if placement == "host" else None

    @property
    def num_bytes(self) -> int:
        """Bytes of this rank's parameters and buffers."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self.chunks))

    @property
    def output_num_bytes(self) -> int:
        """Those of its output layer, which are 0 on all pipeline stages but the last."""
        weights = [
            parameter
            for chunk in self.chunks
            for module in chunk.modules()
            if getattr(module, "post_process", False) and hasattr(module, "shared_embedding_or_output_weight")
            for parameter in [module.shared_embedding_or_output_weight()]
        ]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers of this rank."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            for name, tensor in sorted([*chunk.named_parameters(), *chunk.named_buffers()]):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def states(self, batch: GlobalBatch, *, fp8: bool | None = None) -> TeacherStates:
        """Run the teacher over this rank's share of ``batch`` and keep its final hidden states on response tokens.

        A collective call. The results hold the output layer's weight, one for all batches, so the teacher may be freed
        afterwards.

        Args:
            batch: what to run.
            fp8: in place of :attr:`fp8`, for this pass.
        """
        kept = TeacherStates()

        def on_last_stage(index: int, micro: MicroBatch, hidden_BSH: Tensor, weight_VH: Tensor) -> None:
            if self._weight_VH is None:
                self._weight_VH = weight_VH.detach()
            kept.weight = self._weight_VH
            kept.keep(response_states(hidden_BSH, micro)[0])

        there = nullcontext() if self._host is None else self._host.on_device()
        with there, _computing(self.chunks, fp8=self.fp8 if fp8 is None else fp8):
            forward_hidden(self.chunks, batch, on_last_stage)
        return kept


@contextmanager
def _computing(chunks: list[Any], *, fp8: bool) -> Iterator[None]:
    """Within the block, chunks that were built for FP8 compute without it unless ``fp8``."""
    configs = {id(m.config): m.config for c in chunks for m in c.modules() if getattr(m, "config", None) is not None}
    switched = {} if fp8 else {key: config.fp8 for key, config in configs.items() if getattr(config, "fp8", None)}
    for key in switched:
        configs[key].fp8 = None
    try:
        yield
    finally:
        for key, value in switched.items():
            configs[key].fp8 = value


def parity_gate(student: list[Any], teacher: TeacherStates, batch: GlobalBatch, *, exact: bool) -> Scores:
    """Refuse to train a student that, with its zero experts masked, is not its teacher.

    A collective call. Parameters, training mode and the routers' statistics of the student are left as they were.

    Args:
        student: the student's model chunks.
        teacher: the teacher's states on ``batch``.
        batch: a fixture or held-out batch.
        exact: fp32 models: logits must agree to 1e-5 (relative to the larger of 1 and the token's largest logit) on all
            tokens but one in a thousand, which near-ties in the router may take. Else the mean KL must be at most 1e-3.

    Returns:
        What was measured.

    Raises:
        ZedaError: saying how far apart the two are, or that the teacher predicts worse than chance.
    """
    was_training = [chunk.training for chunk in student]
    for chunk in student:
        chunk.eval()
    router_statistics(student)
    with masked_zero_experts(student):
        scores = score(student, batch, teacher, relative_tolerance=_FP32_TOLERANCE)
    masked_rate = router_statistics(student).skip_rate
    for chunk, training in zip(student, was_training, strict=True):
        chunk.train(training)

    check_sane(scores, next(module.vocab_size for module in student[0].modules() if hasattr(module, "vocab_size")))
    close = scores.far_tokens <= _NEAR_TIES * scores.tokens if exact else scores.kl <= _MEAN_KL
    if scores.tokens and close and scores.kl <= _MEAN_KL and not masked_rate > 0:
        return scores
    raise ZedaError(
        "with its zero experts masked the student is not the teacher: "
        f"mean KL {scores.kl:.3g} nats, largest logit difference {scores.max_difference:.3g}, "
        f"{scores.far_tokens} of {scores.tokens} response tokens differ",
        where="teacher.checkpoint",
        rule="the student must be injected from this very teacher",
        fix="inject and convert again, or name the checkpoint the student was made from",
    )


def sanity_gate(student: list[Any], teacher: TeacherStates, batch: GlobalBatch) -> Scores:
    """Refuse a teacher that predicts worse than chance, whatever its student has become; a collective call.

    Args and errors as of :func:`parity_gate`.
    """
    was_training = [chunk.training for chunk in student]
    for chunk in student:
        chunk.eval()
    router_statistics(student)
    scores = score(student, batch, teacher)
    router_statistics(student)
    for chunk, training in zip(student, was_training, strict=True):
        chunk.train(training)
    check_sane(scores, next(module.vocab_size for module in student[0].modules() if hasattr(module, "vocab_size")))
    return scores


def check_sane(scores: Scores, vocabulary_size: int) -> None:
    """Refuse a teacher that predicts the responses worse than chance: its weights or the tokens are not the right ones.

    Args:
        scores: of any student, with the teacher's states.
        vocabulary_size: entries of the whole vocabulary; guessing costs its logarithm.

    Raises:
        ZedaError: saying what the teacher's cross entropy is.
    """
    chance = math.log(vocabulary_size)
    if not scores.teacher_ce < chance:
        raise ZedaError(
            f"the teacher's cross entropy on {scores.tokens} response tokens is {scores.teacher_ce:.4g} nats, and "
            f"guessing costs {chance:.4g}",
            where="teacher.checkpoint",
            rule="the teacher predicts responses better than chance",
            fix="check that its weights are whole, and that the data were made with its tokenizer and chat template",
        )
