"""GLM-4.7-Flash folders in rollouts and evaluations: the drafting layer, the epsilon, the numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import add_mtp, edit_config, load_hf_model, make_hf, read_tensors
from safetensors.torch import save_file
from tiny_hf import write_lines

from megatron_zeda import serving
from megatron_zeda.conversion import inject_zero_experts
from megatron_zeda.errors import ZedaError
from megatron_zeda.evaluation.evaluate import EvaluationInputs, evaluate
from megatron_zeda.models.glm4_moe_lite import Glm4MoeLite
from megatron_zeda.rollout import Sampling, read_rollouts, rollout
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.rollout.sources import transformers_source

CPU = torch.device("cpu")
IDS = torch.arange(12)[None] % 40


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory, tiny_glm_static: Path, tiny_glm_dynamic: Path) -> Path:
    """static/ and dynamic/, each with the layer behind the last one that transformers does not know."""
    root = tmp_path_factory.mktemp("drafting")
    for source in (tiny_glm_static, tiny_glm_dynamic):
        add_mtp(Path(shutil.copytree(source, root / source.name)))
    return root


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_the_drafting_layer_changes_nothing(
    drafting: Path, tiny_glm_static: Path, tiny_glm_dynamic: Path, kind: str
) -> None:
    plain = tiny_glm_static if kind == "static" else tiny_glm_dynamic
    with torch.no_grad():
        found, wanted = (load_model(folder, device=CPU)(IDS).logits for folder in (drafting / kind, plain))
    assert found.equal(wanted)


def test_other_tensors_that_transformers_leaves_out_are_an_error(
    tiny_glm_static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Glm4MoeLiteForCausalLM

    original = Glm4MoeLiteForCausalLM.from_pretrained

    def with_a_surplus(*args: object, **kwargs: object) -> object:
        model, info = original(*args, **kwargs)
        return model, {**info, "unexpected_keys": {"model.layers.7.surplus.weight"}}

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", with_a_surplus)
    with pytest.raises(ZedaError, match=r"model\.layers\.7\.surplus\.weight"):
        load_model(tiny_glm_static, device=CPU)


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize(("said", "epsilon"), [(..., 1e-5), (1e-6, 1e-6), (3e-4, 3e-4)])
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_a_model_has_the_epsilon_that_megatron_gives_it(
    tmp_path: Path,
    tiny_glm_static: Path,
    tiny_glm_dynamic: Path,
    kind: str,
    said: Any,
    epsilon: float,
    trust_remote_code: bool,
) -> None:
    """The key, else ``rms_norm_eps``; but code that came with the weights (and is trusted) stays as it is."""
    source = tiny_glm_static if kind == "static" else tiny_glm_dynamic
    code = {"auto_map": Glm4MoeLite.auto_map} if kind == "dynamic" and trust_remote_code else {}
    folder = edit_config(source, tmp_path / "folder", zeda_latent_norm_eps=said, **code)
    if code:
        for name in Glm4MoeLite.modeling_files:
            shutil.copy(Path(serving.__file__).parent / name, folder / name)
        epsilon = 1e-6 if said is ... else epsilon
    for layer in load_model(folder, device=CPU, trust_remote_code=trust_remote_code).model.layers:
        assert layer.self_attn.q_a_layernorm.variance_epsilon == epsilon
        assert layer.self_attn.kv_a_layernorm.variance_epsilon == epsilon


def test_a_masked_student_is_its_teacher_without_the_key(tmp_path: Path) -> None:
    """Small latents, where an epsilon shows: the published static folder has no key, the injected one always has."""
    hf = edit_config(make_hf(tmp_path / "hf", family="glm4_moe_lite"), tmp_path / "static", zeda_latent_norm_eps=...)
    tensors = read_tensors(hf)
    for name in tensors:
        if "q_a_proj" in name or "kv_a_proj" in name:
            tensors[name] *= 2e-3
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    inject_zero_experts(hf, tmp_path / "dynamic", num_zero_experts=2)
    masked = edit_config(tmp_path / "dynamic", tmp_path / "masked", zeda_zero_logit_bias=float("-inf"))
    with torch.no_grad():
        teacher, student = (load_model(folder, device=CPU)(IDS).logits for folder in (hf, masked))
        torch.testing.assert_close(student, teacher, atol=1e-5, rtol=0)
        assert (load_hf_model(hf)(IDS).logits - teacher).abs().max() > 1e-2  # stock transformers: 1e-6


def test_rollouts_and_evaluation_of_a_student(tmp_path: Path, drafting: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("ab", "a long one", "q?")])
    sampling = Sampling(max_new_tokens=7, temperature=0.0)
    rollout(transformers_source(drafting / "static"), prompts, tmp_path / "rollouts.jsonl", sampling)
    responses = read_rollouts(tmp_path / "rollouts.jsonl")
    inputs = {"teacher": drafting / "static", "rollouts": tmp_path / "rollouts.jsonl"}
    teacher = evaluate(EvaluationInputs(drafting / "static", **inputs))
    assert teacher["kl_to_teacher"] == teacher["skip_rate"] == teacher["expert_flops_saved"] == 0.0
    student = evaluate(EvaluationInputs(drafting / "dynamic", **inputs))
    assert student["kl_to_teacher"] > 0
    assert 0 < student["skip_rate"] < 1
    assert len(student["skip_rate_per_layer"]) == 2  # the dense layer has nothing to skip
    assert student["response_tokens"] == sum(len(line.response_ids) for line in responses)
    assert 0 < student["expert_flops_saved"] < 1
    assert student["theoretical_speedup"]["total"] > 1
    assert student["model"]["num_layers"] == 3
    json.dumps(student, allow_nan=False)
