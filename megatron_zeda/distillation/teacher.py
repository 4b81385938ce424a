"""The frozen teacher, and the gate that the student must pass before its first step (law 8)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from megatron_zeda.data import GlobalBatch, MicroBatch
from megatron_zeda.distillation.forward import Scores, TeacherStates, forward_hidden, response_states, score
from megatron_zeda.errors import ZedaError
from megatron_zeda.zero_experts import masked_zero_experts, router_statistics

# A wider router GEMM rounds differently, and a near-tie may then choose another expert: so many tokens may be far off.
_NEAR_TIES = 1e-3
_FP32_TOLERANCE = 1e-5
_MEAN_KL = 1e-3


class FrozenTeacher:
    """The original model at the student's parallel layout: read, never written.

    It is in eval mode without gradients, and belongs to no optimizer, DDP wrapper or checkpoint of the student.
    """

    def __init__(self, chunks: Iterable[nn.Module]) -> None:
        """Args:
        chunks: this rank's model chunks with their weights loaded (``Float16Module`` or plain ``GPTModel``); they are
            switched to eval mode and their parameters stop requiring gradients.
        """
        self.chunks: list[Any] = list(chunks)
        self._weight_VH: Tensor | None = None
        for chunk in self.chunks:
            chunk.eval()
            chunk.requires_grad_(False)

    def fingerprint(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all parameters and buffers of this rank."""
        digest = hashlib.sha256()
        for chunk in self.chunks:
            for name, tensor in sorted([*chunk.named_parameters(), *chunk.named_buffers()]):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def states(self, batch: GlobalBatch) -> TeacherStates:
        """Run the teacher over this rank's share of ``batch`` and keep its final hidden states on response tokens.

        A collective call. The results hold a copy of the output layer's weight, one for all batches, so the teacher may
        be freed afterwards.
        """
        kept = TeacherStates()

        def on_last_stage(micro: MicroBatch, hidden_BSH: Tensor, weight_VH: Tensor) -> Tensor:
            if self._weight_VH is None:
                self._weight_VH = weight_VH.detach().clone()
            kept.weight = self._weight_VH
            return response_states(hidden_BSH, micro)[0].clone()

        kept.hidden = forward_hidden(self.chunks, batch, on_last_stage)
        return kept


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
        ZedaError: saying how far apart the two are.
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
