"""The card of an export says what is known and nothing else, in a form that Hugging Face reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import make_hf

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.conversion.model_card import CardMetrics, model_card, read_card_metrics
from megatron_zeda.errors import InputError
from megatron_zeda.evaluation.report import build_report
from megatron_zeda.models.qwen3_moe import Qwen3Moe

CONFIG = {"num_experts_per_tok": 8}


def _card(format: Any = "zeda", zero: int = 64, **changes: Any) -> str:
    config = CONFIG | changes.pop("config", {})
    sizes = {"num_experts": 128, "num_zero_experts": zero, "num_bytes": 61_000_000_000}
    return model_card(Qwen3Moe(), config, format, **sizes, **changes)


def _front(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    return dict(yaml.safe_load(front))


def _table(card: str) -> dict[str, str]:
    rows = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ") and " | " in line[2:]]
    return {row[0]: row[1] for row in rows if len(row) == 2}


def test_everything_that_is_given_is_there() -> None:
    metrics = CardMetrics(
        base_model="Qwen/Qwen3-30B-A3B", weight=2.0, skip_rate=0.512, scores={"GSM8K": 0.951}, source="scores.json"
    )
    card = _card(metrics=metrics, config={"zeda_zero_logit_bias": -0.5}, num_carried=3)
    assert _front(card)["base_model"] == "Qwen/Qwen3-30B-A3B"
    assert _front(card)["base_model_relation"] == "finetune"
    assert _front(card)["library_name"] == "transformers"
    assert "zero-experts" in _front(card)["tags"]
    assert card.split("---\n", 2)[2].strip().startswith("# Qwen3-30B-A3B: dynamic mixture of experts")
    table = _table(card)
    assert table["base model"] == "Qwen/Qwen3-30B-A3B"
    assert (table["real experts N per layer"], table["zero experts N_Z per layer"]) == ("128", "64")
    assert (table["experts per token K"], table["skip rate"]) == ("8", "51.2 %")
    assert table["weight w of the zero group in training"] == "2"
    assert table["dial `zeda_zero_logit_bias`"] == "-0.5"
    assert table["weights"] == "61,000,000,000 bytes"
    assert table["tensors beside the model (not trained)"] == "3"
    assert table["GSM8K"] == "0.951"
    assert "`scores.json`" in card.replace("\\", "")


def test_nothing_is_made_up() -> None:
    table, card = _table(_card()), _card()
    assert table["base model"] == "not recorded"
    assert table["skip rate"] == "not measured"
    assert table["weight w of the zero group in training"] == "not recorded"
    assert "None were given" in card
    assert "base_model" not in _front(card)
    assert "dial" not in card


@pytest.mark.parametrize(
    ("format", "zero", "has", "lacks"),
    [
        ("zeda", 64, ["trust_remote_code=True"], ["vllm serve"]),
        ("dense-zeros", 64, ["vllm serve FOLDER", "all-zero"], ["trust_remote_code"]),
        ("vllm-mone", 64, ["vLLM 0.33", "vllm serve FOLDER", "zeda_hf_overrides.json"], ["trust_remote_code"]),
        ("zeda", 0, ["vllm serve FOLDER"], ["trust_remote_code", "zero expert", "What it saves", "skip rate"]),
    ],
)
def test_how_to_serve_it(format: str, zero: int, has: list[str], lacks: list[str]) -> None:
    card = _card(format, zero)
    assert all(text in card for text in has)
    assert not [text for text in lacks if text in card]


def test_text_from_outside_cannot_break_the_card() -> None:
    evil = 'a|b\n---\n# x <script> "q": y'
    card = _card(metrics=CardMetrics(base_model=evil, scores={evil: 1.0}, source=evil))
    assert "base_model" not in _front(card)  # not a hub id
    assert card.count("\n---\n") == 1
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert all(line.replace("\\|", "").count("|") in (0, 3) for line in card.splitlines())


def test_metrics_of_one_s_own(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps({"base_model": "a/b", "weight": 2, "skip_rate": 0.5, "scores": {"x": 1}}))
    assert read_card_metrics(path) == CardMetrics("a/b", 2.0, 0.5, {"x": 1.0}, {}, "card.json")


def test_metrics_of_a_report(tmp_path: Path) -> None:
    def evaluation(skip: float | None, accuracy: float) -> dict[str, Any]:
        tasks = {"add": {"accuracy": accuracy, "interval": [0, 1], "count": 9}}
        return {"skip_rate": skip, "accuracy": accuracy, "accuracy_by_task": tasks, "versions": {}}

    report = build_report({"teacher": evaluation(None, 0.9), "student": evaluation(0.48, 0.8)})
    (tmp_path / "report.json").write_text(json.dumps(report))
    metrics = read_card_metrics(tmp_path / "report.json")
    assert metrics.skip_rate == 0.48
    assert metrics.scores == {"accuracy": 0.8, "accuracy, add": 0.8}
    assert metrics.base_scores == {"accuracy": 0.9, "accuracy, add": 0.9}
    assert "| accuracy | 0.8 | 0.9 |" in _card(metrics=metrics)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"skip_rate": 1.5}, "skip_rate"),
        ({"skip_rate": "half"}, "skip_rate"),
        ({"skip_rate": True}, "skip_rate"),
        ({"weight": -1}, "weight"),
        ({"scores": {"x": "good"}}, "scores.x"),
        ({"scores": {"x": float("nan")}}, "scores.x"),
        ({"scores": [1]}, "scores"),
        ({"base_model": 3}, "base_model"),
        ({"skip": 0.5}, "skip"),
        ({}, "no metrics"),
        ({"student": 3}, "student"),
        ({"student": {"accuracy_by_task": {"x": 3}}}, "accuracy_by_task"),
        ({"student": {"accuracy_by_task": [3]}}, "accuracy_by_task"),
        ({"student": {"skip_rate": 7}}, "student.skip_rate"),
    ],
)
def test_wrong_metrics(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=key) as caught:
        read_card_metrics(path)
    assert str(path) in str(caught.value)


def test_metrics_that_are_no_file_or_no_json(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    for name in ("nowhere.json", "bad.json"):
        with pytest.raises(InputError, match=name):
            read_card_metrics(tmp_path / name)


def test_an_export_knows_its_base_model_and_weight(tmp_path: Path) -> None:
    """Through injection, import and training: the manifest passes the name on, the run's settings say w."""
    static = make_hf(tmp_path / "models--Qwen--Tiny" / "snapshots" / ("a" * 40))
    inject_zero_experts(static, tmp_path / "dynamic")
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "megatron")
    (tmp_path / "megatron/release/config.yaml").write_text("zero_experts:\n  weight: 1.5\n")
    (tmp_path / "m.json").write_text('{"skip_rate": 0.25}')
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out", card_metrics=tmp_path / "m.json")
    card = (tmp_path / "out/README.md").read_text()
    assert _front(card)["base_model"] == "Qwen/Tiny"
    assert _table(card)["weight w of the zero group in training"] == "1.5"
    assert _table(card)["skip rate"] == "25.0 %"
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert 0 < size - int(_table(card)["weights"].split()[0].replace(",", "")) < 20_000  # the header
    megatron_to_hf(tmp_path / "megatron", tmp_path / "named", base_model="me/mine")
    assert _front((tmp_path / "named/README.md").read_text())["base_model"] == "me/mine"


