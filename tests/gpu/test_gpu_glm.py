"""GLM-4.7-Flash in small with Transformer Engine, from a checkpoint that a CPU wrote with the local layers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_reference import GLM, build_glm, call, losses_and_gradients
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from test_gpu_model import FUSED, differences

from megatron_zeda import platform
from megatron_zeda.models import family_for
from megatron_zeda.training.checkpoint import load_weights

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.fixture(scope="module")
def glm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("glm-reference")
    call("glm", path)
    return path


def load_glm(folder: Path, dtype: torch.dtype, **changes: Any) -> Any:
    settings = {**FUSED, "params_dtype": dtype, "bf16": dtype == torch.bfloat16, **changes}
    model = build_glm(**settings).to(platform.device()).to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("expert_bias"):
            buffer.data = buffer.data.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))  # nothing may stay what it was
    load_weights([model], folder)
    return model


def test_glm_keys_are_those_of_the_table() -> None:
    """Names and shapes in a checkpoint, but for ``_extra_state``, do not depend on who built the layers."""
    state = build_glm(**FUSED).sharded_state_dict()
    apply_factories(state)
    entries, _ = extract_sharded_base(state)
    saved = {entry.key: tuple(entry.global_shape) for entry in _leaves(entries) if isinstance(entry, ShardedTensor)}
    assert saved == {row.key: row.global_shape for row in family_for(GLM).weight_table(GLM)}


def _leaves(entry: Any) -> list[Any]:
    if isinstance(entry, (dict, list)):
        children = entry.values() if isinstance(entry, dict) else entry
        return [leaf for child in children for leaf in _leaves(child)]
    return [entry]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_glm_checkpoint_written_on_a_cpu(glm_folder: Path, precision: str, record: Callable[..., None]) -> None:
    """Latent attention, its norms' epsilon, the selection bias; bounds as for grouped-query attention."""
    found = differences(
        losses_and_gradients(load_glm(glm_folder, torch.bfloat16 if precision == "bf16" else torch.float32)),
        torch.load(glm_folder / "reference.pt", weights_only=True),
    )
    record(**found)
    most, loss, gradients = (5e-3, 2e-2, 5e-2) if precision == "fp32" else (5e-2, 0.2, 0.1)
    assert found["loss of nine in ten"] < most and found["loss"] < loss and found["gradients"] < gradients, found


def test_glm_epsilon_is_applied(glm_folder: Path, record: Callable[..., None]) -> None:
    """The check above would not pass with the epsilon of the other norms."""
    wanted = torch.load(glm_folder / "reference.pt", weights_only=True)
    other = losses_and_gradients(load_glm(glm_folder, torch.float32, latent_norm_epsilon=None))
    found = differences(other, wanted)
    record(**found)
    assert found["gradients"] > 0.1, found
