"""How good the student is on held-out responses, and how far from its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor

from megatron_zeda.config import Config
from megatron_zeda.data import BatchBuilder, GlobalBatch, MicroBatch, evaluation_batches
from megatron_zeda.distillation import TeacherStates, score
from megatron_zeda.zero_experts import router_statistics


@dataclass
class HeldOut:
    """The held-out batches, and the teacher's states on them where there is a teacher."""

    batches: list[GlobalBatch]
    teacher: list[TeacherStates] | None = None


@dataclass(frozen=True)
class ValidationResult:
    """Means over the held-out response tokens.

    Attributes:
        ce: cross entropy, nats per token.
        kl_forward: KL(teacher || student), nats per token; None without a teacher.
        skip_rate: mean over layers, at the positions that predict a response token.
        skip_rate_per_layer: the same per layer.
        tokens: response tokens.
    """

    ce: float
    kl_forward: float | None
    skip_rate: float
    skip_rate_per_layer: list[float]
    tokens: int


def held_out(config: Config, builder: BatchBuilder) -> HeldOut:
    """The first ``validation.eval_iters`` global batches of the validation files, in file order."""
    return HeldOut(list(islice(evaluation_batches(builder), config.validation.eval_iters)))


def not_predicting_a_response(micro: MicroBatch) -> Tensor:
    """Positions ``[B, s]`` that routers leave out, True."""
    return micro.loss_mask == 0


def validate(chunks: list[Any], held_out: HeldOut) -> ValidationResult:
    """Score the student; a collective call. Its mode and the training statistics are left as they were.

    The caller reads the training statistics before: they are reset here.
    """
    was_training = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    router_statistics(chunks)
    teacher: Sequence[TeacherStates | None] = held_out.teacher or [None] * len(held_out.batches)
    scores = [
        score(chunks, batch, states, counted=not_predicting_a_response)
        for batch, states in zip(held_out.batches, teacher, strict=True)
    ]
    statistics = router_statistics(chunks)
    for chunk, training in zip(chunks, was_training, strict=True):
        chunk.train(training)
    tokens = sum(item.tokens for item in scores)
    return ValidationResult(
        ce=sum(item.ce_sum for item in scores) / tokens,
        kl_forward=sum(item.kl_sum for item in scores) / tokens if held_out.teacher else None,
        skip_rate=statistics.skip_rate,
        skip_rate_per_layer=statistics.skip_rate_per_layer,
        tokens=tokens,
    )