@pytest.mark.parametrize("text", ["zero_experts: 3", "[", "a: b", "zero_experts: {weight: much}"])
def test_settings_that_do_not_say_w(tmp_path: Path, dynamic: Path, text: str) -> None:
    hf_to_megatron(dynamic, tmp_path / "megatron")
    (tmp_path / "megatron/release/config.yaml").write_text(text)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "out")
    assert _table((tmp_path / "out/README.md").read_text())["weight w of the zero group in training"] == "not recorded"


@pytest.mark.parametrize(
    ("keys", "zero", "words"),
    [
        ({"zce_nums": [64], "zce_types": ["zero"], "zeda_renormalize": True}, 64, "A control (AdaMoE)"),
        ({"zce_nums": [64], "zce_types": ["copy"], "zeda_expert_type": "copy"}, 64, "identity experts"),
        ({"zeda_teacher_num_experts_per_tok": 16}, 0, "| experts per token of the base model | 16 |"),
        ({"zeda_dynamic_skipping_beta": 0.25}, 0, "Without them transformers runs the base"),
    ],
)
def test_a_control_says_which(keys: dict[str, Any], zero: int, words: str) -> None:
    card = _card(zero=zero, config=keys)
    assert words in card and "A control (" in card
    assert ("trust_remote_code=True" in card) == ("zeda_teacher_num_experts_per_tok" not in keys)
