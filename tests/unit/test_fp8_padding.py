"""FP8 GEMMs want an expert's rows in multiples of 16 (MXFP8: 32): zeros are added, and counted apart (law 10)."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forced_routing import alignment, case, errors, expected, expert_rows, rows_into_gemms, run
from megatron.core.transformer.moe.experts import SequentialMLP

CLOSED_FORM = {0: 0, 1: 15, 15: 1, 16: 0, 17: 15}
CLOSED_FORM_32 = {0: 0, 1: 31, 15: 17, 16: 16, 17: 15}


def setting(recipe: str, fp8: str | None = "hybrid") -> Any:
    return SimpleNamespace(fp8=fp8, fp4=None, fp8_recipe=recipe, use_transformer_engine_op_fuser=False)


@pytest.mark.parametrize("count", CLOSED_FORM)
def test_rows_of_one_expert(count: int) -> None:
    assert expert_rows([count], alignment(setting("tensorwise"))) == (count, CLOSED_FORM[count])
    assert expert_rows([count], alignment(setting("blockwise"))) == (count, CLOSED_FORM[count])
    assert expert_rows([count], alignment(setting("mxfp8"))) == (count, CLOSED_FORM_32[count])
    assert expert_rows([count], alignment(setting("tensorwise", fp8=None))) == (count, 0)


def test_rows_of_several_experts() -> None:
    """Every expert is filled up by itself; one that nobody chose costs nothing."""
    assert expert_rows(list(CLOSED_FORM), 16) == (49, 31)
    assert expert_rows([0] * 8, 16) == (0, 0)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("count", CLOSED_FORM)
def test_megatron_pads_by_this_many_zeros(count: int, recipe: str) -> None:
    hidden, probs = torch.rand(count, 4) + 1.0, torch.rand(count) + 1.0
    holder = SimpleNamespace(config=setting(recipe))
    padded, padded_probs = SequentialMLP._pad_tensor_for_quantization(holder, hidden, probs)
    assert padded.shape[0] == padded_probs.shape[0] == sum(expert_rows([count], alignment(setting(recipe))))
    assert padded[:count].equal(hidden) and padded_probs[:count].equal(probs)
    assert not padded[count:].any() and not padded_probs[count:].any()


@pytest.mark.usefixtures("megatron")
def test_padding_changes_no_result() -> None:
    """A layer that pads for FP8 and computes in fp32: the same output and gradients as without, and as in float64."""
    counts = [0, 1, 15, 16, 17, 33, 8, 2]
    padded = case(counts, fp8="hybrid", fp8_recipe="tensorwise")
    rows = rows_into_gemms(padded.layer)
    results = run(padded)
    real, padding = expert_rows(counts, 16)
    assert (real, padding) == (92, 15 + 1 + 15 + 15 + 8 + 14) and sum(rows) == real + padding
    assert max(errors(results, run(case(counts))).values()) < 1e-6
    assert max(errors(results, expected(padded)).values()) < 1e-5
