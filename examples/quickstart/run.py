"""`make quickstart`: from a post-trained teacher to a dynamic student and a report, with the commands a user types.

Every phase is a command of this repository, printed before it runs; the paths in between stay in the run folder
(default `runs/quickstart`). Nothing but a failed command makes this script fail: a missed aim is printed as missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from inputs import HERE, REPOSITORY, Command, Sizes, evaluation, teacher_rollouts, tool, write_prompts, zeda

DEFAULT_RUN_DIR = REPOSITORY / "runs" / "quickstart"


class PhaseFailed(Exception):
    """A command ended with a non-zero exit code."""


class Driver:
    """Runs commands phase by phase and keeps their times."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.seconds: dict[str, float] = {}
        # More threads than this make a model of this size slower.
        threads = str(min(4, os.cpu_count() or 1))
        self.environment = {"OMP_NUM_THREADS": threads, **os.environ, "PYTHONPATH": str(REPOSITORY)}

    def phase(self, name: str, *commands: Command) -> None:
        """Run commands in the repository's root, show them, and record how long they took together."""
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        for command in commands:
            words = [str(word) for word in command]
            print("$ " + shlex.join(["python" if word == sys.executable else word for word in words]), flush=True)
            code = subprocess.run(words, cwd=REPOSITORY, env=self.environment).returncode
            if code:
                raise PhaseFailed(f"{name}: exit code {code} from: {shlex.join(words)}")
        self.seconds[name] = round(time.perf_counter() - start, 1)
        (self.run_dir / "seconds.json").write_text(json.dumps(self.seconds, indent=2) + "\n")
        print(f"   {self.seconds[name]:.1f} s", flush=True)


def run(run_dir: Path, teacher: Path, overrides: list[str]) -> None:
    """All phases, in order."""
    driver = Driver(run_dir)
    (run_dir / "rollouts").mkdir()
    write_prompts(run_dir / "prompts", Sizes())
    dynamic = run_dir / "dynamic"
    driver.phase("teacher rollouts", *teacher_rollouts(teacher, run_dir))
    driver.phase("injection", tool("inject_zero_experts", "--input", teacher, "--output", dynamic))
    driver.phase(
        "import",
        tool("hf_to_megatron", "--hf", dynamic, "--megatron", run_dir / "dynamic-megatron"),
        tool("hf_to_megatron", "--hf", teacher, "--megatron", run_dir / "teacher-megatron"),
    )
    for stage in (1, 2):
        settings = [*paths_of(run_dir, stage), *overrides_of(stage, overrides)]
        driver.phase(f"stage {stage}", zeda("train", HERE / f"stage{stage}.yaml", *settings))
    driver.phase(
        "export",
        tool("megatron_to_hf", "--megatron", run_dir / "stage1" / "checkpoints", "--hf", run_dir / "student_stage1"),
        tool("megatron_to_hf", "--megatron", run_dir / "stage2" / "checkpoints", "--hf", run_dir / "student"),
    )

    def evaluate(name: str, folder: Path, *flags: str) -> Command:
        return evaluation(folder, teacher, run_dir, run_dir / "evaluation" / f"{name}.json", *flags)

    half = json.loads((teacher / "config.json").read_text())["num_experts_per_tok"] // 2
    driver.phase(
        "evaluation",
        evaluate("teacher", teacher),
        evaluate("control_topk_half", teacher, "--num-experts-per-token", str(half)),
        evaluate("student_stage1", run_dir / "student_stage1"),
        evaluate("student", run_dir / "student"),
    )
    driver.phase("report", zeda("report", run_dir))


def paths_of(run_dir: Path, stage: int) -> list[str]:
    """The overrides that move a stage's paths to another run folder; none for the folder that its YAML names."""
    if run_dir == DEFAULT_RUN_DIR:
        return []
    rollouts, own = run_dir / "rollouts", run_dir / f"stage{stage}"
    settings = [
        f"model.hf={run_dir / 'dynamic'}",
        f"teacher.checkpoint={run_dir / 'teacher-megatron'}",
        f"dataset.validation={rollouts / 'heldout.jsonl'}",
        f"logger.run_dir={own}",
    ]
    if stage == 1:
        training = f"[{rollouts / 'train.jsonl'}, {rollouts / 'text.jsonl'}]"
        return [*settings, f"model.checkpoint={run_dir / 'dynamic-megatron'}", f"dataset.train={training}"]
    prompts = f"[{run_dir / 'prompts' / 'train.jsonl'}, {run_dir / 'prompts' / 'text.jsonl'}]"
    start = run_dir / "stage1" / "checkpoints"
    return [*settings, f"model.checkpoint={start}", f"rollout.prompts={prompts}"]


