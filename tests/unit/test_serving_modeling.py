"""The modelling file that travels with exports, on stock transformers."""

from __future__ import annotations

import ast
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    LAYERS,
    TOPK,
    VOCAB,
    assert_same_bits,
    edit_config,
    load_hf_model,
    make_dense_zeros,
    make_hf,
    read_tensors,
)

import megatron_zeda.serving
from megatron_zeda.conversion import inject_zero_experts

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
IDS = torch.arange(4 * 16).reshape(4, 16) * 11 % VOCAB


def _record_gates(model: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What every router returns, in the way that the evaluation reads it."""
    outputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalised", [True, False])
def test_logits_are_those_of_dense_zero_experts(tmp_path: Path, implementation: str, normalised: bool) -> None:
    make_hf(tmp_path / "hf", norm_topk_prob=normalised)
    inject_zero_experts(tmp_path / "hf", tmp_path / "dynamic", num_zero_experts=3)
    oracle = load_hf_model(make_dense_zeros(tmp_path / "dynamic", tmp_path / "dense"))(IDS).logits
    model = load_hf_model(tmp_path / "dynamic", experts_implementation=implementation)
    torch.testing.assert_close(model(IDS).logits, oracle, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_law_1_masked_zero_experts_give_the_teacher(static: Path, dynamic: Path, implementation: str) -> None:
    teacher = load_hf_model(static, experts_implementation=implementation)(IDS).logits
    student = load_hf_model(dynamic, zeda_zero_logit_bias=float("-inf"), experts_implementation=implementation)
    gates = _record_gates(student)
    torch.testing.assert_close(student(IDS).logits, teacher, atol=1e-5, rtol=0)
    assert all((scores > 0).all() for _, scores, _ in gates)


def test_what_a_router_returns(dynamic: Path) -> None:
    model = load_hf_model(dynamic)
    gates = _record_gates(model)
    model(IDS)
    assert len(gates) == LAYERS
    for logits, scores, ids in gates:
        assert logits.shape == (IDS.numel(), EXPERTS + 2)
        assert scores.shape == ids.shape == (IDS.numel(), TOPK)
        assert ((ids >= 0) & (ids < EXPERTS)).all()
        assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()  # distinct within a token
        # The definition, in float64: K of N + Z, weights normalised over all K, zero experts dropped.
        top, chosen = logits.double().softmax(-1).topk(TOPK)
        weights = top / top.sum(-1, keepdim=True)
        expected = torch.zeros(len(ids), EXPERTS + 2, dtype=torch.double).scatter(-1, chosen, weights)[:, :EXPERTS]
        got = torch.zeros(len(ids), EXPERTS, dtype=torch.double).scatter(-1, ids, scores.double())
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        skipped = (scores == 0).float().mean()
        assert skipped == (chosen >= EXPERTS).float().mean()
        assert 0.05 < skipped < 0.95


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_skipped_slots_never_enter_an_expert(dynamic: Path, implementation: str) -> None:
    model = load_hf_model(dynamic, experts_implementation=implementation)
    gates, rows = _record_gates(model), [0] * LAYERS
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: torch.Tensor, number: int = number) -> None:
            rows[number] += output.numel() // output.shape[-1]

        layer.mlp.experts.act_fn.register_forward_hook(count)
    model(IDS)
    for (_, scores, _), entered in zip(gates, rows, strict=True):
        assert entered == int((scores > 0).sum())
        assert entered < scores.numel()


def test_the_dial_moves_the_skip_rate_monotonically(dynamic: Path) -> None:
    model = load_hf_model(dynamic)
    gates, rates = _record_gates(model), []
    for bias in (-100.0, -1.0, 0.0, 1.0, 100.0):
        for layer in model.model.layers:
            layer.mlp.gate.zero_logit_bias = bias
        gates.clear()
        model(IDS)
        rates.append(sum(float((scores == 0).float().mean()) for _, scores, _ in gates) / LAYERS)
    assert rates[0] == 0.0
    assert rates[-1] == 1.0  # Z = K: every slot can be a zero expert
    assert all(a < b for a, b in itertools.pairwise(rates))


def test_gradients_are_those_of_dense_zero_experts(tmp_path: Path, dynamic: Path) -> None:
    models = [load_hf_model(dynamic), load_hf_model(make_dense_zeros(dynamic, tmp_path / "dense"))]
    for model in models:
        model(IDS, labels=IDS).loss.backward()
    sparse, dense = (dict(model.named_parameters()) for model in models)
    for name, parameter in sparse.items():
        expected = dense[name].grad
        if "experts" in name:
            expected = expected[:EXPERTS]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_torch_compile_gives_the_same_logits(dynamic: Path) -> None:
    model = load_hf_model(dynamic)
    expected = model(IDS).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, expected, atol=1e-5, rtol=0)


def test_generate_with_and_without_cache(dynamic: Path) -> None:
    model = load_hf_model(dynamic)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(IDS[:2, :5], **options)
    assert cached.shape == (2, 13)
    assert cached.equal(model.generate(IDS[:2, :5], use_cache=False, **options))


@pytest.mark.parametrize("tied", [False, True])
def test_save_pretrained_round_trip(tmp_path: Path, tied: bool) -> None:
    inject_zero_experts(make_hf(tmp_path / "hf", tie_word_embeddings=tied), tmp_path / "dynamic")
    model = load_hf_model(tmp_path / "dynamic")
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved/modeling_zeda_qwen3_moe.py").exists()
    auto_map = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("dynamic", "saved")]
    assert auto_map[0] == auto_map[1]
    assert_same_bits(read_tensors(tmp_path / "dynamic"), read_tensors(tmp_path / "saved"))
    assert load_hf_model(tmp_path / "saved")(IDS).logits.equal(model(IDS).logits)


def test_auto_model_gives_the_headless_one(dynamic: Path) -> None:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(dynamic, trust_remote_code=True).eval()
    assert type(base).__name__ == "Qwen3MoePlusPlusModel"
    assert base(IDS).last_hidden_state.equal(load_hf_model(dynamic).model(IDS).last_hidden_state)


def test_router_logits_can_be_asked_for_without_a_balancing_loss(dynamic: Path) -> None:
    model = load_hf_model(dynamic)
    plain, asked = model(IDS, labels=IDS), model(IDS, labels=IDS, output_router_logits=True)
    assert [tuple(logits.shape) for logits in asked.router_logits] == [(IDS.numel(), EXPERTS + 2)] * LAYERS
    assert asked.loss.equal(plain.loss)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"zce_nums": ...}, "zce_nums"),
        ({"zce_types": ...}, "zce_types"),
        ({"use_zce_mask": ...}, "use_zce_mask"),
        ({"zce_types": ["copy"]}, "zce_types"),
        ({"use_zce_mask": True}, "use_zce_mask"),
        ({"zce_nums": [0]}, "zce_nums"),
        ({"zce_nums": 2}, "zce_nums"),
        ({"zeda_zero_logit_bias": "high"}, "zeda_zero_logit_bias"),
    ],
)
def test_wrong_keys_are_refused(tmp_path: Path, dynamic: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_hf_model(edit_config(dynamic, tmp_path / "bad", **changes))


def test_without_remote_code_it_fails_loudly(dynamic: Path) -> None:
    from transformers import Qwen3MoeForCausalLM

    with pytest.raises(RuntimeError, match="mismatch"):
        Qwen3MoeForCausalLM.from_pretrained(dynamic)


def test_the_file_stands_alone(dynamic: Path) -> None:
    """It is the file in the package, byte for byte, and imports nothing of this project."""
    source = Path(megatron_zeda.serving.__file__).parent / "modeling_zeda_qwen3_moe.py"
    assert (dynamic / source.name).read_bytes() == source.read_bytes()
    tree = ast.walk(ast.parse(source.read_text()))
    imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert {name.split(".")[0] for name in names} == {"typing", "torch", "transformers"}
    assert json.loads((dynamic / "config.json").read_text())["zeda_zero_logit_bias"] == 0.0
