"""The report: its schema, its numbers, and what it refuses."""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.evaluation import report_cli
from megatron_zeda.evaluation.accuracy import paired_difference
from megatron_zeda.evaluation.report import MODELS, build_report, read_metrics, report

PNG = b"\x89PNG\r\n\x1a\n"


def evaluation(name: str) -> dict[str, Any]:
    """A result in the form of ``zeda eval``, with numbers that tell the models apart."""
    rank = MODELS.index(name)
    correct = {
        "teacher": "1111111110",
        "student_stage1": "1111111000",
        "student": "1111111100",
        "control_topk_half": "1111000000",
    }[name]
    skip = 0.5 if name.startswith("student") else 0.0
    result = {
        "model": {"path": name, "num_experts": 8, "num_zero_experts": 4 if skip else 0, "num_experts_per_token": 4},
        "accuracy": correct.count("1") / 10,
        "accuracy_interval": [0.3, 0.9],
        "accuracy_count": 10,
        "accuracy_by_task": {"add": {"accuracy": 0.5, "interval": [0.3, 0.7], "count": 4}},
        "outcomes": {"prompts": "sha256:1", "correct": correct},
        "perplexity": 3.0 + rank,
        "perplexity_tokens": 1000,
        "kl_to_teacher": 0.01 * rank,
        "skip_rate": skip,
        "skip_rate_per_layer": [skip - 0.1, skip + 0.1] if skip else [0.0, 0.0],
        "skip_rate_prompt": skip,
        "skip_rate_prompt_per_layer": [skip, skip],
        "response_tokens": 50,
        "prompt_tokens": 70,
        "expert_flops_saved": 0.5 if rank else 0.0,
        "inputs": {},
        "seconds": {"load": 1.0},
        "versions": {"torch": "2"},
    }
    if name == "student":
        speedup = {"prefill": 1.2, "decode": 1.3, "total": 1.25, "prompt_tokens": 7, "response_tokens": 5}
        speedup |= {"prompt_saved": 0.75, "response_saved": 0.5}
        speedup["by_length"] = [{"seq_length": 8192, "prefill": 1.184, "decode": 1.2696}]
        result["theoretical_speedup"] = speedup
    return result


