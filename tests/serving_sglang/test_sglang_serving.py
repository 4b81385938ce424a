"""Law 5 for SGLang on the CPU: the plugin's tokens and log-probabilities are those of stock transformers.

SGLang's Python tree runs without its compiled kernels (``stubs``), in plain torch. Run it with ``make test-sglang``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_dense_zeros, read_tensors
from safetensors.torch import save_file
from sglang_engines import NEW_TOKENS, SETTINGS, prompts
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.rollout.hf_folder import load_model

TOLERANCE = 1e-5
GATE = "model.layers.1.mlp.gate.weight"
NATIVE = {"architectures": ["Qwen3MoeForCausalLM"], "auto_map": None}


def _change(folder: Path, name: str, config: dict[str, Any], tensors: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a folder with other keys and tensors; ``None`` removes one."""
    target = folder.parent / name
    target.mkdir()
    values = json.loads((folder / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    kept = {key: value for key, value in (read_tensors(folder) | tensors).items() if value is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("served")
    static = save_static(root / "static")
    zeda = save_dynamic(static, root / "zeda")
    found = {"zeda": zeda, "dense": make_dense_zeros(zeda, root / "dense")}
    changes: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor | None]]] = {
        "native": (NATIVE, {}),
        "dial": ({"zeda_zero_logit_bias": -0.4}, {}),
        "narrow": ({}, {GATE: read_tensors(static)[GATE]}),
        "gone": ({}, {GATE: None}),
        "hidden": ({**NATIVE, "zce_nums": None}, {}),
    }
    return found | {name: _change(zeda, name, *change) for name, change in changes.items()}


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every folder in SGLang, the engines one after the other in one process."""
    where = tmp_path_factory.mktemp("run")
    (where / "cases.json").write_text(json.dumps([{"name": n, "folder": str(f)} for n, f in folders.items()]))
    script = Path(__file__).with_name("sglang_engines.py")
    command = [sys.executable, "-P", str(script), str(where / "cases.json"), str(where / "results.json")]
    subprocess.run(command, env=os.environ | SETTINGS, check=True, timeout=1800)
    return dict(json.loads((where / "results.json").read_text()))


def _transformers(folder: Path) -> dict[str, list[list[float]]]:
    """Greedy continuation and log-probabilities, token by token."""
    model = load_model(folder, device=torch.device("cpu"), dtype="float32")
    found: dict[str, Any] = {"tokens": [], "logprobs": [], "prompt_logprobs": []}
    for ids in prompts(len(VOCABULARY)):
        row = list(ids)
        with torch.no_grad():
            for _ in range(NEW_TOKENS):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            logits = model(torch.tensor([row])).logits[0].log_softmax(-1)
        each = [float(logits[place, token]) for place, token in enumerate(row[1:])]
        found["tokens"].append(row[len(ids) :])
        found["prompt_logprobs"].append(each[: len(ids) - 1])
        found["logprobs"].append(each[len(ids) - 1 :])
    return found


@pytest.mark.parametrize(("name", "oracle"), [("zeda", "dense"), ("native", "dense"), ("dial", "dial")])
def test_tokens_and_log_probabilities_are_those_of_transformers(
    folders: dict[str, Path], results: dict[str, Any], name: str, oracle: str
) -> None:
    found, wanted = results[name], _transformers(folders[oracle])
    assert found["tokens"] == wanted["tokens"], found
    for key in ("logprobs", "prompt_logprobs"):
        for one, two in zip(found[key], wanted[key], strict=True):
            assert one == pytest.approx(two, abs=TOLERANCE)


def test_the_dial_turns(results: dict[str, Any]) -> None:
    assert results["dial"]["prompt_logprobs"] != results["zeda"]["prompt_logprobs"]


@pytest.mark.parametrize("name", ["narrow", "gone", "hidden"])
def test_nothing_runs_as_a_static_model(results: dict[str, Any], name: str) -> None:
    assert "error" in results[name]
