"""The modelling files that travel with exports, on stock transformers.

The oracle is the stock model of the family whose extra experts are all-zero matrices.
"""

from __future__ import annotations

import ast
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    TOPK,
    VOCAB,
    assert_same_bits,
    edit_config,
    load_hf_model,
    make_dense_zeros,
    make_hf,
    read_tensors,
)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import megatron_zeda.serving
from megatron_zeda.conversion import inject_zero_experts
from megatron_zeda.models import FAMILIES, family_for, load_hf_config

BY_NAME = {family.name: family for family in FAMILIES}
DRAFTING = [name for name in BY_NAME if name != "qwen3_moe"]
IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]
IDS = torch.arange(4 * 16).reshape(4, 16) * 11 % VOCAB
ZERO = 2


@pytest.fixture(scope="module", params=list(BY_NAME))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A static folder and the same with zero experts, of every family."""
    folder = tmp_path_factory.mktemp(request.param)
    static = make_hf(folder / "static", family=request.param)
    inject_zero_experts(static, folder / "dynamic", num_zero_experts=ZERO)
    return SimpleNamespace(family=BY_NAME[request.param], static=static, dynamic=folder / "dynamic")


def _expert_layers(model: Any) -> list[Any]:
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "gate")]


def _record_gates(model: Any) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What every router returns, in the way that the evaluation reads it."""
    outputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for layer in _expert_layers(model):
        layer.mlp.gate.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", list(BY_NAME))
@pytest.mark.parametrize("num_zero", [1, 3])
def test_logits_are_those_of_dense_zero_experts(
    tmp_path: Path, implementation: str, family: str, num_zero: int
) -> None:
    make_hf(tmp_path / "hf", family=family, seed=num_zero)
    inject_zero_experts(tmp_path / "hf", tmp_path / "dynamic", num_zero_experts=num_zero)
    oracle = load_hf_model(make_dense_zeros(tmp_path / "dynamic", tmp_path / "dense"))(IDS).logits
    model = load_hf_model(tmp_path / "dynamic", experts_implementation=implementation)
    torch.testing.assert_close(model(IDS).logits, oracle, atol=1e-5, rtol=0)


