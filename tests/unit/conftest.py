"""Tiny Hugging Face folders, made once for all unit tests. Tests must not write into them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static Qwen3-MoE folder with a tokenizer: 2 layers, 8 experts, K = 4."""
    from tiny_hf import save_static

    return save_static(tmp_path_factory.mktemp("tiny") / "static")


@pytest.fixture(scope="session")
def tiny_dynamic(tiny_static: Path) -> Path:
    """The same model with 4 zero experts."""
    from tiny_hf import save_dynamic

    return save_dynamic(tiny_static, tiny_static.parent / "dynamic")


@pytest.fixture(scope="session")
def tiny_glm_static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static GLM-4.7-Flash folder with a tokenizer: 3 layers, the first one dense, 8 experts, K = 4."""
    from tiny_hf import save_static

    return save_static(tmp_path_factory.mktemp("tiny-glm") / "static", family="glm4_moe_lite")


@pytest.fixture(scope="session")
def tiny_glm_dynamic(tiny_glm_static: Path) -> Path:
    """The same model with 4 zero experts."""
    from tiny_hf import save_dynamic

    return save_dynamic(tiny_glm_static, tiny_glm_static.parent / "dynamic")


@pytest.fixture(scope="session")
def static(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest static checkpoint, written by stock transformers: 2 layers, 4 experts, K = 2, no tokenizer."""
    from checkpoints import make_hf

    return make_hf(tmp_path_factory.mktemp("checkpoints") / "static")


@pytest.fixture(scope="session")
def dynamic(static: Path) -> Path:
    """The same with 2 zero experts, made by injection."""
    from megatron_zeda.conversion import inject_zero_experts

    inject_zero_experts(static, static.parent / "dynamic")
    return static.parent / "dynamic"
