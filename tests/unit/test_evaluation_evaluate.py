"""``zeda eval`` on exported folders: what comes out, what is refused."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import VOCABULARY, save_static, save_tokenizer, write_lines

from megatron_zeda.errors import InputError
from megatron_zeda.evaluation import cli
from megatron_zeda.evaluation.accuracy import wilson_interval
from megatron_zeda.evaluation.evaluate import EvaluationInputs, evaluate
from megatron_zeda.evaluation.flops import ModelShape
from megatron_zeda.rollout import Sampling, TransformersEngine, rollout
from megatron_zeda.rollout.hf_folder import weights_version
from megatron_zeda.rollout.sources import transformers_source

NEW_TOKENS = 5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_static: Path) -> dict[str, Path]:
    """Prompts of which the teacher answers 4 of 6 rightly, its responses, and a text."""
    folder = tmp_path_factory.mktemp("files")
    texts = ["a", "bc", "def", "q?", "12", "zz"]
    engine = TransformersEngine(tiny_static)
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        ids = [VOCABULARY.index(character) for character in text]
        said = engine.model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :]
        words = "".join(VOCABULARY[token] for token in said.tolist()).removesuffix("<eos>")
        wrong = number in (1, 4)
        lines.append({"prompt": text, "answer": "wrong" if wrong else f" {words} ", "task": f"task {number % 2}"})
    prompts = write_lines(folder / "prompts.jsonl", lines)
    rollouts = folder / "rollouts.jsonl"
    rollout(transformers_source(tiny_static), prompts, rollouts, Sampling(max_new_tokens=NEW_TOKENS, temperature=0.0))
    text = folder / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 5)
    return {"prompts": prompts, "rollouts": rollouts, "text": text}


def test_the_teacher_against_itself(files: dict[str, Path], tiny_static: Path) -> None:
    found = evaluate(EvaluationInputs(tiny_static, teacher=tiny_static, max_new_tokens=NEW_TOKENS, **files))
    assert found["accuracy"] == 4 / 6
    assert found["accuracy_interval"] == list(wilson_interval(4, 6))
    assert found["accuracy_count"] == 6
    assert found["outcomes"]["correct"] == "101101"
    assert {task: value["accuracy"] for task, value in found["accuracy_by_task"].items()} == {
        "task 0": 2 / 3,
        "task 1": 2 / 3,
    }
    assert found["kl_to_teacher"] == 0.0
    assert found["skip_rate"] == found["expert_flops_saved"] == 0.0
    assert found["inputs"]["rollouts"]["weights_versions"] == [weights_version(tiny_static)]
    assert found["perplexity_tokens"] == 225 - 3  # windows of 96 tokens, whose first token is not predicted
    assert found["model"] == {
        "path": str(tiny_static),
        "architecture": "Qwen3MoeForCausalLM",
        "weights_version": weights_version(tiny_static),
        "compute": found["model"]["compute"],
        "num_layers": 2,
        "num_experts": 8,
        "num_zero_experts": 0,
        "num_experts_per_token": 4,
    }
    json.dumps(found, allow_nan=False)


def test_the_student(files: dict[str, Path], tiny_static: Path, tiny_dynamic: Path) -> None:
    found = evaluate(EvaluationInputs(tiny_dynamic, teacher=tiny_static, max_new_tokens=NEW_TOKENS, **files))
    assert found["kl_to_teacher"] > 0
    assert 0 < found["skip_rate"] < 1
    tokens = found["response_tokens"] + found["prompt_tokens"]
    mean = found["skip_rate"] * found["response_tokens"] + found["skip_rate_prompt"] * found["prompt_tokens"]
    assert found["expert_flops_saved"] == pytest.approx(mean / tokens)
    speedup = found["theoretical_speedup"]
    assert speedup["response_tokens"] == round(found["response_tokens"] / 6)
    assert found["skip_rate_prompt"] != pytest.approx(found["skip_rate"])
    shape = ModelShape.from_hf_config(json.loads((tiny_dynamic / "config.json").read_text()))
    prompt, response, static = speedup["prompt_tokens"], speedup["response_tokens"], shape.static()
    prefill = static.prefill_flops(prompt) / shape.prefill_flops(prompt, found["skip_rate_prompt"])
    decode = static.decode_flops(response, prefix=prompt)
    decode /= shape.decode_flops(response, found["skip_rate"], prefix=prompt)
    assert speedup["prefill"] == pytest.approx(prefill) and speedup["decode"] == pytest.approx(decode)
    row = speedup["by_length"][0]
    assert row["seq_length"] == 1024
    assert row["prefill"] == static.prefill_flops(1024) / shape.prefill_flops(1024, found["skip_rate_prompt"])
    assert row["decode"] == static.decode_flops(1024) / shape.decode_flops(1024, found["skip_rate"])
    assert found["model"]["num_zero_experts"] == 4
    assert set(found["seconds"]) == {"load", "accuracy", "rollouts", "text"}


def test_halving_k_saves_half_of_the_experts_and_skips_nothing(files: dict[str, Path], tiny_static: Path) -> None:
    found = evaluate(
        EvaluationInputs(tiny_static, teacher=tiny_static, rollouts=files["rollouts"], num_experts_per_token=2)
    )
    assert found["skip_rate"] == 0
    assert found["expert_flops_saved"] == 0.5
    assert found["theoretical_speedup"]["prompt_saved"] == found["theoretical_speedup"]["response_saved"] == 0.5
    assert found["kl_to_teacher"] > 0
    assert found["model"]["num_experts_per_token"] == 2
    assert "accuracy" not in found and "perplexity" not in found


def test_limit_takes_the_first_of_each(files: dict[str, Path], tiny_static: Path) -> None:
    inputs = EvaluationInputs(
        tiny_static, prompts=files["prompts"], rollouts=files["rollouts"], limit=2, max_new_tokens=NEW_TOKENS
    )
    found = evaluate(inputs)
    assert found["outcomes"]["correct"] == "10"
    assert found["inputs"]["rollouts"]["count"] == 2
    assert "kl_to_teacher" not in found


def test_inputs_that_measure_nothing_are_refused(tiny_static: Path, files: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        evaluate(EvaluationInputs(tiny_static))
    with pytest.raises(InputError, match="--teacher: no responses to compare on"):
        evaluate(EvaluationInputs(tiny_static, teacher=tiny_static, prompts=files["prompts"]))
    with pytest.raises(InputError, match="limit: out of range"):
        evaluate(EvaluationInputs(tiny_static, prompts=files["prompts"], limit=0))


def test_prompts_without_answers_are_named(tmp_path: Path, tiny_static: Path) -> None:
    prompts = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "answer": "b"}, {"prompt": "b"}])
    with pytest.raises(InputError, match=r"p.jsonl:2: no `answer`"):
        evaluate(EvaluationInputs(tiny_static, prompts=prompts))


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, tiny_static: Path, files: dict[str, Path]) -> None:
    larger = save_static(tmp_path / "larger", vocab_size=len(VOCABULARY) + 3)
    with pytest.raises(InputError, match=f"has {len(VOCABULARY) + 3} tokens in its vocabulary"):
        evaluate(EvaluationInputs(tiny_static, teacher=larger, rollouts=files["rollouts"]))
    other = Path(shutil.copytree(tiny_static, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="tokenizer has other tokens"):
        evaluate(EvaluationInputs(tiny_static, teacher=other, rollouts=files["rollouts"]))


def test_rollouts_of_a_larger_vocabulary_are_named(tmp_path: Path, tiny_static: Path, files: dict[str, Path]) -> None:
    lines = [json.loads(line) for line in files["rollouts"].read_text().splitlines()]
    lines[1]["response_ids"][0] = len(VOCABULARY)
    path = write_lines(tmp_path / "r.jsonl", lines)
    with pytest.raises(InputError, match=r"r.jsonl:2: token id outside the vocabulary"):
        evaluate(EvaluationInputs(tiny_static, rollouts=path))


def command(*arguments: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


def test_the_command_prints_and_writes_the_same(
    tmp_path: Path, tiny_static: Path, files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "out.json"
    flags = ["--model", tiny_static, "--text", files["text"], "--rollouts", files["rollouts"]]
    assert cli.run(command(*flags, "--output", output, "--json")) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(output.read_text())
    assert printed.err == ""
    with pytest.raises(InputError, match="the output exists"):
        cli.run(command(*flags, "--output", output))
    assert cli.run(command(*flags, "--prompts", files["prompts"], "--max-new-tokens", NEW_TOKENS)) == 0
    assert "accuracy              66.7 %" in capsys.readouterr().out


def test_a_folder_without_tokenizer_can_be_scored_on_rollouts(
    tmp_path: Path, tiny_static: Path, files: dict[str, Path]
) -> None:
    bare = Path(shutil.copytree(tiny_static, tmp_path / "bare"))
    for path in bare.glob("*token*"):
        path.unlink()
    found = evaluate(EvaluationInputs(bare, teacher=tiny_static, rollouts=files["rollouts"]))
    assert found["kl_to_teacher"] == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(InputError, match="the folder has no tokenizer"):
        evaluate(EvaluationInputs(bare, text=files["text"]))
    save_tokenizer(bare)
    evaluate(EvaluationInputs(bare, text=files["text"]))
