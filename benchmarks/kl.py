"""The divergence from the teacher, forward and backward: ours beside plain torch, ModelOpt's and (on a GPU) Liger's.

From given logits, and from hidden states and the output layer's weight, in time and in peak memory. ModelOpt
(``pip install nvidia-modelopt requests``) and Liger (``pip install liger-kernel``) are compared where they are
installed; what is missing is named in the JSON.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import side_by_side as side
import torch
from torch import Tensor

from megatron_zeda.distillation import Objective, linear_objective, vocab_parallel_kl

# Loss per token [N] or its sum, from the logits of student and teacher.
FromLogits = Callable[[Tensor, Tensor], Tensor]

OURS, FUSED, PLAIN = "ours", "ours, fused", "plain torch"


@dataclass(frozen=True)
class Data:
    """Hidden states [N, H] and output weights [V, H] of two models that are not far apart."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @classmethod
    def random(cls, tokens: int, width: int, columns: int, device: torch.device) -> Data:
        hidden = torch.randn(tokens, width, device=device)
        weight = torch.randn(columns, width, device=device).mul_(3 / width**0.5)  # logits with deviation 3
        return cls(
            hidden.bfloat16().requires_grad_(),
            weight.bfloat16().requires_grad_(),
            (hidden + 0.2 * torch.randn_like(hidden)).bfloat16(),
            weight.bfloat16().detach().clone(),
        )

    def drop_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None


def plain_torch(student: Tensor, teacher: Tensor, *, reverse: bool) -> Tensor:
    """What one writes first: [N] from log-probabilities in fp32."""
    log_s, log_t = torch.log_softmax(student.float(), -1), torch.log_softmax(teacher.float(), -1)
    log_p, log_q = (log_s, log_t) if reverse else (log_t, log_s)
    return torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def modelopt(*, reverse: bool) -> FromLogits:
    """ModelOpt's loss for Megatron-Core models: logits [s, b, V], loss [b, s]."""
    plugin = importlib.import_module("modelopt.torch.distill.plugins.megatron")
    loss = plugin.LogitsKLLoss(SimpleNamespace(tensor_model_parallel_size=1), reverse=reverse)
    return lambda student, teacher: loss(student[:, None], teacher[:, None])[0][0]


def liger(data: Data, *, reverse: bool) -> Callable[[], Tensor]:
    """Liger's fused linear loss, whose ends 0 and 1 of beta are the forward and the reverse KL. Not run yet: no GPU."""
    module = importlib.import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearJSD(jsd_beta=1.0 if reverse else 0.0)
    return lambda: loss(data.hidden, data.weight, data.teacher_hidden, data.teacher_weight) * data.hidden.shape[0]


def contestants(reverse: bool) -> tuple[dict[str, FromLogits], dict[str, str]]:
    """What takes logits, by name, and why others are not there."""
    there: dict[str, FromLogits] = {
        PLAIN: lambda s, t: plain_torch(s, t, reverse=reverse),
        OURS: lambda s, t: vocab_parallel_kl(s, t, reverse=reverse),
    }
    missing = {}
    try:
        there["modelopt"] = modelopt(reverse=reverse)
    except ImportError as error:
        missing["modelopt"] = str(error)
    return there, missing


def from_logits(data: Data, reverse: bool) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Passes over logits that exist already: value and gradient of the student's logits."""
    with torch.no_grad():
        student = data.hidden @ data.weight.t()
        teacher = data.teacher_hidden @ data.teacher_weight.t()
    student.requires_grad_()

    def run(loss: FromLogits) -> Callable[[], None]:
        def once() -> None:
            student.grad = None
            loss(student, teacher).sum().backward()

        return once

    there, missing = contestants(reverse)
    return {name: run(loss) for name, loss in there.items()}, missing


