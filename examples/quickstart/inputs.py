"""What the quickstart and the comparison start from: prompt files, and the commands that make the rest of them."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tasks

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
HELD_OUT_TEXT = HERE / "heldout_text.txt"
OPENING_CHARACTERS, CONTINUATION_TOKENS = 40, 16
LONGEST_ANSWER = 32  # tokens; the longest right answer has 17

Command = list[str | Path]


@dataclass(frozen=True)
class Sizes:
    """How many prompts of each kind."""

    train_facts: int = 7500
    train_algorithms: int = 4000
    held_out_facts: int = 1000
    held_out_algorithms: int = 200
    text_openings: int = 1000


def zeda(*words: str | Path) -> Command:
    """A `zeda` command, run with the interpreter that runs this script."""
    return [sys.executable, "-m", "megatron_zeda.cli", *words]


def tool(name: str, *words: str | Path) -> Command:
    """One of the programs in checkpoint_tools/."""
    return [sys.executable, f"checkpoint_tools/{name}.py", *words]


def write_prompts(folder: Path, sizes: Sizes, *, skip_held_out: int = 0) -> None:
    """Training questions, held-out questions, and openings of real text, each a jsonl file of prompts.

    Args:
        folder: is created.
        sizes: how many of each.
        skip_held_out: leave out the first so many held-out questions about facts, and the algorithms' of that draw:
            the quickstart's, on which its settings were chosen.
    """
    facts = tasks.load_facts()
    train = tasks.question_set(
        facts, num_facts=sizes.train_facts, num_algorithms=sizes.train_algorithms, held_out=False, seed=0
    )
    files: dict[str, list[dict[str, Any]]] = {
        "train": [question.to_json() for question in train],
        "heldout": [question.to_json() for question in _held_out(facts, sizes, skip_held_out)],
        "text": text_openings(sizes.text_openings),
    }
    folder.mkdir(parents=True)
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} prompts", flush=True)


def _held_out(facts: list[tasks.Fact], sizes: Sizes, skip: int) -> list[tasks.Question]:
    if not skip:
        return tasks.question_set(
            facts, num_facts=sizes.held_out_facts, num_algorithms=sizes.held_out_algorithms, held_out=True, seed=0
        )
    # The draw of `seed` 0 takes the facts in one order: asked for more, it begins with the same ones.
    asked = {question.id for question in _held_out(facts, Sizes(held_out_facts=skip), 0)}
    more = tasks.question_set(facts, num_facts=len(facts), num_algorithms=0, held_out=True, seed=0)
    others = [question for question in more if question.id not in asked]
    new = tasks.question_set(facts, num_facts=0, num_algorithms=2 * sizes.held_out_algorithms, held_out=True, seed=1)
    unseen = [question for question in new if question.id not in asked]
    return others[: sizes.held_out_facts] + unseen[: sizes.held_out_algorithms]


def text_openings(count: int) -> list[dict[str, Any]]:
    """Prompts without an answer: pieces of the standard library's sources for the teacher to go on with."""
    rng = random.Random(0)
    texts = [path.read_text("utf-8") for path in tasks.text_files(held_out=False)]
    weights = [len(text) for text in texts]
    openings: list[dict[str, Any]] = []
    while len(openings) < count:
        (text,) = rng.choices(texts, weights)
        start = rng.randrange(max(1, len(text) - OPENING_CHARACTERS))
        piece = text[start : start + OPENING_CHARACTERS]
        if piece.strip():
            openings.append({"id": f"text/{len(openings)}", "prompt": piece})
    return openings


def teacher_rollouts(teacher: Path, run_dir: Path) -> list[Command]:
    """Greedy answers to the questions, sampled continuations of the openings."""
    greedy = ("--temperature", "0", "--max-new-tokens", str(LONGEST_ANSWER), "--batch-size", "256")
    sampled = ("--temperature", "1", "--max-new-tokens", str(CONTINUATION_TOKENS), "--batch-size", "256")
    return [
        zeda(
            "rollout", "--model", teacher, "--prompts", run_dir / "prompts" / f"{name}.jsonl",
            "--output", run_dir / "rollouts" / f"{name}.jsonl", *flags,
        )
        for name, flags in (("train", greedy), ("text", sampled), ("heldout", greedy))
    ]  # fmt: skip


def evaluation(model: Path, teacher: Path, inputs: Path, output: Path, *flags: str) -> Command:
    """Accuracy, KL, skip rate and perplexity of a Hugging Face folder on the held-out files of `inputs`."""
    return zeda(
        "eval", "--model", model, "--teacher", teacher, "--prompts", inputs / "prompts" / "heldout.jsonl",
        "--rollouts", inputs / "rollouts" / "heldout.jsonl", "--text", HELD_OUT_TEXT,
        "--max-new-tokens", str(LONGEST_ANSWER), "--output", output, *flags,
    )  # fmt: skip
