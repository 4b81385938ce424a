"""Pages that repeat what the code says are held against it."""

from __future__ import annotations

import runpy
from pathlib import Path

from megatron_zeda.zero_experts.config import REFUSALS

ROOT = Path(__file__).parents[2]


def test_refusal_tables_are_the_codes() -> None:
    page = (ROOT / "docs" / "refusals.md").read_text()
    rendered = runpy.run_path(str(ROOT / "docs" / "generate_refusals.py"))["render"]()
    assert page == rendered, "docs/refusals.md is not current: run python docs/generate_refusals.py"
    for refusal in REFUSALS:
        assert f"| `{refusal.setting}` | {refusal.reason} | {refusal.alternative} |" in page
