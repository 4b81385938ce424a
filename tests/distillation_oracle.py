"""What linear_objective is held to: its definition in float64, with autograd over whole logits."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_zeda.distillation import Objective

N, H, V = 11, 7, 37


class Case:
    """Random hidden states and weights of a student and a teacher, labels, and log-probabilities of a rollout."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0, hidden: int = H, columns: int = V) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.hidden, self.weight = normal(N, hidden), normal(columns, hidden)
        self.teacher = (self.hidden + normal(N, hidden, scale=0.3), self.weight + normal(columns, hidden, scale=0.1))
        self.labels = torch.randint(columns, (N,), generator=generator)
        logprobs = torch.log_softmax(self.hidden.double() @ self.weight.double().t(), -1)
        self.old = (logprobs.gather(1, self.labels[:, None])[:, 0] + 0.3 * torch.randn(N, generator=generator)).float()


def expected(
    hidden: Tensor, weight: Tensor, case: Case, objective: Objective, old: Tensor | None
) -> tuple[Tensor, dict[str, float]]:
    """The definition, in float64 with autograd; everything that is a constant to the gradient is detached."""
    logits = hidden @ weight.t()
    teacher = case.teacher[0].double() @ case.teacher[1].double().t()
    at_label = torch.log_softmax(logits, -1).gather(1, case.labels[:, None])[:, 0]
    log_ratio = at_label - (at_label.detach() if old is None else old.double())
    ratio = log_ratio.detach().exp()
    cap = objective.importance_cap
    importance = torch.ones_like(ratio) if cap is None else ratio.clamp(max=cap)
    log_s = torch.log_softmax(logits / objective.temperature, -1)
    log_t = torch.log_softmax(teacher / objective.temperature, -1)
    forward = (log_t.exp() * (log_t - log_s)).sum(-1)
    clipped = torch.zeros_like(ratio)
    if objective.estimator == "full":
        reverse = term = (log_s.exp() * (log_s - log_t)).sum(-1) * importance
        reverse = reverse / importance
    elif objective.estimator == "topk":
        k = min(objective.topk, logits.shape[1])
        columns = logits.detach().topk(k).indices
        s, t = log_s.exp(), log_t.exp()
        rest_s, rest_t = (p.scatter(1, columns, 0.0).sum(-1) for p in (s, t))
        reverse = (s.gather(1, columns) * (log_s - log_t).gather(1, columns)).sum(-1)
        if k < logits.shape[1]:
            reverse = reverse + rest_s * (rest_s.log() - rest_t.log())
        term = reverse * importance
    else:
        reverse = (log_s - log_t).gather(1, case.labels[:, None])[:, 0].detach()
        low, high = 1 - objective.clip_ratio_low, 1 + objective.clip_ratio_high
        moving = log_ratio.exp()
        if cap is not None:  # the cap limits the weight of the gradient, and does not take it away
            moving = moving * (moving.clamp(max=cap) / moving).detach()
        plain, bounded = moving * -reverse, ratio.clamp(low, high) * -reverse
        clipped = ((reverse < 0) & (ratio > high) | (reverse > 0) & (ratio < low)).double()
        term = -torch.where(clipped > 0, bounded, plain)
    loss = objective.reverse_kl * term.sum() if objective.reverse_kl else 0.0
    loss = loss + (importance * (objective.cross_entropy * -at_label + objective.forward_kl * forward)).sum()
    with_old = float(old is not None)
    sums = {
        "tokens": float(N),
        "ce": -at_label.sum().item(),
        "kl_forward": forward.sum().item() if objective.forward_kl else 0.0,
        "kl_reverse": reverse.sum().item() if objective.reverse_kl else 0.0,
        "importance": importance.sum().item(),
        "capped": with_old * float((ratio > (cap or float("inf"))).sum()),
        "clipped": with_old * clipped.sum().item() * bool(objective.reverse_kl),
        "logprob_gap": log_ratio.abs().sum().item(),
        "logprob_gap_k3": (ratio - 1 - log_ratio).sum().item(),
        "logprob_gap_max": log_ratio.abs().max().item(),
    }
    return loss, sums


def expected_gradients(
    case: Case, objective: Objective, old: Tensor | None, scale: float
) -> tuple[Tensor, dict[str, float], Tensor, Tensor]:
    """Loss, sums, and the gradients of ``scale`` times the loss for hidden states and weight."""
    hidden, weight = (tensor.to(torch.float64, copy=True).requires_grad_() for tensor in (case.hidden, case.weight))
    loss, sums = expected(hidden, weight, case, objective, old)
    (loss * scale).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), sums, hidden.grad, weight.grad


MIXTURES = {
    "cross entropy": Objective(),
    "forward": Objective(cross_entropy=0.0, forward_kl=0.7),
    "reverse": Objective(cross_entropy=0.0, reverse_kl=1.3),
    "all": Objective(cross_entropy=0.5, forward_kl=0.7, reverse_kl=1.3),
    "all, tempered": Objective(cross_entropy=0.5, forward_kl=0.7, reverse_kl=1.3, temperature=2.0),
    "cross entropy and reverse, sharpened": Objective(cross_entropy=0.5, reverse_kl=1.3, temperature=0.5),
    "topk": Objective(cross_entropy=0.0, reverse_kl=1.0, estimator="topk", topk=5),
    "topk and all, tempered": Objective(
        cross_entropy=0.1, forward_kl=0.4, reverse_kl=1.0, estimator="topk", topk=5, temperature=1.5
    ),
    "topk beyond the vocabulary": Objective(cross_entropy=0.0, reverse_kl=1.0, estimator="topk", topk=64),
    "sampled": Objective(cross_entropy=0.0, reverse_kl=1.0, estimator="sampled"),
    "sampled and all": Objective(cross_entropy=0.2, forward_kl=0.3, reverse_kl=1.0, estimator="sampled"),
}
