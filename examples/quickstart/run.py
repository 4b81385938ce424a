"""`make quickstart`: from a post-trained teacher to a dynamic student and a report, with the commands a user types.

Every phase is a command of this repository, printed before it runs; the paths in between stay in the run folder
(default `runs/quickstart`). Nothing but a failed command makes this script fail: a missed aim is printed as missed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tasks

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
HELD_OUT_TEXT = HERE / "heldout_text.txt"

NUM_TRAIN_FACTS, NUM_TRAIN_ALGORITHMS = 7500, 4000
NUM_HELD_OUT_FACTS, NUM_HELD_OUT_ALGORITHMS = 1000, 200
NUM_TEXT_OPENINGS, OPENING_CHARACTERS, CONTINUATION_TOKENS = 1000, 40, 16
LONGEST_ANSWER = 32  # tokens; the longest right answer has 17


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

    def phase(self, name: str, *commands: list[str | Path]) -> None:
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


def zeda(*words: str | Path) -> list[str | Path]:
    """A `zeda` command, run with the interpreter that runs this script."""
    return [sys.executable, "-m", "megatron_zeda.cli", *words]


def tool(name: str, *words: str | Path) -> list[str | Path]:
    """One of the programs in checkpoint_tools/."""
    return [sys.executable, f"checkpoint_tools/{name}.py", *words]


def write_prompts(folder: Path) -> None:
    """Training questions, held-out questions, and openings of real text, each a jsonl file of prompts."""
    facts = tasks.load_facts()
    sets = {
        "train": tasks.question_set(
            facts, num_facts=NUM_TRAIN_FACTS, num_algorithms=NUM_TRAIN_ALGORITHMS, held_out=False, seed=0
        ),
        "heldout": tasks.question_set(
            facts, num_facts=NUM_HELD_OUT_FACTS, num_algorithms=NUM_HELD_OUT_ALGORITHMS, held_out=True, seed=0
        ),
    }
    files: dict[str, list[dict[str, Any]]] = {
        name: [question.to_json() for question in questions] for name, questions in sets.items()
    }
    files["text"] = text_openings()
    folder.mkdir()
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} prompts", flush=True)


def text_openings() -> list[dict[str, Any]]:
    """Prompts without an answer: pieces of the standard library's sources for the teacher to go on with."""
    rng = random.Random(0)
    texts = [path.read_text("utf-8") for path in tasks.text_files(held_out=False)]
    weights = [len(text) for text in texts]
    openings: list[dict[str, Any]] = []
    while len(openings) < NUM_TEXT_OPENINGS:
        (text,) = rng.choices(texts, weights)
        start = rng.randrange(max(1, len(text) - OPENING_CHARACTERS))
        piece = text[start : start + OPENING_CHARACTERS]
        if piece.strip():
            openings.append({"id": f"text/{len(openings)}", "prompt": piece})
    return openings


def run(run_dir: Path, teacher: Path, overrides: list[str]) -> None:
    """All phases, in order."""
    driver = Driver(run_dir)
    prompts, rollouts, evaluation = run_dir / "prompts", run_dir / "rollouts", run_dir / "evaluation"
    dynamic, student = run_dir / "dynamic", run_dir / "student"
    rollouts.mkdir()
    write_prompts(prompts)

    def responses(name: str, *flags: str) -> list[str | Path]:
        return zeda(
            "rollout", "--model", teacher, "--prompts", prompts / f"{name}.jsonl",
            "--output", rollouts / f"{name}.jsonl", *flags,
        )  # fmt: skip

    greedy = ("--temperature", "0", "--max-new-tokens", str(LONGEST_ANSWER), "--batch-size", "256")
    sampled = ("--temperature", "1", "--max-new-tokens", str(CONTINUATION_TOKENS), "--batch-size", "256")
    driver.phase(
        "teacher rollouts",
        responses("train", *greedy),
        responses("text", *sampled),
        responses("heldout", *greedy),
    )
    driver.phase("injection", tool("inject_zero_experts", "--input", teacher, "--output", dynamic))
    driver.phase(
        "import",
        tool("hf_to_megatron", "--hf", dynamic, "--megatron", run_dir / "dynamic-megatron"),
        tool("hf_to_megatron", "--hf", teacher, "--megatron", run_dir / "teacher-megatron"),
    )
    driver.phase("stage 1", zeda("train", HERE / "stage1.yaml", *paths_of(run_dir), *overrides))
    driver.phase("export", tool("megatron_to_hf", "--megatron", run_dir / "checkpoints", "--hf", student))

    def evaluate(name: str, folder: Path, *flags: str) -> list[str | Path]:
        return zeda(
            "eval", "--model", folder, "--teacher", teacher, "--prompts", prompts / "heldout.jsonl",
            "--rollouts", rollouts / "heldout.jsonl", "--text", HELD_OUT_TEXT,
            "--max-new-tokens", str(LONGEST_ANSWER), "--output", evaluation / f"{name}.json", *flags,
        )  # fmt: skip

    half = json.loads((teacher / "config.json").read_text())["num_experts_per_tok"] // 2
    driver.phase(
        "evaluation",
        evaluate("teacher", teacher),
        evaluate("student", student),
        evaluate("control_topk_half", teacher, "--num-experts-per-token", str(half)),
    )
    driver.phase("report", zeda("report", run_dir))


def paths_of(run_dir: Path) -> list[str]:
    """The overrides that move stage1.yaml's paths to another run folder; none for the folder it names."""
    if run_dir == REPOSITORY / "runs" / "quickstart":
        return []
    return [
        f"model.hf={run_dir / 'dynamic'}",
        f"model.checkpoint={run_dir / 'dynamic-megatron'}",
        f"teacher.checkpoint={run_dir / 'teacher-megatron'}",
        f"dataset.train=[{run_dir / 'rollouts' / 'train.jsonl'}, {run_dir / 'rollouts' / 'text.jsonl'}]",
        f"dataset.validation={run_dir / 'rollouts' / 'heldout.jsonl'}",
        f"logger.run_dir={run_dir}",
    ]


# --------------------------------------------------------------------------------------------------------- the end
def table(report: dict[str, Any]) -> str:
    """The main numbers of the three models side by side."""
    names = {"teacher": "teacher", "student": "student", "control_topk_half": "teacher, K/2"}

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
    rows.append(["skip rate", *(percent(model["skip_rate"]) for model in models)])
    rows.append(["expert FLOPs saved", *(percent(model["expert_flops_saved"]) for model in models)])
    return "\n".join(f"{row[0]:<27}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows)


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
        (f"under 10 minutes: {total / 60:.1f} minutes", total < 600),
    ]
    return [f"{'met   ' if met else 'MISSED'}  {text}" for text, met in found]


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Make a dynamic student of the small teacher and report on both.")
    parser.add_argument("--run-dir", type=Path, default=REPOSITORY / "runs" / "quickstart", help="(%(default)s)")
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher", help="Hugging Face folder (%(default)s)")
    parser.add_argument("--force", action="store_true", help="replace an existing run folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for `zeda train`")
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