def test_logits_without_normalised_weights(tmp_path: Path, dynamic: Path) -> None:
    changed = edit_config(dynamic, tmp_path / "dynamic", norm_topk_prob=False)
    oracle = load_hf_model(make_dense_zeros(changed, tmp_path / "dense"))(IDS).logits
    torch.testing.assert_close(load_hf_model(changed)(IDS).logits, oracle, atol=1e-5, rtol=0)
    assert not load_hf_model(dynamic)(IDS).logits.allclose(oracle, atol=1e-3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_law_1_masked_zero_experts_give_the_teacher(case: SimpleNamespace, implementation: str) -> None:
    teacher = load_hf_model(case.static, experts_implementation=implementation)(IDS).logits
    student = load_hf_model(case.dynamic, zeda_zero_logit_bias=float("-inf"), experts_implementation=implementation)
    gates = _record_gates(student)
    torch.testing.assert_close(student(IDS).logits, teacher, atol=1e-5, rtol=0)
    assert all((scores > 0).all() for _, scores, _ in gates)


def _defined(case: SimpleNamespace, gate: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K of N + Z by the definition in float64: ``chosen [T, K]`` and ``weights [T, K]``, normalised over all K."""
    if case.family.name == "qwen3_moe":
        top, chosen = logits.double().softmax(-1).topk(TOPK)
        return chosen, top / top.sum(-1, keepdim=True)
    scores = logits.double().sigmoid()
    chosen = (scores + gate.e_score_correction_bias.double()).topk(TOPK).indices
    top = scores.gather(-1, chosen)
    return chosen, top / top.sum(-1, keepdim=True) * gate.routed_scaling_factor


def test_what_a_router_returns(case: SimpleNamespace) -> None:
    model = load_hf_model(case.dynamic)
    gates = _record_gates(model)
    model(IDS)
    layers = _expert_layers(model)
    assert len(gates) == len(layers) > 0
    for layer, (logits, scores, ids) in zip(layers, gates, strict=True):
        assert logits.shape == (IDS.numel(), EXPERTS + ZERO)
        assert scores.shape == ids.shape == (IDS.numel(), TOPK)
        assert ((ids >= 0) & (ids < EXPERTS)).all()
        assert (ids.sort(dim=-1).values.diff(dim=-1) > 0).all()  # distinct within a token
        chosen, weights = _defined(case, layer.mlp.gate, logits)
        expected = torch.zeros(len(ids), EXPERTS + ZERO, dtype=torch.double).scatter(-1, chosen, weights)
        got = torch.zeros(len(ids), EXPERTS, dtype=torch.double).scatter(-1, ids, scores.double())
        torch.testing.assert_close(got, expected[:, :EXPERTS], atol=1e-6, rtol=0)
        skipped = (scores == 0).float().mean()
        assert skipped == (chosen >= EXPERTS).float().mean()
        assert 0.05 < skipped < 0.95


@pytest.mark.parametrize("family", list(BY_NAME))
def test_a_real_expert_of_no_weight_is_not_counted_as_skipped(tmp_path: Path, family: str) -> None:
    """A score may round to 0 in the model's dtype: the slot is the real expert's all the same."""
    inject_zero_experts(make_hf(tmp_path / "hf", family=family), tmp_path / "dynamic", num_zero_experts=ZERO)
    model = load_hf_model(tmp_path / "dynamic", zeda_zero_logit_bias=float("-inf"), dtype=torch.float16)
    gate = _expert_layers(model)[0].mlp.gate
    with torch.no_grad():
        gate.weight.zero_()
        gate.weight[1, 0] = -20.0 if family == "qwen3_moe" else -1e4
        gate.weight[2:, 0] = -3e4
    _, scores, _ = gate(torch.ones(1, 3, gate.weight.shape[-1], dtype=torch.float16))
    assert (scores > 0).all()
    assert (scores.min(dim=-1).values == torch.finfo(scores.dtype).tiny).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_skipped_slots_never_enter_an_expert(case: SimpleNamespace, implementation: str) -> None:
    model = load_hf_model(case.dynamic, experts_implementation=implementation)
    layers = _expert_layers(model)
    gates, rows = _record_gates(model), [0] * len(layers)
    for number, layer in enumerate(layers):

        def count(module: Any, args: Any, output: torch.Tensor, number: int = number) -> None:
            rows[number] += output.numel() // output.shape[-1]

        layer.mlp.experts.act_fn.register_forward_hook(count)
    model(IDS)
    for (_, scores, _), entered in zip(gates, rows, strict=True):
        assert entered == int((scores > 0).sum())
        assert entered < scores.numel()


class Written(TorchDispatchMode):
    """Counts the bytes of everything that operations write: what copies and products cost, on any machine."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [tensor for tensor in tree_leaves(outputs) if isinstance(tensor, torch.Tensor)]
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return outputs


def _bytes_written(experts: Any, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), Written() as written:
        experts(*inputs)
    return written.num_bytes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_experts_never_do_more_than_the_static_ones(case: SimpleNamespace, implementation: str) -> None:
    """Nothing skipped: no more bytes than the stock code writes, routing aside. Half skipped: clearly fewer."""
    stock, ours = (
        _expert_layers(load_hf_model(folder, experts_implementation=implementation))[0].mlp.experts
        for folder in (case.static, case.dynamic)
    )
    tokens, width = 256, stock.gate_up_proj.shape[-1]
    hidden = torch.randn(tokens, width)
    ids = torch.rand(tokens, EXPERTS).topk(TOPK).indices
    weights = torch.full((tokens, TOPK), 0.5)
    most = _bytes_written(stock, hidden, ids, weights)
    routing = 24 * ids.numel() * ids.element_size()  # ids, positions and offsets, which are as wide as a token here
    assert _bytes_written(ours, hidden, ids, weights) <= most + routing
    weights[torch.arange(tokens) % 2 == 0] = 0.0
    torch.testing.assert_close(ours(hidden, ids, weights), stock(hidden, ids, weights), atol=1e-5, rtol=1e-4)
    assert _bytes_written(ours, hidden, ids, weights) < 0.75 * most + routing


def test_without_the_grouped_product_the_stock_code_does_it(
    case: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of transformers' releases some have it in another form."""
    model = load_hf_model(case.dynamic, experts_implementation="grouped_mm")
    expected = model(IDS).logits
    experts = _expert_layers(model)[0].mlp.experts
    shared = sys.modules[next(cls for cls in type(experts).__mro__ if cls.__name__ == "SkippingExperts").__module__]
    assert shared.GROUPED_MM is not None
    monkeypatch.setattr(shared, "GROUPED_MM", None)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=0)


def test_the_dial_moves_the_skip_rate_monotonically(case: SimpleNamespace) -> None:
    model = load_hf_model(case.dynamic)
    gates, rates = _record_gates(model), []
    for bias in (-100.0, -0.2, 0.0, 0.2, 100.0):
        for layer in _expert_layers(model):
            layer.mlp.gate.zero_logit_bias = bias
        gates.clear()
        model(IDS)
        rates.append(sum(float((scores == 0).float().mean()) for _, scores, _ in gates) / len(gates))
    assert rates[0] == 0.0
    assert rates[-1] == 1.0  # Z = K: every slot can be a zero expert
    assert all(a < b for a, b in itertools.pairwise(rates))


@pytest.mark.parametrize("family", DRAFTING)
def test_the_dial_is_part_of_the_selection_bias(tmp_path: Path, family: str) -> None:
    """Adding it to the tensor instead gives every engine the same model."""
    inject_zero_experts(make_hf(tmp_path / "hf", family=family), tmp_path / "dynamic", num_zero_experts=ZERO)
    turned = load_hf_model(edit_config(tmp_path / "dynamic", tmp_path / "turned", zeda_zero_logit_bias=0.3))
    tensors = read_tensors(tmp_path / "dynamic")
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor[EXPERTS:] += 0.3
    save_file(tensors, tmp_path / "dynamic/model.safetensors", metadata={"format": "pt"})
    assert turned(IDS).logits.equal(load_hf_model(tmp_path / "dynamic")(IDS).logits)


def test_gradients_are_those_of_dense_zero_experts(tmp_path: Path, case: SimpleNamespace) -> None:
    models = [load_hf_model(case.dynamic), load_hf_model(make_dense_zeros(case.dynamic, tmp_path / "dense"))]
    for model in models:
        model(IDS, labels=IDS).loss.backward()
    sparse, dense = (dict(model.named_parameters()) for model in models)
    for name, parameter in sparse.items():
        expected = dense[name].grad
        if ".experts." in name:
            expected = expected[:EXPERTS]
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4, msg=name)


def test_torch_compile_gives_the_same_logits(case: SimpleNamespace) -> None:
    model = load_hf_model(case.dynamic)
    expected = model(IDS).logits
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(IDS).logits, expected, atol=1e-5, rtol=0)


