"""Law 3 over gloo: every layout gives the loss, gradients and statistics of one process.

tests/layouts.py says what is computed, and what it is compared with. Laws 2 and 10 over expert-parallel ranks are in
test_dispatchers.py.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from layers import E
from layouts import IDLE_EXPERT, SCENARIOS, Layout, Outcome, plain_step, run_layouts
from spawn import run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def _sizes(
    tp: int = 1, pp: int = 1, vpp: int | None = None, cp: int = 1, ep: int = 1, etp: int | None = None
) -> dict[str, int]:
    """Parallel sizes by their usual short names; expert TP is TP unless given, as in Megatron-Core."""
    sizes = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
    }
    if vpp is not None:
        sizes["virtual_pipeline_model_parallel_size"] = vpp
    if etp is not None:
        sizes["expert_tensor_parallel_size"] = etp
    return sizes


def _selective(*modules: str) -> dict[str, Any]:
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
FIRST_LAYER = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1}
ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
DEEPEP = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "bucket_size": 5000}
SEVEN = "glm, 7 layers"

LAYOUTS = {
    "TP2 PP2 EP2": Layout(_sizes(tp=2, pp=2, ep=2)),
    "TP2 PP2 EP2, expert TP 1, distributed optimizer": Layout(_sizes(tp=2, pp=2, ep=2, etp=1), "sigmoid", ddp=SHARDED),
    "EP4, distributed optimizer": Layout(_sizes(ep=4), ddp=SHARDED),
    "TP2 EP4, recompute moe": Layout(_sizes(tp=2, ep=4), config=_selective("moe")),
    "TP2 EP4, expert TP 1, recompute all": Layout(_sizes(tp=2, ep=4, etp=1), "sigmoid", FULL),
    "TP2 EP2, shared expert overlapped": Layout(
        _sizes(tp=2, ep=2), "sigmoid", {"moe_shared_expert_overlap": True}, world_size=4
    ),
    "EP4, expert TP 2": Layout(_sizes(ep=4, etp=2)),
    "TP2 EP2, allgather": Layout(_sizes(tp=2, ep=2), "mean loss", ALLGATHER, world_size=4),
    "PP2 EP2, recompute a layer": Layout(_sizes(pp=2, ep=2), config=FIRST_LAYER, world_size=4),
    "PP2 EP2, virtual stages": Layout(_sizes(pp=2, vpp=2, ep=2), "mean loss", world_size=4),
    "TP2 PP2 EP2, virtual stages, recompute moe, overlap": Layout(
        _sizes(tp=2, pp=2, vpp=2, ep=2), "sigmoid", _selective("moe", "core_attn"), OVERLAPPED
    ),
    "PP2 EP2, DeepEP, recompute moe": Layout(
        _sizes(pp=2, ep=2), config={**DEEPEP, **_selective("moe")}, stand_ins=True, world_size=4
    ),
    "CP2 EP2": Layout(_sizes(cp=2, ep=2), world_size=4),
    "CP2 EP4, distributed optimizer": Layout(_sizes(cp=2, ep=4), "mean loss", ddp=SHARDED),
    "TP2 CP2 PP2": Layout(_sizes(tp=2, cp=2, pp=2), "sigmoid"),
    "CP4 EP2, recompute attention": Layout(_sizes(cp=4, ep=2), config=_selective("core_attn")),
    "EP2, packed": Layout(_sizes(ep=2), packed=True, world_size=4),
    "PP2 EP2, virtual stages, packed": Layout(_sizes(pp=2, vpp=2, ep=2), packed=True, world_size=4),
    "TP2 CP2 EP2, packed, recompute moe": Layout(
        _sizes(tp=2, cp=2, ep=2), config=_selective("moe"), ddp=SHARDED, packed=True
    ),
    "TP2 CP2 PP2 EP2, virtual stages, packed, recompute all, overlap": Layout(
        _sizes(tp=2, cp=2, pp=2, vpp=2, ep=2), config=FULL, ddp=OVERLAPPED, packed=True
    ),
    "GLM, PP4 EP2": Layout(_sizes(pp=4, ep=2), "glm"),
    "GLM, TP2 CP2 PP2 EP2, virtual stages": Layout(_sizes(tp=2, cp=2, pp=2, vpp=2, ep=2), "glm"),
    "GLM, TP2 PP2 EP2, packed, recompute mlp and shared experts": Layout(
        _sizes(tp=2, pp=2, ep=2), "glm", _selective("mlp", "shared_experts"), packed=True
    ),
    "GLM, 7 layers, 3 + 4, CP2 EP2, expert TP 1": Layout(
        _sizes(tp=2, cp=2, pp=2, ep=2, etp=1), SEVEN, {"num_layers_in_first_pipeline_stage": 3}
    ),
    "GLM, 7 layers, 1 + 2 + 2 + 2, recompute all": Layout(
        _sizes(pp=4, ep=2), SEVEN, {**FULL, "account_for_embedding_in_pipeline_split": True}
    ),
    "GLM, 7 layers, 1 + 2 + 2 + 2, packed": Layout(
        _sizes(pp=4, ep=2),
        SEVEN,
        {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2},
        packed=True,
    ),
    "GLM, 7 layers, virtual stages of 2 + 2 + 2 + 1, overlap": Layout(
        _sizes(tp=2, pp=2, vpp=2, ep=2), SEVEN, {"account_for_loss_in_pipeline_split": True}, OVERLAPPED
    ),
    # The loss alone in the last stage.
    "GLM, 7 layers, virtual stages of 1 + 1 + 1 + 1 + 1 + 1 + 1 + 0": Layout(
        _sizes(pp=4, vpp=2, ep=2), SEVEN, {"account_for_loss_in_pipeline_split": True}
    ),
    "GLM, 7 layers, virtual stages of 0 + 4 + 3 + 0, written out": Layout(
        _sizes(pp=2, vpp=2, ep=2), SEVEN, {"pipeline_model_parallel_layout": "E|t*4|t*3|L"}, world_size=4
    ),
    "virtual stages of 2 + 1 + 2 + 1, distributed optimizer": Layout(
        _sizes(pp=2, vpp=2, ep=2), "6 layers", {"num_layers_in_last_pipeline_stage": 2}, SHARDED, world_size=4
    ),
    "edges, EP8, overlap": Layout(_sizes(ep=8), "edges", ddp=OVERLAPPED),
    "edges, EP4, allgather": Layout(_sizes(ep=4), "edges", ALLGATHER, world_size=4),
    "edges, EP4, permute fusion": Layout(
        _sizes(ep=4), "edges", {"moe_permute_fusion": True}, stand_ins=True, world_size=4
    ),
    "edges, TP2 CP2 EP4, recompute moe": Layout(_sizes(tp=2, cp=2, ep=4, etp=1), "edges", _selective("moe")),
    "edges, PP2 EP2, expert TP 2, packed": Layout(_sizes(pp=2, ep=2, etp=2), "edges", packed=True),
    "nothing skips, TP2 EP4": Layout(_sizes(tp=2, ep=4), "nothing skips"),
    "everything skips, TP2 EP4": Layout(_sizes(tp=2, ep=4), "everything skips"),
    "everything skips, EP4, allgather": Layout(_sizes(ep=4), "everything skips", ALLGATHER, world_size=4),
    "everything skips, CP2 PP2 EP2, packed, recompute all, overlap": Layout(
        _sizes(cp=2, pp=2, ep=2), "everything skips", FULL, OVERLAPPED, packed=True
    ),
}


@cache
def _reference(scenario: str) -> Outcome:
    return plain_step(SCENARIOS[scenario])


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> dict[str, list[Outcome]]:
    """Of every layout that is asked for, what each rank found. Those of one size share a launch."""
    tests = [item for item in request.session.items if item.path == request.path]
    wanted = [item.callspec.params["name"] for item in tests if "name" in item.callspec.params]
    launches: dict[tuple[int, bool], dict[str, Layout]] = {}
    for name in wanted:
        layout = LAYOUTS[name]
        launches.setdefault((layout.world_size, layout.stand_ins), {})[name] = layout
    found: dict[str, list[Outcome]] = {}
    for (world_size, _), layouts in launches.items():
        ranks = run_distributed(run_layouts, world_size, layouts)
        found |= {name: [rank[name] for rank in ranks] for name in layouts}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_law_3_layout_equals_one_process(name: str, outcomes: dict[str, list[Outcome]], megatron: None) -> None:
    layout, ranks = LAYOUTS[name], outcomes[name]
    expected = _reference(layout.scenario)
    for outcome in ranks:  # the same everywhere, pipeline stages included
        assert outcome.loss == pytest.approx(expected.loss, rel=1e-6)
        assert outcome.layer_numbers == expected.layer_numbers
        assert outcome.num_zero_selections == expected.num_zero_selections
        assert outcome.num_selections == expected.num_selections
        assert outcome.balance_loss_per_layer == pytest.approx(expected.balance_loss_per_layer, rel=1e-6)
    gradients = ranks[0].gradients
    assert gradients is not None and expected.gradients is not None
    assert gradients.keys() == expected.gradients.keys()
    # Relative to the largest entry of a weight: small ones carry the rounding of the large ones they are made of.
    errors = {
        key: np.abs(gradients[key] - gradient).max() / max(np.abs(gradient).max(), 1e-9)
        for key, gradient in expected.gradients.items()
    }
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < 1e-5, f"{worst} is off by {errors[worst]:.1e} of its largest entry"
    assert ranks[0].replica_gap == 0.0
    skips_all = [outcome.skips_all for outcome in ranks]
    if layout.scenario == "edges":
        assert any(skips_all) and not all(skips_all)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenarios_are_what_they_are_called(scenario: str, megatron: None) -> None:
    """Tolerances mean nothing where gradients are zero, or where the balancing loss or z-loss contributes none."""
    outcome, config = _reference(scenario), SCENARIOS[scenario].config
    without = [plain_step(SCENARIOS[scenario], balance_coeff=0.0).gradients]
    if "moe_z_loss_coeff" in config:
        without.append(plain_step(replace(SCENARIOS[scenario], config=config | {"moe_z_loss_coeff": None})).gradients)
    assert outcome.gradients is not None
    for key, gradient in outcome.gradients.items():
        no_rows = scenario == "everything skips" and ".experts." in key
        assert np.abs(gradient).max() == 0 if no_rows else np.abs(gradient).max() > 1e-4, key
        if "router" in key:
            for gradients in without:
                assert gradients is not None
                share = np.abs(gradient - gradients[key]).max() / np.abs(gradient).max()
                assert share > 0.05, (key, share)
    skipped = [zero / all_ for zero, all_ in zip(outcome.num_zero_selections, outcome.num_selections, strict=True)]
    if scenario == "nothing skips":
        assert set(skipped) == {0.0}
    elif scenario == "everything skips":
        assert set(skipped) == {1.0}
    else:
        assert all(0.1 < rate < 0.9 for rate in skipped)
    if scenario == "edges":
        key = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
        idle = [not outcome.gradients[key][:, expert].any() for expert in range(E)]
        assert idle == [expert == IDLE_EXPERT for expert in range(E)]
