"""The report of a run: ``report.json``, ``report.md`` and two pictures, from what the run folder holds.

Read from the run folder (what is missing is reported as not measured):

    evaluation/teacher.json, student.json, control_topk_half.json   results of ``zeda eval --output``
    evaluation/student_stage1.json                                  the student between the stages
    metrics.jsonl                                                   one object per training step
    stage1/metrics.jsonl, stage2/metrics.jsonl                      where both stages left their folders in one
    seconds.json                                                    {phase: seconds}

``report.json``::

    teacher, student_stage1, student, control_topk_half    null when not evaluated, else
        accuracy, accuracy_interval [low, high] (95 %, Wilson), accuracy_count, accuracy_by_task
        perplexity, perplexity_tokens        held-out text
        kl_to_teacher                        forward, nats per response token, on the teacher's held-out responses
        skip_rate, skip_rate_per_layer       teacher-forced, held-out response tokens, mean over layers
        skip_rate_prompt, response_tokens, prompt_tokens, expert_flops_saved, model, inputs
    accuracy_difference                      {student_minus_teacher, student_minus_control_topk_half,
                                             student_minus_student_stage1}: value, interval (95 %, paired), mcnemar_p,
                                             only_student, only_other, count; null when not comparable
    expert_flops_saved                       the student's: 1 - real rows / (T K)
    theoretical_speedup                      the student's: static over dynamic FLOPs {prefill, decode, total, ...}
    training                                 {steps, first, last}: the metrics of the first and the last step, of
                                             the last stage if there are two
    training_stage1                          the same of stage 1, if there are two
    seconds                                  per phase
    versions

A value that was not measured is null. NaN and infinity are refused: they mean that a measurement went wrong.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_zeda.data.jsonl import parse_line
from megatron_zeda.errors import InputError, ZedaError, disk_errors
from megatron_zeda.evaluation.accuracy import paired_difference
from megatron_zeda.evaluation.markdown import render_markdown
from megatron_zeda.evaluation.plots import plot_skip_rate_per_layer, plot_training

MODELS = ("teacher", "student_stage1", "student", "control_topk_half")
SKIP_RATE_PICTURE = "skip_rate_per_layer.png"
TRAINING_PICTURE, STAGE1_PICTURE = "training.png", "training_stage1.png"
_MODEL_KEYS = (
    "accuracy",
    "accuracy_interval",
    "accuracy_count",
    "accuracy_by_task",
    "perplexity",
    "perplexity_tokens",
    "kl_to_teacher",
    "skip_rate",
    "skip_rate_per_layer",
    "skip_rate_prompt",
    "skip_rate_prompt_per_layer",
    "response_tokens",
    "prompt_tokens",
    "expert_flops_saved",
    "model",
    "inputs",
)


def report(run_dir: Path) -> dict[str, Any]:
    """Write the report of a run folder, replacing an older one, and return what ``report.json`` holds.

    Raises:
        InputError: no such folder, nothing to report in it, or a malformed file.
        ZedaError: a number that is not finite.
    """
    if not run_dir.is_dir():
        raise InputError("no such folder", where=run_dir, rule="the folder of a run", fix="check the path")
    evaluations = {name: _read_json(run_dir / "evaluation" / f"{name}.json") for name in MODELS}
    stage1, metrics = read_stages(run_dir)
    if not metrics and not any(evaluations.values()):
        raise InputError(
            "nothing to report",
            where=run_dir,
            rule="metrics.jsonl, or evaluation/student.json and its like",
            fix="run `zeda train` or `zeda eval --output <run folder>/evaluation/student.json` first",
        )
    seconds = _read_json(run_dir / "seconds.json") or {}
    built = build_report(evaluations, metrics=metrics, stage1=stage1, seconds=seconds)
    write_report(built, run_dir, metrics=metrics, stage1=stage1)
    return built


def build_report(
    evaluations: Mapping[str, Mapping[str, Any] | None],
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    stage1: Sequence[Mapping[str, Any]] = (),
    seconds: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Put results together; see the module's docstring for the outcome.

    Args:
        evaluations: results of :func:`megatron_zeda.evaluation.evaluate` by name, some of :data:`MODELS`.
        metrics: training steps in order, of the last stage.
        stage1: those of stage 1, if there are two stages.
        seconds: per phase.
    """
    unknown = set(evaluations) - set(MODELS)
    if unknown:
        raise ValueError(f"unknown models {sorted(unknown)}; known: {MODELS}")
    found = {name: evaluations.get(name) for name in MODELS}
    built: dict[str, Any] = {
        name: None if result is None else {key: result.get(key) for key in _MODEL_KEYS}
        for name, result in found.items()
    }
    student = found["student"] or {}
    built["accuracy_difference"] = {
        f"student_minus_{other}": _difference(found["student"], found[other]) for other in MODELS if other != "student"
    }
    built["expert_flops_saved"] = student.get("expert_flops_saved")
    built["theoretical_speedup"] = student.get("theoretical_speedup")
    built["training"], built["training_stage1"] = _ends(metrics), _ends(stage1)
    built["seconds"] = dict(seconds or {})
    built["versions"] = next((result["versions"] for result in found.values() if result), {})
    refuse_not_finite(built)
    return built


