"""One run of the comparison, in one process: the commands a user would type, without starting Python for each."""

from __future__ import annotations

import json
import os
import resource
import runpy
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare_plan import STAGE1, STAGE2, Run
from inputs import HERE, REPOSITORY, Command, evaluation, tool, zeda

# What the results keep of `zeda eval`.
KEPT = (
    "accuracy", "accuracy_interval", "accuracy_count", "accuracy_by_task", "stopped_share", "kl_to_teacher",
    "skip_rate", "skip_rate_per_layer", "skip_rate_prompt", "response_tokens", "prompt_tokens", "expert_flops_saved",
    "perplexity", "model", "outcomes",
)  # fmt: skip


def call(command: Command) -> None:
    """Run one of this repository's commands in this process.

    Raises:
        SystemExit: it failed.
    """
    words = [str(word) for word in command][1:]
    print(f"$ python {shlex.join(words)}", flush=True)
    main: Callable[[list[str]], int]
    if words[0] == "-m":
        from megatron_zeda.cli import main

        arguments = words[2:]
    else:
        sys.path.insert(0, str(REPOSITORY / "checkpoint_tools"))
        main, arguments = runpy.run_path(str(REPOSITORY / words[0]), run_name="tool")["main"], words[1:]
    code = main(arguments)
    if code:
        raise SystemExit(code)


def execute(run: Run, root: Path, teacher: Path, result: Path) -> None:
    """Make, train, export and evaluate one model, and write its numbers to `result`.

    What an earlier, interrupted attempt has completed is used; training goes on from its last checkpoint.
    """
    folder = root / "runs" / run.name
    folder.mkdir(exist_ok=True)
    export = teacher
    began = time.monotonic()
    if run.stage:
        start, hf = starting_point(run, root, folder, teacher)
        for command in start:
            call(command)
        call(training(run, root, folder, hf))
        export = folder / "train" / "hf"
    evaluations = []
    for bias in (0.0, *run.biases):
        output = folder / f"evaluation_{bias}.json"
        if not output.exists():
            model = with_bias(export, bias, folder / f"bias_{bias}") if bias else export
            flags = ("--num-experts-per-token", str(run.topk)) if run.topk else ()
            call(evaluation(model, teacher, root, output, *flags))
        found = json.loads(output.read_text(encoding="utf-8"))
        evaluations.append({"bias": bias} | {key: found[key] for key in KEPT if key in found})
    used = resource.getrusage(resource.RUSAGE_SELF)
    written = {
        "run": asdict(run),
        "evaluation": evaluations[0],
        "dial": evaluations if run.biases else [],
        "training": curve(folder / "train" / "metrics.jsonl"),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "seconds": round(time.monotonic() - began, 1),
        "versions": found["versions"],
    }
    temporary = result.with_suffix(".partial")
    temporary.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    temporary.replace(result)


def starting_point(run: Run, root: Path, folder: Path, teacher: Path) -> tuple[list[Command], Path]:
    """Commands that make the Megatron checkpoint of stage 1, as far as it is missing, and its Hugging Face folder."""
    if run.needs:
        return [], root / "runs" / run.needs / "train" / "hf"
    if not run.zero_experts:
        return [], teacher
    dynamic, megatron = folder / "dynamic", folder / "dynamic-megatron"
    seed = ("--seed", str(run.seed))
    commands = []
    if not dynamic.exists():
        commands.append(tool("inject_zero_experts", "--input", teacher, "--output", dynamic, *seed, *run.inject))
    if not megatron.exists():
        commands.append(tool("hf_to_megatron", "--hf", dynamic, "--megatron", megatron))
    return commands, dynamic


def training(run: Run, root: Path, folder: Path, hf: Path) -> Command:
    """`zeda train` of the run's stage."""
    rollouts, prompts = root / "rollouts", root / "prompts"
    settings = [
        f"model.hf={hf}",
        f"model.checkpoint={checkpoint_of(run, root, folder)}",
        f"teacher.checkpoint={root / 'teacher-megatron'}",
        f"dataset.validation={rollouts / 'heldout.jsonl'}",
        f"dataset.seed={1000 + run.seed}",
        f"train.seed={1000 + run.seed}",
        f"logger.run_dir={folder / 'train'}",
        "logger.tensorboard=false",
        "checkpoint.export_hf=true",
    ]
    if run.stage == 1:
        settings += [f"dataset.train=[{rollouts / 'train.jsonl'}, {rollouts / 'text.jsonl'}]", *STAGE1]
    else:
        settings += [f"rollout.prompts=[{prompts / 'train.jsonl'}, {prompts / 'text.jsonl'}]", *STAGE2]
    return zeda("train", HERE / f"stage{run.stage}.yaml", *settings, *run.settings)


def checkpoint_of(run: Run, root: Path, folder: Path) -> Path:
    """The Megatron folder that a run starts from."""
    if run.needs:
        return root / "runs" / run.needs / "train" / "checkpoints"
    return folder / "dynamic-megatron" if run.zero_experts else root / "teacher-megatron"


def with_bias(export: Path, bias: float, folder: Path) -> Path:
    """A view of an export whose config.json turns the dial: links, and one file of its own."""
    folder.mkdir(exist_ok=True)
    for file in export.iterdir():
        if file.name != "config.json" and not (folder / file.name).exists():
            os.link(file, folder / file.name)
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"zeda_zero_logit_bias": bias}), encoding="utf-8")
    return folder


def curve(path: Path) -> dict[str, Any] | None:
    """What the held-out batches showed during training, against the response tokens that the student sampled so far.

    Returns:
        `steps`, `sampled_tokens` of all of them (0 in stage 1), `points`, and `skip_rates` of the training batches, one
        for each step; None for a run that trained nothing.
    """
    if not path.is_file():
        return None
    steps: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        steps[found["step"]] = found  # the last one, where a resumed run repeated it
    sampled, points = 0, []
    for step in sorted(steps):
        sampled += sampled_tokens(steps[step])
        seen = steps[step].get("validation")
        if seen:
            points.append({"step": step, "sampled_tokens": sampled} | scalars(seen))
    rates = [steps[step].get("skip_rate") for step in sorted(steps)]
    return {"steps": max(steps), "sampled_tokens": sampled, "points": points, "skip_rates": rates}


def sampled_tokens(step: dict[str, Any]) -> int:
    """Response tokens that the student generated for one step."""
    return int((step.get("rollout") or {}).get("tokens", 0))


def scalars(values: dict[str, Any], without: Sequence[str] = ()) -> dict[str, float]:
    """The plain numbers among some values."""
    return {key: value for key, value in values.items() if isinstance(value, (int, float)) and key not in without}
