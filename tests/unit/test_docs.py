"""Pages that repeat what the code says are held against it."""

from __future__ import annotations

from pathlib import Path

from megatron_zeda.zero_experts.config import REFUSALS

ROOT = Path(__file__).parents[2]


def test_refusal_table_is_the_codes() -> None:
    page = (ROOT / "docs" / "stock_megatron.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert rows == [f"| `{r.setting}` | {r.reason} | {r.alternative} |" for r in REFUSALS]
