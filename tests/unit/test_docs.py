"""Pages that repeat what the code says are held against it."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from full_size import MODELS, full_size_config

from megatron_zeda.config_refusals import MODEL_DEFAULTS, SET_BY_SOME_FAMILY
from megatron_zeda.models import FAMILIES, Family, family_for
from megatron_zeda.zero_experts.config import REFUSALS

ROOT = Path(__file__).parents[2]


def test_refusal_tables_are_the_codes() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text()
    rendered = runpy.run_path(str(ROOT / "docs" / "generate_refusals.py"))["render"]()
    assert page == rendered, "docs/refusals.md is not current: run python docs/generate_refusals.py"
    for refusal in REFUSALS:
        assert f"| `{refusal.setting}` | {refusal.reason} | {refusal.alternative} |" in page


def test_the_last_table_knows_what_families_set() -> None:
    found = set()
    for name in MODELS:
        config = full_size_config(name)
        family = family_for(config)
        found |= family.transformer_config_kwargs(config).keys()
        if family.transformer_config_class().multi_latent_attention:
            found |= {"multi_latent_attention"}
    assert found & MODEL_DEFAULTS == SET_BY_SOME_FAMILY


def test_adding_a_family_names_files_that_are_there() -> None:
    page = (ROOT / "docs" / "adding_a_family.md").read_text()
    paths = set(re.findall(r"`((?:tests|models|serving|megatron_zeda)/[\w/.]+)`", page))
    assert len(paths) > 8
    for path in paths:
        assert (ROOT / path).exists() or (ROOT / "megatron_zeda" / path).exists(), path


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_family_has_what_the_page_asks_for(family: Family) -> None:
    for name in family.modeling_files:
        assert (ROOT / "megatron_zeda" / "serving" / name).is_file()
    module = Path(family.modeling_files[0]).stem
    assert set(family.auto_map) == {"AutoModel", "AutoModelForCausalLM"}
    assert family.auto_map["AutoModelForCausalLM"] == f"{module}.{family.dynamic_architecture}"
    assert any(family_for(full_size_config(model)) is family for model in MODELS)
    for name in ("test_conversion_layouts.py", "test_law_1_layouts.py"):
        assert f'"{family.name}"' in (ROOT / "tests" / "distributed" / name).read_text()
