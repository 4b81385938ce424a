"""``verify_checkpoint.py --logits``: two checkpoints in any form, on prompts, against stock models."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkpoints import VOCAB, edit_config, load_hf_model, make_hf, read_tensors
from safetensors.torch import save_file

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint
from megatron_zeda.conversion.logits import compare_logits
from megatron_zeda.errors import InputError

FAMILIES = ("qwen3_moe", "glm4_moe_lite", "glm4_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form: static, dynamic, megatron, dense-zeros, vllm-mone."""
    folder = tmp_path_factory.mktemp(request.param)
    make_hf(folder / "static", family=request.param, mtp=request.param != "qwen3_moe")
    inject_zero_experts(folder / "static", folder / "dynamic")
    hf_to_megatron(folder / "dynamic", folder / "megatron")
    hf_to_megatron(folder / "static", folder / "megatron-static")
    megatron_to_hf(folder / "megatron", folder / "dense-zeros", format="dense-zeros", interleave=True)
    megatron_to_hf(folder / "megatron", folder / "vllm-mone", format="vllm-mone")
    return folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three prompts of different lengths."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [[(7 * i + start) % VOCAB for i in range(length)] for start, length in ((1, 5), (2, 17), (3, 11))]
    path.write_text("".join(json.dumps({"prompt_ids": row}) + "\n" for row in rows))
    return path


def _rows(prompts: Path) -> list[list[int]]:
    return [json.loads(line)["prompt_ids"] for line in prompts.read_text().splitlines()]