def _ends(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not metrics:
        return None
    return {"steps": metrics[-1].get("step"), "first": dict(metrics[0]), "last": dict(metrics[-1])}


def _difference(student: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Paired difference of accuracies, if both models answered the same prompts."""
    if not student or not other or "outcomes" not in student or "outcomes" not in other:
        return None
    if student["outcomes"]["prompts"] != other["outcomes"]["prompts"]:
        return None
    ours, theirs = ([mark == "1" for mark in result["outcomes"]["correct"]] for result in (student, other))
    found = paired_difference(ours, theirs)
    return {
        "value": found.value,
        "interval": list(found.interval),
        "mcnemar_p": found.mcnemar_p,
        "only_student": found.only_first,
        "only_other": found.only_second,
        "count": found.count,
    }


def refuse_not_finite(value: Any, key: str = "report") -> None:
    """Raise a :class:`ZedaError` that names the first number that is NaN or infinite, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ZedaError(
            "not a finite number", where=key, value=value, fix="a measurement went wrong; look at its inputs"
        )
    if isinstance(value, Mapping):
        for name, inner in value.items():
            refuse_not_finite(inner, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for index, inner in enumerate(value):
            refuse_not_finite(inner, f"{key}[{index}]")


def write_report(
    built: Mapping[str, Any],
    run_dir: Path,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    stage1: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write ``report.json``, ``report.md`` and the pictures into ``run_dir``; each file is replaced as a whole."""
    refuse_not_finite(built)
    pictures: dict[str, bytes] = {}
    student = built["student"] or {}
    if student.get("skip_rate_per_layer"):
        pictures[SKIP_RATE_PICTURE] = plot_skip_rate_per_layer(
            student["skip_rate_per_layer"], student.get("skip_rate_prompt_per_layer")
        )
    for name, steps in ((STAGE1_PICTURE, stage1), (TRAINING_PICTURE, metrics)):
        if len(steps) > 1:
            pictures[name] = plot_training(steps)
    files = dict(pictures)
    files["report.md"] = render_markdown(built, pictures=list(pictures)).encode()
    # Last, so that whoever waits for it finds everything else.
    files["report.json"] = (json.dumps(built, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
    for name, content in files.items():
        write_file(run_dir / name, content)


def write_file(path: Path, content: bytes) -> None:
    """Write or replace one file as a whole."""
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with disk_errors(path):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"malformed JSON: {error}", where=path, fix="make the file again") from error
    if not isinstance(found, dict):
        raise InputError("not a JSON object", where=path, fix="make the file again")
    return found


def read_stages(run_dir: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the steps of stage 1, if another stage followed it in this folder, and those of the last stage.

    Raises:
        InputError: see :func:`read_metrics`.
    """
    stage1, stage2, own = (read_metrics(run_dir / name / "metrics.jsonl") for name in ("stage1", "stage2", "."))
    last = own or stage2
    return (stage1, last) if last else ([], stage1)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the training steps in order, the last line of a step that was repeated after a resume.

    A torn last line, left by a run that was killed, is skipped.

    Raises:
        InputError: another malformed line, or a line without ``step``.
    """
    if not path.is_file():
        return []
    steps: dict[int, dict[str, Any]] = {}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, text in enumerate(lines, start=1):
        if number == len(lines) and not text.endswith("\n"):
            break
        where = f"{path}:{number}"
        line = parse_line(text, where)
        if type(line.get("step")) is not int:
            raise InputError("no `step`", where=where, value=line.get("step"), rule="an integer")
        steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]