def test_generate_with_and_without_cache(case: SimpleNamespace) -> None:
    model = load_hf_model(case.dynamic)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(IDS[:2, :5], **options)
    assert cached.shape == (2, 13)
    assert cached.equal(model.generate(IDS[:2, :5], use_cache=False, **options))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", list(BY_NAME))
def test_save_pretrained_round_trip(tmp_path: Path, family: str, tied: bool) -> None:
    static = make_hf(tmp_path / "hf", family=family, tie_word_embeddings=tied)
    inject_zero_experts(static, tmp_path / "dynamic")
    model = load_hf_model(tmp_path / "dynamic")
    model.save_pretrained(tmp_path / "saved")
    for name in BY_NAME[family].modeling_files:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "dynamic" / name).read_bytes()
    auto_map = [json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("dynamic", "saved")]
    assert auto_map[0] == auto_map[1]
    assert_same_bits(read_tensors(tmp_path / "dynamic"), read_tensors(tmp_path / "saved"))
    assert load_hf_model(tmp_path / "saved")(IDS).logits.equal(model(IDS).logits)
    # What transformers has saved is a checkpoint to the conversion tools.
    assert family_for(load_hf_config(tmp_path / "saved")).name == family


def test_auto_model_gives_the_headless_one(case: SimpleNamespace) -> None:
    from transformers import AutoModel

    base = AutoModel.from_pretrained(case.dynamic, trust_remote_code=True).eval()
    assert type(base).__name__ == case.family.auto_map["AutoModel"].split(".")[1]
    assert base(IDS).last_hidden_state.equal(load_hf_model(case.dynamic).model(IDS).last_hidden_state)


def test_router_logits_can_be_asked_for_without_a_balancing_loss(case: SimpleNamespace) -> None:
    model = load_hf_model(case.dynamic)
    plain, asked = model(IDS, labels=IDS), model(IDS, labels=IDS, output_router_logits=True)
    shapes = [tuple(logits.shape) for logits in asked.router_logits]
    assert shapes == [(IDS.numel(), EXPERTS + ZERO)] * len(_expert_layers(model))
    assert asked.loss.equal(plain.loss)


@pytest.mark.parametrize("family", DRAFTING)
@pytest.mark.parametrize("auto_class", ["AutoModel", "AutoModelForCausalLM"])
def test_drafting_layers_and_constants_of_vllm_are_ignored(tmp_path: Path, family: str, auto_class: str) -> None:
    import transformers

    static = make_hf(tmp_path / "hf", family=family, mtp=True)
    inject_zero_experts(static, tmp_path / "dynamic", num_zero_experts=ZERO)
    tensors = load_file(tmp_path / "dynamic/model.safetensors")
    assert any(name.endswith("eh_proj.weight") for name in tensors)
    tensors[f"model.layers.1.mlp.experts.{EXPERTS}.approx_value"] = torch.zeros(8)
    save_file(tensors, tmp_path / "dynamic/model.safetensors", metadata={"format": "pt"})
    _, report = getattr(transformers, auto_class).from_pretrained(
        tmp_path / "dynamic", trust_remote_code=True, output_loading_info=True
    )
    head = {"lm_head.weight"} if auto_class == "AutoModel" else set()
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert set(report["unexpected_keys"]) == head


