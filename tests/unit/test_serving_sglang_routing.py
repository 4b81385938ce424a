"""What of the SGLang plugin needs no SGLang: what becomes of slots that fell on a zero expert, and refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_zeda.serving.sglang.routing import ZeroExpertRouting, with_unchosen
from megatron_zeda.serving.sglang.settings import NEVER_CHOSEN, read_zero_experts

N, Z, K, T, D = 5, 3, 4, 64, 8


def _choose(hidden: Tensor, logits: Tensor, topk: int, renormalize: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax, or sigmoid with a selection bias, and the K largest: as every engine documents it."""
    scores = logits.float().softmax(-1) if bias is None else logits.float().sigmoid()
    ids = (scores if bias is None else scores + bias).topk(topk, -1).indices
    weights = scores.gather(1, ids)
    return (weights / weights.sum(-1, keepdim=True) if renormalize else weights), ids


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(T, N + Z, generator=torch.Generator().manual_seed(0))


def _dense(logits: Tensor, experts: Tensor, bias: Tensor | None) -> Tensor:
    """``[T, D]`` in float64: N + Z experts of which the last Z return zeros."""
    weights, ids = _choose(logits, logits.double(), K, True, bias)
    outputs = torch.cat([experts.double(), torch.zeros(T, Z, D, dtype=torch.float64)], dim=1)
    chosen = outputs.gather(1, ids[..., None].expand(-1, -1, D))
    return (weights.double()[..., None] * chosen).sum(1)


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("sigmoid", [True, False])
@pytest.mark.parametrize("dial", [0.0, -0.7, 0.7])
def test_what_is_left_is_the_model_with_all_zero_experts(
    logits: Tensor, drop: bool, sigmoid: bool, dial: float
) -> None:
    experts = torch.randn(T, N, D, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-0.2, 0.2, N + Z) if sigmoid else None
    offset = torch.cat([torch.zeros(N), torch.full((Z,), dial)])
    routing = ZeroExpertRouting(_choose, N, drop=drop, bias=bias, offset=offset if dial else None)
    weights, ids = routing(torch.zeros(T, D), logits, K, True)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    wanted = _dense(logits, experts, bias + offset) if bias is not None else _dense(logits + offset, experts, None)
    kept = ids.long().clamp(min=0)[..., None].expand(-1, -1, D)
    found = (weights[..., None] * experts.gather(1, kept)).sum(1)
    assert (found - wanted).abs().max() < 1e-6
    assert ((ids == -1) == (weights == 0)).all() if drop else (ids >= 0).all()
    share = float((weights == 0).float().mean())
    assert dial or 0.1 < share < 0.9  # the test is about something


def test_no_token_names_an_expert_twice() -> None:
    """Also where every slot is a zero expert, and with as many slots as real experts."""
    ids = torch.tensor([[5, 6, 7, 0, 1], [0, 1, 2, 3, 4], [7, 4, 6, 5, 2], [5, 6, 7, 3, 4]])
    found = with_unchosen(ids, 5)
    assert [sorted(row) for row in found.tolist()] == [[0, 1, 2, 3, 4]] * 4
    assert found[ids < 5].equal(ids[ids < 5])


def _config(**changes: Any) -> SimpleNamespace:
    values = {
        "architectures": ["Qwen3MoePlusPlusForCausalLM"],
        "num_experts": 8,
        "num_experts_per_tok": 4,
        "zce_nums": [4],
        "zce_types": ["zero"],
        "use_zce_mask": False,
        "zeda_zero_logit_bias": 0.25,
    }
    return SimpleNamespace(**{key: value for key, value in (values | changes).items() if value is not ...})


def test_settings() -> None:
    found = read_zero_experts(_config())
    assert found is not None
    assert (found.num_real, found.num_zero, found.dial) == (8, 4, 0.25)
    masked = read_zero_experts(_config(zeda_zero_logit_bias=float("-inf")))
    assert masked is not None and masked.dial == NEVER_CHOSEN
    static = dict.fromkeys(("zce_nums", "zce_types", "use_zce_mask"), ...)
    assert read_zero_experts(_config(architectures=["Qwen3MoeForCausalLM"], **static)) is None
    assert read_zero_experts(_config(architectures=["Qwen3MoeForCausalLM"])) == found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zce_nums": ...}, "`zce_nums` is missing"),
        ({"use_zce_mask": True}, "`use_zce_mask` must be false"),
        ({"zce_types": ["copy"]}, "`zce_types`"),
        ({"zeda_expert_type": "copy", "zce_types": ["copy"]}, "`zeda_expert_type`"),
        ({"zeda_renormalize": True}, "`zeda_renormalize`"),
        ({"zeda_dynamic_skipping_beta": 0.5, "zce_nums": ...}, "`zeda_dynamic_skipping_beta`"),
        ({"n_group": 2}, "`n_group`"),
    ],
)
def test_what_is_not_served_says_so_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        read_zero_experts(_config(**changes))
    assert words in str(error.value) and "\n" not in str(error.value)