def step(number: int, **values: Any) -> dict[str, Any]:
    return {"step": number, "loss": 2.0 / number, "skip_rate": 0.1 * number, "lr": 1e-3} | values


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "evaluation").mkdir(parents=True)
    for name in MODELS:
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(evaluation(name)))
    lines = [step(1), step(2, skip_rate=None), step(3), step(2, loss=7.0)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    (folder / "seconds.json").write_text(json.dumps({"rollout": 50.5, "training": 100.0}))
    return folder


def test_report_json_has_what_was_promised(run_dir: Path) -> None:
    built = report(run_dir)
    written = json.loads((run_dir / "report.json").read_text())
    assert written == built
    for name in MODELS:
        for key in ("accuracy", "perplexity", "kl_to_teacher", "skip_rate"):
            assert isinstance(written[name][key], float), (name, key)
        assert written[name]["accuracy_interval"] == [0.3, 0.9]
        assert written[name]["accuracy_count"] == 10
        assert "outcomes" not in written[name]
    assert written["student"]["kl_to_teacher"] == 0.02
    assert written["expert_flops_saved"] == 0.5
    assert written["seconds"] == {"rollout": 50.5, "training": 100.0}
    assert written["theoretical_speedup"]["total"] == 1.25
    text = (run_dir / "report.md").read_text()
    assert "prefill 1.20 at 7 prompt tokens that skip 75.0 %, decode 1.30 at 5 response tokens that skip 50.0 %" in text
    assert written["training"]["steps"] == 3
    assert written["training"]["first"]["loss"] == 2.0


def test_differences_are_paired(run_dir: Path) -> None:
    found = report(run_dir)["accuracy_difference"]
    student, teacher = [True] * 8 + [False] * 2, [True] * 9 + [False]
    wanted = paired_difference(student, teacher)
    assert found["student_minus_teacher"] == {
        "value": wanted.value,
        "interval": list(wanted.interval),
        "mcnemar_p": 1.0,
        "only_student": 0,
        "only_other": 1,
        "count": 10,
    }
    assert found["student_minus_control_topk_half"]["value"] == pytest.approx(0.4)
    assert found["student_minus_student_stage1"]["value"] == pytest.approx(0.1)


def test_other_prompts_are_not_compared() -> None:
    other = evaluation("teacher")
    other["outcomes"]["prompts"] = "sha256:2"
    built = build_report({"student": evaluation("student"), "teacher": other})
    assert set(built["accuracy_difference"].values()) == {None}
    assert built["control_topk_half"] is None


def test_the_page_shows_the_numbers_and_the_pictures(run_dir: Path) -> None:
    report(run_dir)
    page = (run_dir / "report.md").read_text()
    assert "skips **50.0 %**" in page
    assert "| | teacher | student after stage 1 | student |" in page.replace("|  |", "| |")
    shares = " | ".join(f"{share} % (30.0 to 90.0, n = 10)" for share in ("90.0", "70.0", "80.0"))
    assert f"| accuracy | {shares} |" in page
    assert "-10.0 points" in page
    assert "| all | 150.5 |" in page
    for picture in ("skip_rate_per_layer.png", "training.png"):
        assert f"]({picture})" in page
        assert (run_dir / picture).read_bytes().startswith(PNG)
    assert not list(run_dir.glob(".*"))


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    student = evaluation("student")
    for key in ("perplexity", "kl_to_teacher", "theoretical_speedup", "accuracy_by_task"):
        del student[key]
    (tmp_path / "evaluation" / "student.json").write_text(json.dumps(student))
    built = report(tmp_path)
    assert built["teacher"] is None
    assert built["training"] is None
    assert built["student"]["perplexity"] is None
    page = (tmp_path / "report.md").read_text()
    assert "| perplexity | not measured |" in page
    assert not (tmp_path / "training.png").exists()


def test_a_run_without_evaluation_reports_its_training(run_dir: Path) -> None:
    for name in MODELS:
        (run_dir / "evaluation" / f"{name}.json").unlink()
    assert report(run_dir)["student"] is None
    assert "Training, 3 steps" in (run_dir / "report.md").read_text()


def test_two_stages_in_one_folder_are_reported_apart(run_dir: Path) -> None:
    (run_dir / "stage1").mkdir()
    (run_dir / "stage2").mkdir()
    (run_dir / "metrics.jsonl").rename(run_dir / "stage1" / "metrics.jsonl")
    built = report(run_dir)
    assert built["training"]["steps"] == 3 and built["training_stage1"] is None  # no second stage yet
    lines = [json.dumps(step(number)) + "\n" for number in range(1, 6)]
    (run_dir / "stage2" / "metrics.jsonl").write_text("".join(lines))
    built = report(run_dir)
    assert (built["training_stage1"]["steps"], built["training"]["steps"]) == (3, 5)
    page = (run_dir / "report.md").read_text()
    assert "Stage 1, 3 steps" in page and "Stage 2, 5 steps" in page
    assert page.index("training_stage1.png") < page.index("training.png")
    assert (run_dir / "training_stage1.png").read_bytes().startswith(PNG)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all floats in a nested result."""
    if isinstance(value, float):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in places(inner, (*path, key))]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_wherever_it_is(poison: float) -> None:
    evaluations = {name: evaluation(name) for name in MODELS}
    kept = [path for path in places(evaluations) if path[1] not in ("seconds", "outcomes")]
    assert len(kept) > 30
    for path in kept:
        poisoned: Any = copy.deepcopy(evaluations)
        inner = poisoned
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = poison
        with pytest.raises(ZedaError, match="not a finite number"):
            build_report(poisoned)
    with pytest.raises(ZedaError, match=r"report\.seconds\.rollout"):
        build_report(evaluations, seconds={"rollout": poison})


def test_nan_in_a_file_leaves_the_old_report(run_dir: Path) -> None:
    report(run_dir)
    before = (run_dir / "report.json").read_text()
    student = evaluation("student") | {"perplexity": math.nan}
    (run_dir / "evaluation" / "student.json").write_text(json.dumps(student))
    with pytest.raises(ZedaError, match=r"report\.student\.perplexity: not a finite number"):
        report(run_dir)
    assert (run_dir / "report.json").read_text() == before


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        report(tmp_path / "absent")
    with pytest.raises(InputError, match="nothing to report"):
        report(tmp_path)
    (tmp_path / "seconds.json").write_text("[]")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: malformed JSON"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:2: no `step`"):
        report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(InputError, match=r"seconds.json: not a JSON object"):
        report(tmp_path)
    with pytest.raises(ValueError, match="unknown models"):
        build_report({"studnet": evaluation("student")})


def test_a_repeated_step_counts_once_and_a_torn_line_not_at_all(run_dir: Path) -> None:
    assert [(line["step"], line["loss"]) for line in read_metrics(run_dir / "metrics.jsonl")] == [
        (1, 2.0),
        (2, 7.0),
        (3, 2.0 / 3),
    ]


def command(*words: str) -> int:
    parser = argparse.ArgumentParser()
    report_cli.add_arguments(parser)
    return report_cli.run(parser.parse_args(list(words)))


def test_the_command(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(run_dir), "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((run_dir / "report.json").read_text())
    assert command(str(run_dir)) == 0
    printed = capsys.readouterr().out
    assert "| 8,192 | 1.184 | 1.270 |" in printed and printed.endswith(f"\n{run_dir / 'report.md'}\n")
    assert "| 8,192 | 1.184 | 1.270 |" in (run_dir / "report.md").read_text()


def test_the_speedup_of_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A Hugging Face folder, and the same inside a Megatron folder."""
    from test_evaluation_flops import QWEN, QWEN_CONFIG

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(QWEN_CONFIG))
    options = ["--skip-rate", "0.5", "--prompt-skip-rate", "0.25", "--seq-length", "100", "--json"]
    for folder in (tmp_path / "hf", tmp_path):
        assert command("--model", str(folder), *options) == 0
        found = json.loads(capsys.readouterr().out)
        (row,) = found["by_length"]
        static = QWEN.static()
        assert row["prefill"] == pytest.approx(static.prefill_flops(100) / QWEN.prefill_flops(100, 0.25))
        assert row["decode"] == pytest.approx(static.decode_flops(100) / QWEN.decode_flops(100, 0.5))
    assert command("--model", str(tmp_path), "--skip-rate", "0.512") == 0
    printed = capsys.readouterr().out
    assert "8 of 128 and 64 zero experts" in printed and "| 32,768 |" in printed


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], "either RUN_DIR or --model"),
        (["run", "--model", "folder"], "either RUN_DIR or --model"),
        (["run", "--skip-rate", "0.5"], "--skip-rate: goes with --model only"),
        (["--model", "folder"], "--skip-rate: missing"),
        (["--model", "absent", "--skip-rate", "0.5"], "no such folder"),
    ],
)
def test_what_the_command_refuses(words: list[str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        command(*words)
