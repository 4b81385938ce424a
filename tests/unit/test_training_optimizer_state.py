"""Adam states that are saved before the first update, where Megatron-Core allocates them: Transformer Engine's."""

from types import SimpleNamespace
from typing import Any

import torch

from megatron_zeda.training.optimizer_state import allocate_to_save


def test_megatrons_own_way_is_used_once() -> None:
    calls: list[Any] = []

    def allocate(inner: Any, config: Any) -> None:
        calls.append(config)
        inner.state["weight"] = {"exp_avg": torch.zeros(1)}

    fused = SimpleNamespace(state={}, param_groups=[{"params": []}])
    part = SimpleNamespace(optimizer=fused, config="config", init_state_fn=allocate)
    stub = SimpleNamespace(optimizer=None)
    for _ in range(2):
        allocate_to_save(SimpleNamespace(chained_optimizers=[part, stub]))
    assert calls == ["config"]