def overrides_of(stage: int, overrides: list[str]) -> list[str]:
    """Those meant for both stages and, without their prefix, those for this one (`stage2:train.train_iters=20`)."""
    own = f"stage{stage}:"
    return [word.removeprefix(own) for word in overrides if word.startswith(own) or not word.startswith("stage")]


# --------------------------------------------------------------------------------------------------------- the end
def table(report: dict[str, Any]) -> str:
    """The main numbers of the models side by side."""
    names = {
        "teacher": "teacher",
        "control_topk_half": "K/2, untrained",
        "student_stage1": "stage 1",
        "student": "stages 1 + 2",
    }

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    rows = [["", *names.values()]]
    models = [report[name] for name in names]
    rows.append(["accuracy, held out", *(percent(model["accuracy"]) for model in models)])
    intervals = [[100 * bound for bound in model["accuracy_interval"]] for model in models]
    rows.append(["  95 % interval", *(f"{low:.1f} - {high:.1f}" for low, high in intervals)])
    rows.append(["KL to teacher, nats/token", *(number(model["kl_to_teacher"]) for model in models)])
    rows.append(["perplexity, held-out text", *(number(model["perplexity"]) for model in models)])
    rows.append(["skip rate, responses", *(percent(model["skip_rate"]) for model in models)])
    rows.append(["skip rate, prompts", *(percent(model["skip_rate_prompt"]) for model in models)])
    rows.append(["expert FLOPs saved", *(percent(model["expert_flops_saved"]) for model in models)])
    return "\n".join(f"{row[0]:<27}" + "".join(f"{cell:>16}" for cell in row[1:]) for row in rows)


def aims(report: dict[str, Any]) -> list[str]:
    """Each aim of the quickstart with the measured value and whether it was met."""
    teacher, student, control = (report[name] for name in ("teacher", "student", "control_topk_half"))
    loss = teacher["accuracy"] - student["accuracy"]
    gain = student["accuracy"] - control["accuracy"]
    total = sum(report["seconds"].values())
    found = [
        (f"teacher above 80 %: {100 * teacher['accuracy']:.1f} %", teacher["accuracy"] > 0.8),
        (f"skip rate within 48 to 55 %: {100 * student['skip_rate']:.1f} %", 0.48 <= student["skip_rate"] <= 0.55),
        (f"student within 2 points of the teacher: {100 * loss:+.1f} points lost", loss <= 0.02),
        (
            f"student clearly above the untrained K/2 control: {100 * gain:+.1f} points",
            student["accuracy_interval"][0] > control["accuracy_interval"][1],
        ),
        (f"under 15 minutes: {total / 60:.1f} minutes", total < 900),
    ]
    return [f"{'met   ' if met else 'MISSED'}  {text}" for text, met in found]


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a dynamic student of the small teacher and report on both.")
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="(%(default)s)")
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher", help="Hugging Face folder (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing run folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="for both `zeda train`, or stage1:... for one"
    )
    arguments = parser.parse_args()
    run_dir = arguments.run_dir.resolve()
    if run_dir.exists():
        if not arguments.force:
            print(f"error: {run_dir} exists; remove it or give --force to replace it", file=sys.stderr)
            return 2
        if not (run_dir / "prompts").is_dir():
            print(f"error: {run_dir} is no run folder of the quickstart; choose another --run-dir", file=sys.stderr)
            return 2
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True)
    try:
        run(run_dir, arguments.teacher.resolve(), arguments.overrides)
    except PhaseFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    print(f"\n{table(report)}\n")
    print("\n".join(aims(report)))
    print(f"\nThe whole report: {run_dir / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