def _stock(folder: Path, rows: list[list[int]]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Output of every layer and logits of unpadded prompts, in one piece each."""
    model = load_hf_model(folder)
    layers: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, output, index=index: layers[index].append(output[0]))
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0] for row in rows]
    return [torch.cat(parts) for parts in layers], torch.cat(logits)


@pytest.mark.parametrize("other", ["megatron", "dense-zeros", "vllm-mone", "dynamic"])
def test_every_form_computes_the_same(folder: Path, prompts: Path, other: str) -> None:
    found = compare_logits(folder / "dynamic", folder / other, prompts=prompts)
    assert found.num_tokens == 5 + 17 + 11
    assert len(found.layers) == 2
    assert found.logits.largest < 3e-5
    assert found.same_next_token == 1.0
    assert found.mean_kl < 1e-6
    if other == "dynamic":
        assert [layer.largest for layer in found.layers] == [0.0, 0.0]


def test_differences_are_those_of_stock_models(folder: Path, prompts: Path) -> None:
    """Static against dynamic, which differ: the numbers must be right, not only small."""
    found = compare_logits(folder / "static", folder / "dynamic", prompts=prompts)
    (layers_a, a), (layers_b, b) = (_stock(folder / name, _rows(prompts)) for name in ("static", "dynamic"))
    for index, layer in enumerate(found.layers):
        assert layer.name == f"layer {index}"
        assert layer.largest == pytest.approx(float((layers_a[index] - layers_b[index]).abs().max()), rel=1e-4)
        largest = max(float(layers_a[index].abs().max()), float(layers_b[index].abs().max()))
        assert layer.scale == pytest.approx(largest, rel=1e-4)
    assert found.logits.largest == pytest.approx(float((a - b).abs().max()), rel=1e-4)
    assert found.logits.largest > 0.1
    kl = torch.nn.functional.kl_div(b.double().log_softmax(-1), a.double().softmax(-1), reduction="batchmean")
    assert found.mean_kl == pytest.approx(float(kl), rel=1e-3)
    assert found.same_next_token == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))


@pytest.mark.parametrize("other", ["dynamic", "megatron", "megatron-static"])
def test_with_zero_experts_masked_the_student_is_the_teacher(folder: Path, prompts: Path, other: str) -> None:
    found = compare_logits(folder / "static", folder / other, prompts=prompts, mask_zero_experts=True)
    assert found.logits.largest < 3e-5


def test_one_changed_weight_is_seen_in_its_layer(folder: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "dynamic", tmp_path / "changed", ignore=shutil.ignore_patterns("zeda_manifest.json"))
    tensors = read_tensors(tmp_path / "changed")
    tensors["model.layers.1.self_attn.o_proj.weight"][0, 0] += 1.0
    save_file(tensors, tmp_path / "changed/model.safetensors", metadata={"format": "pt"})
    found = compare_logits(tmp_path / "changed", folder / "megatron", prompts=prompts)
    assert found.layers[0].largest < 3e-5
    assert found.layers[1].largest > 1e-3
    assert found.logits.largest > 1e-3


def test_a_megatron_checkpoint_without_our_files(folder: Path, prompts: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "megatron/release", tmp_path / "other/iter_0000003")
    (tmp_path / "other/latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(InputError, match="--hf-config"):
        compare_logits(folder / "dynamic", tmp_path / "other", prompts=prompts)
    found = compare_logits(folder / "dynamic", tmp_path / "other", prompts=prompts, hf_config=folder / "dynamic")
    assert found.logits.largest < 3e-5
    different = verify_checkpoint(folder / "dynamic", tmp_path / "other", hf_config=folder / "dynamic")
    assert all(".layers.2." in line for line in different)  # the drafting layer is not in it


def test_bfloat16_and_tied_embeddings(tmp_path: Path, prompts: Path) -> None:
    make_hf(tmp_path / "static", dtype=torch.bfloat16, tie_word_embeddings=True, fused=True)
    inject_zero_experts(tmp_path / "static", tmp_path / "dynamic")
    hf_to_megatron(tmp_path / "dynamic", tmp_path / "megatron")
    exact = compare_logits(tmp_path / "dynamic", tmp_path / "megatron", prompts=prompts)
    assert exact.logits.largest < 3e-5
    found = compare_logits(tmp_path / "dynamic", tmp_path / "megatron", prompts=prompts, dtype="bfloat16")
    assert exact.logits.largest < found.logits.largest
    assert found.mean_kl < 0.05


def test_the_epsilon_of_latent_norms_is_the_checkpoint_s(tmp_path: Path, prompts: Path) -> None:
    """Stock transformers has 1e-6 there whatever config.json says; a comparison takes what Megatron-Core takes."""
    make_hf(tmp_path / "static", family="glm4_moe_lite")
    for name, epsilon in (("far", 0.1), ("absent", ...)):
        edit_config(tmp_path / "static", tmp_path / name, zeda_latent_norm_eps=epsilon)
        hf_to_megatron(tmp_path / name, tmp_path / f"{name}-megatron")
        found = compare_logits(tmp_path / name, tmp_path / f"{name}-megatron", prompts=prompts)
        assert found.logits.largest < 3e-5, name
    assert compare_logits(tmp_path / "far", tmp_path / "absent", prompts=prompts).logits.largest > 1e-3


def test_prompts(tiny_static: Path, tiny_dynamic: Path, folder: Path, tmp_path: Path) -> None:
    assert compare_logits(folder / "dynamic", folder / "dynamic").prompts.startswith("fixed random")
    assert compare_logits(tiny_static, tiny_dynamic).prompts == "built-in sentences"
    for name, text, tokens in (
        ("a.txt", "abc\n\nab\n", None),
        ("b.jsonl", '{"prompt": "abc"}\n{"prompt_ids": [1, 2, 3]}\n', None),
        ("c.jsonl", '{"prompt_ids": [1, 2, 3, 4, 5, 6, 7, 8]}\n', 3),
    ):
        (tmp_path / name).write_text(text)
        found = compare_logits(tiny_static, tiny_dynamic, prompts=tmp_path / name, max_tokens=3)
        assert found.prompts == str(tmp_path / name)
        assert tokens is None or found.num_tokens == tokens


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n", "no prompts"),
        ("a.jsonl", '{"text": "x"}\n', "no prompt"),
        ("a.jsonl", '{"prompt_ids": [64]}\n', "outside the vocabulary"),
        ("a.jsonl", '{"prompt_ids": []}\n', "no token"),
        ("a.jsonl", '{"prompt": "text"}\n', "tokenizer"),
        ("a.txt", "text\n", "tokenizer"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_unusable_prompts(folder: Path, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        compare_logits(folder / "dynamic", folder / "dynamic", prompts=tmp_path / name)


def test_what_cannot_be_compared(folder: Path, tmp_path: Path) -> None:
    make_hf(tmp_path / "deeper", num_hidden_layers=3)
    make_hf(tmp_path / "qwen")
    make_hf(tmp_path / "glm", family="glm4_moe_lite")
    with pytest.raises(InputError, match="num_hidden_layers"):
        compare_logits(tmp_path / "qwen", tmp_path / "deeper")
    with pytest.raises(InputError, match="two families"):
        compare_logits(tmp_path / "qwen", tmp_path / "glm")
    with pytest.raises(InputError, match="no such folder"):
        compare_logits(folder / "dynamic", tmp_path / "nowhere")
    with pytest.raises(InputError, match="dtype"):
        compare_logits(folder / "dynamic", folder / "dynamic", dtype="float16")


# ---- the tool -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "checkpoint_tools"))
    before = signal.getsignal(signal.SIGTERM)
    yield importlib.import_module("verify_checkpoint")
    signal.signal(signal.SIGTERM, before)


def test_tool(tool: ModuleType, folder: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: Any) -> tuple[int, list[str]]:
        code = tool.main([*map(str, arguments), "--logits", "--prompts", str(prompts)])
        return code, capsys.readouterr().out.splitlines()

    code, lines = run(folder / "dynamic", folder / "megatron")
    assert code == 0
    assert [line.split("  ")[0].strip() for line in lines[:3]] == ["layer 0", "layer 1", "logits"]
    assert "33 tokens" in lines[3]
    assert lines[4] == "equal: no logit differs by more than 0.0001"
    code, lines = run(folder / "static", folder / "dynamic")
    assert (code, lines[-1]) == (1, "different: a logit differs by more than 0.0001")
    assert run(folder / "static", folder / "dynamic", "--mask-zero-experts")[0] == 0
    assert run(folder / "static", folder / "dynamic", "--tolerance", "1000")[0] == 0
    code, lines = run(folder / "static", folder / "dynamic", "--dtype", "bfloat16")
    assert (code, lines[-1]) == (0, "not judged: in bfloat16 give --tolerance")
    code, lines = run(folder / "dynamic", folder / "megatron", "--json")
    result = json.loads("".join(lines))
    assert (code, result["equal"], len(result["layers"])) == (0, True, 2)


def test_options_that_need_logits(tool: ModuleType, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = [str(folder / "dynamic")] * 2
    for option in (["--tolerance", "1"], ["--mask-zero-experts"], ["--prompts", "x"], ["--dtype", "float32"]):
        assert tool.main([*same, *option]) == 2
        assert capsys.readouterr().err.startswith(f"error: {option[0]}: used without --logits")
