"""NET, AdaMoE, identity experts and Dynamic Skipping: against their equations in float64, and against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config, load_hf_model, load_megatron, make_hf, megatron_logits, megatron_model
from layers import E, H, K, Z, dynamic_layer, layer_config, rows_into_experts, tokens
from method_equations import BETA, METHODS, PAIRS, SCORES, build, equation

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
from megatron_zeda.conversion.megatron_io import latest_checkpoint_dir
from megatron_zeda.errors import InputError
from megatron_zeda.evaluation.flops import ModelShape
from megatron_zeda.models import load_hf_config, method_of, with_method
from megatron_zeda.zero_experts import (
    INITS,
    WeightRatios,
    ZeroExpertTransformerConfig,
    controlled_weight,
    draw_zero_entries,
    draw_zero_rows,
    masked_zero_experts,
    router_statistics,
    set_zero_expert_weight,
    unsupported_settings,
)
from megatron_zeda.zero_experts.router import renormalized

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize(("method", "scores"), PAIRS)
def test_a_layer_is_its_equation_and_so_are_its_gradients(method: str, scores: str, dispatcher: str) -> None:
    layer = build(method, moe_token_dispatcher_type=dispatcher, **SCORES[scores])
    hidden = tokens()
    ours, _ = layer(hidden)
    x_TH = hidden.detach().reshape(-1, H).double().requires_grad_()
    gate_GH = layer.router.weight.detach().double().requires_grad_()
    expected = equation(method, layer, x_TH, gate_GH)
    torch.testing.assert_close(ours.reshape(-1, H).double(), expected, atol=2e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weight).sum().backward()
    (expected * weight.reshape(-1, H).double()).sum().backward()
    assert hidden.grad is not None and x_TH.grad is not None and gate_GH.grad is not None
    torch.testing.assert_close(hidden.grad.reshape(-1, H).double(), x_TH.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(layer.router.weight.grad.double(), gate_GH.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_law_1_of_every_method(method: str) -> None:
    """Masked, the layer is the teacher's: K experts, the teacher's weights; afterwards it is its own again."""
    layer = build(method).eval()
    teacher = dynamic_layer(layer_config(num_zero_experts=0)).eval()
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            own = dict(layer.named_parameters())[name]
            parameter.copy_(own[:E] if name == "router.weight" else own)
    hidden = tokens(requires_grad=False)
    with torch.no_grad():
        expected, before = teacher(hidden)[0], layer(hidden)[0]
        with masked_zero_experts(layer):
            masked = layer(hidden)[0]
        after = layer(hidden)[0]
    torch.testing.assert_close(masked, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(before, after) and (before - expected).abs().max() > 0.1


def test_what_is_dropped_is_not_computed_and_is_counted() -> None:
    """Law 10 and law 6 of Dynamic Skipping; beta 0 drops nothing."""
    layer = build("dynamic_skipping")
    rows, hidden = rows_into_experts(layer), tokens()
    layer(hidden)
    probs_TK = (hidden.detach().reshape(-1, H) @ layer.router.weight.detach().T).softmax(-1).topk(K).values
    kept = int((probs_TK >= BETA * probs_TK[:, :1]).sum())
    assert rows == [kept] and 0 < kept < probs_TK.numel()
    assert router_statistics(layer).skip_rate == pytest.approx(1 - kept / probs_TK.numel())
    layer.router.beta = 0.0
    layer(hidden)
    assert rows[1] == probs_TK.numel()


def test_tokens_of_zero_experts_only_get_weights_of_0() -> None:
    """Whatever the sum of a row is: a scaling factor of 8 made the quotient infinite once."""
    probs_TG = torch.tensor([[0.0, 3.0, 5.0], [2.0, 0.0, 6.0], [1e-40, 0.0, 8.0]], requires_grad=True)
    kept_TG = torch.tensor([[True, False, False]]).expand(3, -1)
    weights_TG = renormalized(probs_TG, kept_TG)
    assert torch.equal(weights_TG[:2], torch.tensor([[0.0, 0.0, 0.0], [8.0, 0.0, 0.0]])) and weights_TG.isfinite().all()
    weights_TG.sum().backward()
    assert probs_TG.grad is not None and probs_TG.grad.isfinite().all()


def test_beta_is_a_quantile_of_the_ratios() -> None:
    ratios_TK = torch.tensor([[1.0, 0.5, 0.25, 0.125], [1.0, 0.9, 0.3, 0.2], [1.0, 0.01, 0.01, 0.01]])
    histogram = WeightRatios(torch.device("cpu"))
    histogram.add(ratios_TK, torch.tensor([True, True, False]))
    for skip_rate, low, high in ((0.25, 0.2, 0.25), (0.5, 0.3, 0.5), (0.0, 0.0, 0.125), (0.99, 0.9, 1.0)):
        assert low < histogram.beta_for(skip_rate) < high, skip_rate


def test_the_controllers_w_is_that_of_the_loss() -> None:
    """A layer whose w was moved has the balancing gradient of one that was built with it."""
    gradients = []
    for built, moved in ((2.0, 2.0), (2.0, 5.0), (5.0, 5.0)):
        torch.manual_seed(0)
        layer = dynamic_layer(layer_config(zero_expert_balance_coeff=0.5, zero_expert_weight=built))
        set_zero_expert_weight([layer], moved)
        (0.0 * layer(tokens(requires_grad=False))[0].sum()).backward()
        gradients.append(layer.router.weight.grad)
    fixed, controlled, wanted = gradients
    assert torch.equal(controlled, wanted) and (fixed - wanted).norm() > 0.1 * wanted.norm()
    with pytest.raises(ValueError, match="positive"):
        set_zero_expert_weight([layer], 0.0)


def test_the_controllers_equation() -> None:
    assert controlled_weight(2.0, initial=2.0, target=0.5, measured=0.5, gain=0.1) == 2.0
    assert controlled_weight(2.0, initial=2.0, target=0.5, measured=0.48, gain=10.0) == pytest.approx(2.4428055)
    assert controlled_weight(2.0, initial=2.0, target=0.5, measured=0.3, gain=4.0) == pytest.approx(2.4428055)  # 0.05
    assert controlled_weight(2.4428055, initial=2.0, target=0.5, measured=0.9, gain=4.0) == pytest.approx(2.0)
    assert controlled_weight(2.0, initial=2.0, target=0.5, measured=float("nan"), gain=1.0) == 2.0
    assert controlled_weight(60.0, initial=2.0, target=0.9, measured=0.0, gain=10.0) == 64.0
    assert controlled_weight(0.07, initial=2.0, target=0.1, measured=1.0, gain=10.0) == 0.0625


def test_the_controller_reaches_a_rate_that_the_formula_misses() -> None:
    """A router that follows w with a delay of 50 steps and settles 6 points low, as our trial did: within 1 point."""
    weight = initial = 2.0
    rate, measured = 0.2, []
    for _ in range(1500):
        settled = 1 / (1 + (1 / weight) * 2.0 * 1.28)  # w Z / (N + w Z) with Z = N / 2, pulled down
        rate += (settled - rate) / 50
        measured.append(rate)
        weight = controlled_weight(weight, initial=initial, target=0.5, measured=rate, gain=0.02)
    assert pytest.approx(0.44, abs=0.005) == 1 / (1 + 1.28)
    assert max(abs(rate - 0.5) for rate in measured[-500:]) < 0.001 and max(measured) < 0.515


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite", "glm4_moe"])
@pytest.mark.parametrize("method", ["adamoe", "copy", "dynamic_skipping"])
def test_law_5_of_every_method(tmp_path: Path, family: str, method: str) -> None:
    """Import, Megatron, export, transformers with the bundled code, cache or none: the same log-probabilities."""
    static = make_hf(tmp_path / "static", family=family)
    source = static
    if method != "dynamic_skipping":
        source = tmp_path / "injected"
        inject_zero_experts(static, source)
    config = with_method(load_hf_config(source), method)  # type: ignore[arg-type]
    if method == "dynamic_skipping":
        config["zeda_dynamic_skipping_beta"] = 0.9
    student = edit_config(source, tmp_path / "student", **config)
    hf_to_megatron(student, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")
    assert method_of(load_hf_config(tmp_path / "export")) == method
    model = megatron_model(load_hf_config(student), perform_initialization=False)
    load_megatron(model, latest_checkpoint_dir(tmp_path / "megatron"))
    ids = torch.arange(3 * 12).reshape(3, 12) * 11 % 64
    expected = megatron_logits(model, ids).log_softmax(-1)
    assert 0.05 < router_statistics([model]).skip_rate < 0.95
    exported, original = (load_hf_model(tmp_path / name) for name in ("export", "static"))
    with torch.no_grad():
        found = exported(ids).logits.float().log_softmax(-1)
        teacher = original(ids).logits.float().log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - teacher).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["adamoe", "copy"])
@pytest.mark.parametrize("form", ["dense-zeros", "vllm-mone"])
def test_forms_that_cannot_express_a_method_refuse(tmp_path: Path, method: Any, form: str) -> None:
    inject_zero_experts(make_hf(tmp_path / "static"), tmp_path / "injected")
    student = edit_config(
        tmp_path / "injected", tmp_path / "student", **with_method(load_hf_config(tmp_path / "injected"), method)
    )
    hf_to_megatron(student, tmp_path / "megatron")
    with pytest.raises(InputError, match=f"{form} cannot express method `{method}`"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_net_keeps_half_of_k_or_what_a_target_says_once() -> None:
    shape = json.loads((Path(__file__).parents[2] / "examples/qwen3_30b_a3b/config.json").read_text())
    for key in [key for key in shape if key.startswith(("zce_", "use_zce", "zeda_"))] + ["auto_map"]:
        shape.pop(key, None)
    shape |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    halved = with_method(shape, "net")
    assert (halved["num_experts_per_tok"], method_of(halved)) == (4, "net")
    assert with_method(halved, "net") == halved
    assert with_method(halved, "net", target_skip_rate=0.25)["num_experts_per_tok"] == 6
    assert ModelShape.from_hf_config(halved).topk == 8  # what its savings are measured against
    for rate in (0.01, 0.99):
        with pytest.raises(InputError, match="NET would keep"):
            with_method(shape, "net", target_skip_rate=rate)
    with pytest.raises(InputError, match="NET would keep 1 expert per token"):
        with_method(shape, "net", target_skip_rate=0.875)
    assert with_method(shape | {"norm_topk_prob": False}, "net", target_skip_rate=0.875)["num_experts_per_tok"] == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"zeda_renormalize": 1}, "`zeda_renormalize` is wrong"),
        ({"zeda_renormalize": True, "norm_topk_prob": False}, "`norm_topk_prob` false"),
        ({"zeda_expert_type": "identity"}, "`zeda_expert_type` is wrong"),
        ({"zeda_expert_type": "copy"}, "`zce_types` is wrong"),
        ({"zeda_expert_type": "copy", "zce_types": ["copy"], "zeda_renormalize": True}, "are both there"),
        ({"zeda_dynamic_skipping_beta": 0.5}, "and zero experts are both there"),
        ({"zeda_teacher_num_experts_per_tok": 4}, "`zeda_teacher_num_experts_per_tok` is wrong"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    from megatron_zeda.models import family_for

    inject_zero_experts(make_hf(tmp_path / "static"), tmp_path / "injected")
    with pytest.raises(InputError, match=text):
        family_for(load_hf_config(edit_config(tmp_path / "injected", tmp_path / "wrong", **changes)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"zero_expert_type": "identity"}, "zero_expert_type"),
        ({"zero_expert_renormalize": True, "num_zero_experts": 0}, "zero_expert_renormalize"),
        ({"zero_expert_renormalize": True, "moe_router_pre_softmax": True}, "zero_expert_renormalize"),
        ({"dynamic_skipping_beta": 0.5}, "dynamic_skipping_beta"),
        ({"dynamic_skipping_beta": 1.5, "num_zero_experts": 0}, "dynamic_skipping_beta"),
        ({"dynamic_skipping_beta": 0.5, "num_zero_experts": 0, "moe_paged_stash": True}, "moe_paged_stash"),
        ({"teacher_router_topk": 8}, "teacher_router_topk"),
    ],
)
def test_configurations_that_no_method_has(changes: dict[str, Any], name: str) -> None:
    valid = layer_config()
    fields = {field: getattr(valid, field) for field in ZeroExpertTransformerConfig.__dataclass_fields__}
    problems = unsupported_settings(type("Draft", (), fields | changes))
    assert [problem.split(":")[0] for problem in problems] == [name]


def test_initialisations() -> None:
    old_EH = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))
    drawn = {init: draw_zero_rows(old_EH, 12, seed=0, name="gate", init=init) for init in INITS}
    assert torch.equal(drawn["zeros"], torch.zeros(12, 5))
    torch.testing.assert_close(drawn["teacher-mean"], old_EH.mean(0).expand(12, 5))
    copies = (drawn["experts"][:, None] == old_EH[None]).all(-1)
    assert (copies.sum(1) == 1).all() and copies.any(0).all() and copies[:8].sum(0).max() == 1
    assert torch.equal(drawn["gaussian"], draw_zero_rows(old_EH, 12, seed=0, name="gate"))
    bias = torch.tensor([1.0, 2.0, 6.0])
    for init in ("zeros", "teacher-mean"):
        assert draw_zero_entries(bias, 2, seed=0, name="bias", init=init).tolist() == [3.0, 3.0]
    assert set(draw_zero_entries(bias, 3, seed=0, name="bias", init="experts").tolist()) == {1.0, 2.0, 6.0}
    with pytest.raises(ValueError, match="init must be one of"):
        draw_zero_rows(old_EH, 1, seed=0, name="gate", init="ones")  # type: ignore[arg-type]


def test_an_injection_records_how_its_rows_came_about(tmp_path: Path) -> None:
    manifest = inject_zero_experts(make_hf(tmp_path / "static"), tmp_path / "out", init="experts", num_zero_experts=Z)
    assert (manifest["injection_init"], manifest["num_zero_experts"]) == ("experts", Z)
    with pytest.raises(InputError, match="unknown initialisation"):
        inject_zero_experts(tmp_path / "static", tmp_path / "other", init="ones")