def from_hidden(data: Data, reverse: bool) -> tuple[dict[str, Callable[[], None]], dict[str, str]]:
    """Passes from hidden states to the gradients of hidden states and weight."""

    def whole_logits(loss: FromLogits) -> Callable[[], Tensor]:
        def value() -> Tensor:
            with torch.no_grad():
                teacher = data.teacher_hidden @ data.teacher_weight.t()
            return loss(data.hidden @ data.weight.t(), teacher).sum()

        return value

    there, missing = contestants(reverse)
    values = {name: whole_logits(loss) for name, loss in there.items()}
    weights = {"reverse_kl": 1.0} if reverse else {"forward_kl": 1.0}
    objective = Objective(cross_entropy=0.0, **weights)
    labels = torch.zeros(data.hidden.shape[0], dtype=torch.long, device=data.hidden.device)
    teacher = (data.teacher_hidden, data.teacher_weight)
    values[FUSED] = lambda: linear_objective(
        data.hidden, data.weight, labels, objective=objective, teacher=teacher, group=None
    )[0]
    if data.hidden.is_cuda:
        try:
            values["liger"] = liger(data, reverse=reverse)
        except ImportError as error:
            missing["liger"] = str(error)
    else:
        missing["liger"] = "needs a GPU"

    def run(value: Callable[[], Tensor]) -> Callable[[], None]:
        def once() -> None:
            data.drop_gradients()
            value().backward()

        return once

    return {name: run(value) for name, value in values.items()}, missing


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Most memory that a pass holds beyond what was there before it, its results included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def measure(
    runs: dict[str, Callable[[], None]], ours: Sequence[str], *, rounds: int, copy: int, data: Data
) -> dict[str, Any]:
    """Seconds and peak memory of every contestant, and the ratios of ours to the others.

    Args:
        runs: passes by name.
        ours: which of them are ours.
        rounds: how often each is timed.
        copy: bytes of one fp32 copy of the student's logits.
        data: its gradients are dropped before memory is measured.
    """
    device = data.hidden.device
    durations = side.interleaved(list(runs.items()), rounds=rounds, device=device)
    peaks = {}
    for name, run in runs.items():
        data.drop_gradients()
        peaks[name] = peak_bytes(run, device)
    return {
        "seconds": {name: side.spread(values) for name, values in durations.items()},
        "peak_bytes": peaks,
        "peak_fp32_copies_of_logits": {name: peak / copy for name, peak in peaks.items()},
        "ours_over": {
            name: {
                other: {
                    "seconds": side.ratio(durations[name], durations[other]),
                    "peak_bytes": peaks[name] / peaks[other],
                }
                for other in runs
                if other not in (OURS, FUSED)
            }
            for name in ours
        },
    }


def targets(results: dict[str, Any]) -> list[side.Target]:
    """Ours is to be no slower than, and smaller than, either way that exists already."""
    found = []
    for direction, kinds in results.items():
        for kind, name in (("logits", OURS), ("hidden_states", FUSED)):
            for other, ratios in kinds[kind]["ours_over"][name].items():
                what = f"{direction} KL from {kind.replace('_', ' ')}, {name} / {other}"
                found.append(side.Target(f"{what}, seconds", 1.0, ratios["seconds"]["median"]))
                found.append(side.Target(f"{what}, peak memory", 1.0, ratios["peak_bytes"]))
    return found


def table(results: dict[str, Any]) -> str:
    lines = []
    for direction, kinds in results.items():
        for kind, result in kinds.items():
            for name, values in result["seconds"].items():
                copies = result["peak_fp32_copies_of_logits"][name]
                lines.append(
                    f"{direction:8} {kind:14} {name:12} {values['median']:8.3f} s "
                    f"({values['min']:.3f} to {values['max']:.3f}), peak {copies:5.2f} fp32 copies of the logits"
                )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936, help="that of Qwen3 (default)")
    parser.add_argument("--hidden-size", type=int, default=2048, help="that of Qwen3-30B-A3B (default)")
    parser.add_argument("--tokens", type=int, default=256, help="response tokens of one micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="on a CPU; default: all cores")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)

    device = side.start(args.threads)
    data = Data.random(args.tokens, args.hidden_size, args.vocabulary, device)
    results: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for direction in ("forward", "reverse"):
        results[direction] = {}
        for kind, build, ours in (("logits", from_logits, [OURS]), ("hidden_states", from_hidden, [OURS, FUSED])):
            runs, absent = build(data, direction == "reverse")
            missing |= absent
            copy = args.tokens * args.vocabulary * 4
            results[direction][kind] = measure(runs, ours, rounds=args.rounds, copy=copy, data=data)
    print(table(results))
    installed = {name: _version(name) for name in ("nvidia-modelopt", "liger-kernel")}
    settings = {
        "vocabulary": args.vocabulary,
        "hidden_size": args.hidden_size,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "dtype": "bf16",
        "compared_versions": installed,
        "not_compared": missing,
    }
    side.write(args.output, "kl", settings, results, targets(results))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
