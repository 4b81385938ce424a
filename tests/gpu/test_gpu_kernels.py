"""Transformer Engine by itself: if these fail, the installation is at fault and nothing else here means anything."""

from collections.abc import Callable

import pytest
import torch

pytestmark = pytest.mark.hardware


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((actual.double() - wanted.double()).norm() / wanted.double().norm())


def test_linear(record: Callable[..., None]) -> None:
    from transformer_engine import pytorch as te

    torch.manual_seed(0)
    linear = te.Linear(128, 256, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = linear(x)
    y.backward(torch.ones_like(y))
    found = {
        "output": relative(y, x.double() @ linear.weight.double().T),
        "grad": relative(linear.weight.grad, torch.ones_like(y).double().T @ x.double()),
        "grad input": relative(x.grad, linear.weight.double().sum(0).expand_as(x)),
    }
    record(**found)
    assert max(found.values()) < 5e-3, found


def test_grouped_linear_with_empty_groups(record: Callable[..., None]) -> None:
    from transformer_engine import pytorch as te

    torch.manual_seed(0)
    splits = [0, 1, 17, 0]
    linear = te.GroupedLinear(4, 128, 256, bias=False, params_dtype=torch.bfloat16)
    x = torch.randn(sum(splits), 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = linear(x, splits)
    y.backward(torch.ones_like(y))
    weights = [getattr(linear, f"weight{group}") for group in range(4)]
    parts = x.double().split(splits)
    wanted = torch.cat([part @ weight.double().T for part, weight in zip(parts, weights, strict=True)])
    input_gradient = [weight.double().sum(0).expand_as(part) for part, weight in zip(parts, weights, strict=True)]
    found = {"output": relative(y, wanted), "grad input": relative(x.grad, torch.cat(input_gradient))}
    for group, (part, weight) in enumerate(zip(parts, weights, strict=True)):
        if splits[group]:
            found[f"grad {group}"] = relative(weight.grad, part.sum(0, keepdim=True).expand(256, -1))
        else:
            assert weight.grad is None or not weight.grad.any()
    record(**found)
    assert max(found.values()) < 5e-3, found


def test_permutation(record: Callable[..., None]) -> None:
    from transformer_engine.pytorch.permutation import moe_permute_with_probs, moe_unpermute

    torch.manual_seed(0)
    chosen = torch.rand(32, 4, device="cuda") < 0.4
    x = torch.randn(32, 64, device="cuda", requires_grad=True)
    probs = torch.rand(32, 4, device="cuda") * chosen
    rows, row_probs, order = moe_permute_with_probs(x, probs, chosen, num_out_tokens=int(chosen.sum()))
    tokens = chosen.T.nonzero()[:, 1]  # experts first, tokens in order within
    assert rows.shape[0] == int(chosen.sum()) and rows.equal(x[tokens])
    assert row_probs.reshape(-1).equal(probs.T[chosen.T])
    back = moe_unpermute(rows * row_probs.reshape(-1, 1), order, restore_shape=x.shape)
    wanted = x * probs.sum(1, keepdim=True)
    record(unpermuted=relative(back, wanted))
    torch.testing.assert_close(back, wanted, atol=1e-5, rtol=1e-5)


def test_fp8_recipes_of_this_gpu(record: Callable[..., None]) -> None:
    from transformer_engine import pytorch as te

    supported = {
        "tensorwise": te.is_fp8_available(return_reason=True),
        "blockwise": te.is_fp8_block_scaling_available(return_reason=True),
        "mxfp8": te.is_mxfp8_available(return_reason=True),
    }
    record(**{name: bool(there) for name, (there, _) in supported.items()})
    assert supported["tensorwise"][0], supported["tensorwise"][1]
