"""Renders ``report.md`` from the dictionary that ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_TITLES = {
    "teacher": "teacher",
    "student_stage1": "student after stage 1",
    "student": "student",
    "control_topk_half": "control: teacher, K halved, untrained",
}
_MISSING = "not measured"


def render_markdown(built: Mapping[str, Any], *, pictures: Sequence[str] = ()) -> str:
    """Return the report as Markdown.

    Args:
        built: what ``report.json`` holds.
        pictures: file names beside the report.
    """
    parts = ["# Report", _headline(built), _main_table(built), _differences(built), _tasks(built), _savings(built)]
    parts += [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in pictures]
    parts += [_training(built, "training_stage1"), _training(built), _seconds(built), _definitions(built)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(built: Mapping[str, Any]) -> str:
    student, teacher = built["student"], built["teacher"]
    if not student or student["skip_rate"] is None:
        return ""
    text = f"The student skips **{_percent(student['skip_rate'])}** of its expert slots on held-out responses"
    if teacher and None not in (student["accuracy"], teacher["accuracy"]):
        ours, theirs = _percent(student["accuracy"]), _percent(teacher["accuracy"])
        text += f" at **{ours}** accuracy, beside **{theirs}** of its teacher"
    return text + "."


def _main_table(built: Mapping[str, Any]) -> str:
    names = [name for name in _TITLES if built[name]]
    if not names:
        return ""
    models = [built[name] for name in names]
    rows = [
        ["accuracy", *(_accuracy(model) for model in models)],
        ["perplexity", *(_number(model["perplexity"], ".3f") for model in models)],
        ["KL to the teacher, nats per response token", *(_number(model["kl_to_teacher"], ".4f") for model in models)],
        ["skip rate, response tokens", *(_percent(model["skip_rate"]) for model in models)],
        ["skip rate, prompt tokens", *(_percent(model["skip_rate_prompt"]) for model in models)],
        ["expert FLOPs saved", *(_percent(model["expert_flops_saved"]) for model in models)],
        ["experts per token", *(_experts(model["model"]) for model in models)],
    ]
    return _table(["", *(_TITLES[name] for name in names)], rows)


def _accuracy(model: Mapping[str, Any]) -> str:
    if model["accuracy"] is None:
        return _MISSING
    low, high = model["accuracy_interval"]
    return f"{_percent(model['accuracy'])} ({100 * low:.1f} to {100 * high:.1f}, n = {model['accuracy_count']})"


def _experts(model: Mapping[str, Any]) -> str:
    zero = f" and {model['num_zero_experts']} zero" if model["num_zero_experts"] else ""
    return f"{model['num_experts_per_token']} of {model['num_experts']}{zero}"


def _differences(built: Mapping[str, Any]) -> str:
    lines = []
    others = {"teacher": "teacher", "student_stage1": "student after stage 1", "control_topk_half": "control"}
    for name, other in others.items():
        found = built["accuracy_difference"][f"student_minus_{name}"]
        if found:
            low, high = (100 * end for end in found["interval"])
            lines.append(
                f"- Student minus {other}, same {found['count']} prompts: {100 * found['value']:+.1f} points "
                f"(95 % interval {low:+.1f} to {high:+.1f}; only the student right: {found['only_student']}, "
                f"only the {other} right: {found['only_other']}; exact McNemar p = {found['mcnemar_p']:.3g})."
            )
    return "\n".join(lines)


def _tasks(built: Mapping[str, Any]) -> str:
    names = [name for name in _TITLES if built[name] and built[name]["accuracy_by_task"]]
    if not names:
        return ""
    tasks: dict[str, int] = {}
    for name in names:
        for task, found in built[name]["accuracy_by_task"].items():
            tasks.setdefault(task, found["count"])
    rows = []
    for task, count in tasks.items():
        shares = [built[name]["accuracy_by_task"].get(task) for name in names]
        rows.append([task, str(count), *(_percent(found["accuracy"]) if found else _MISSING for found in shares)])
    return "Accuracy per task:\n\n" + _table(["task", "n", *(_TITLES[name] for name in names)], rows)


def _savings(built: Mapping[str, Any]) -> str:
    found = built["theoretical_speedup"]
    if not found:
        return ""
    text = (
        f"By the paper's FLOP model, the student needs {found['total']:.2f} times fewer FLOPs than "
        f"its static form (prefill {found['prefill']:.2f} at {found['prompt_tokens']} prompt tokens that skip "
        f"{_percent(found.get('prompt_saved'))}, decode {found['decode']:.2f} at {found['response_tokens']} response "
        f"tokens that skip {_percent(found.get('response_saved'))}). "
        "That is a bound from counting, not a measured speed."
    )
    return f"{text}\n\n{speedup_table(found['by_length'])}" if found.get("by_length") else text


def speedup_table(by_length: Sequence[Mapping[str, float]]) -> str:
    """Return what :func:`megatron_zeda.evaluation.flops.speedup_by_length` found as Markdown."""
    rows = [[f"{row['seq_length']:,}", f"{row['prefill']:.3f}", f"{row['decode']:.3f}"] for row in by_length]
    return _table(["static / dynamic FLOPs, tokens", "prefill of them", "decode of them"], rows)


def _training(built: Mapping[str, Any], key: str = "training") -> str:
    training = built[key]
    if not training:
        return ""
    first, last = training["first"], training["last"]
    keys = (
        "loss",
        "ce",
        "kl_forward",
        "kl_reverse",
        "balance_loss",
        "skip_rate",
        "grad_norm",
        "lr",
        "tokens_per_second",
    )
    rows = [
        [key, _number(first.get(key), ".4g"), _number(last.get(key), ".4g")]
        for key in keys
        if isinstance(last.get(key), (int, float))
    ]
    stage = "Stage 1" if key == "training_stage1" else "Stage 2" if built["training_stage1"] else "Training"
    return f"{stage}, {training['steps']} steps:\n\n" + _table(["", "first step", "last step"], rows)


def _seconds(built: Mapping[str, Any]) -> str:
    seconds = built["seconds"]
    if not seconds:
        return ""
    rows = [[phase, f"{spent:.1f}"] for phase, spent in seconds.items()]
    return "Time:\n\n" + _table(["phase", "seconds"], [*rows, ["all", f"{sum(seconds.values()):.1f}"]])


def _definitions(built: Mapping[str, Any]) -> str:
    lines = [
        "Accuracy: greedy responses that equal the answer; 95 % Wilson interval. Perplexity: held-out text. KL: "
        "forward, KL(teacher || model), full vocabulary, on held-out responses. Skip rate: share of the K slots "
        "that went to zero experts, teacher-forced on the same responses, mean over layers. Expert FLOPs saved: 1 "
        "- computed expert rows / (tokens x K of the teacher), over prompt and response tokens."
    ]
    if built["versions"]:
        lines.append("Versions: " + ", ".join(f"{name} {version}" for name, version in built["versions"].items()) + ".")
    return "\n\n".join(lines)


def _number(value: Any, form: str) -> str:
    return _MISSING if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _MISSING if value is None else f"{100 * value:.1f} %"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