@pytest.mark.parametrize("family", DRAFTING)
def test_the_selection_bias_stays_in_float32(tmp_path: Path, family: str) -> None:
    inject_zero_experts(make_hf(tmp_path / "hf", family=family, dtype=torch.bfloat16), tmp_path / "dynamic")
    model = load_hf_model(tmp_path / "dynamic", dtype=torch.bfloat16)
    gate = _expert_layers(model)[0].mlp.gate
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert model(IDS).logits.dtype == torch.bfloat16


def test_epsilon_of_the_latent_norms(tmp_path: Path) -> None:
    static = make_hf(tmp_path / "hf", family="glm4_moe_lite")
    inject_zero_experts(static, tmp_path / "dynamic")
    oracle = load_hf_model(make_dense_zeros(tmp_path / "dynamic", tmp_path / "dense"))
    missing = load_hf_model(edit_config(tmp_path / "dynamic", tmp_path / "missing", zeda_latent_norm_eps=...))
    torch.testing.assert_close(missing(IDS).logits, oracle(IDS).logits, atol=1e-5, rtol=0)
    changed = load_hf_model(edit_config(tmp_path / "dynamic", tmp_path / "changed", zeda_latent_norm_eps=0.25))
    before = oracle(IDS).logits
    for layer in oracle.model.layers:
        layer.self_attn.q_a_layernorm.variance_epsilon = layer.self_attn.kv_a_layernorm.variance_epsilon = 0.25
    assert not before.allclose(oracle(IDS).logits, atol=1e-2)
    torch.testing.assert_close(changed(IDS).logits, oracle(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"zce_nums": ...}, "zce_nums"),
        ({"zce_types": ...}, "zce_types"),
        ({"use_zce_mask": ...}, "use_zce_mask"),
        ({"zce_types": ["copy"]}, "zce_types"),
        ({"zce_types": "zero"}, "zce_types"),
        ({"use_zce_mask": True}, "use_zce_mask"),
        ({"zce_nums": [0]}, "zce_nums"),
        ({"zce_nums": 2}, "zce_nums"),
        ({"zeda_zero_logit_bias": "high"}, "zeda_zero_logit_bias"),
        ({"zeda_zero_logit_bias": float("inf")}, "zeda_zero_logit_bias"),
        ({"num_experts_per_tok": EXPERTS + 1}, "num_experts_per_tok"),
    ],
)
def test_wrong_keys_are_refused(tmp_path: Path, case: SimpleNamespace, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        load_hf_model(edit_config(case.dynamic, tmp_path / "bad", **changes))


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        *((family, {"n_group": 2, "topk_group": 1}, "n_group") for family in DRAFTING),
        ("glm4_moe_lite", {"zeda_latent_norm_eps": "1e-6"}, "zeda_latent_norm_eps"),
        ("glm4_moe_lite", {"zeda_latent_norm_eps": 0.0}, "zeda_latent_norm_eps"),
    ],
)
def test_wrong_keys_of_a_family_are_refused(tmp_path: Path, family: str, changes: dict[str, Any], match: str) -> None:
    inject_zero_experts(make_hf(tmp_path / "hf", family=family), tmp_path / "dynamic")
    with pytest.raises(ValueError, match=match):
        load_hf_model(edit_config(tmp_path / "dynamic", tmp_path / "bad", **changes))


def test_without_remote_code_it_fails_loudly(case: SimpleNamespace) -> None:
    import transformers

    with pytest.raises(RuntimeError, match="mismatch"):
        getattr(transformers, case.family.static_architecture).from_pretrained(case.dynamic)


def test_the_files_stand_alone(case: SimpleNamespace) -> None:
    """They are the files in the package, byte for byte, and import nothing of this project but one another."""
    folder = Path(megatron_zeda.serving.__file__).parent
    for name in case.family.modeling_files:
        assert (case.dynamic / name).read_bytes() == (folder / name).read_bytes()
        for node in ast.walk(ast.parse((folder / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1
                assert f"{node.module}.py" in case.family.modeling_files
            elif isinstance(node, ast.Import | ast.ImportFrom):
                imported = getattr(node, "module", None) or node.names[0].name
                assert imported.split(".")[0] in {"inspect", "typing", "torch", "transformers"}
    assert json.loads((case.dynamic / "config.json").read_text())["zeda_zero_logit_bias"] == 0.0
