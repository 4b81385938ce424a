"""GLM-4.7-Flash folders in rollouts and evaluations: the drafting layer, the epsilon, the numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import add_mtp, edit_config
from tiny_hf import write_lines

from megatron_zeda.errors import ZedaError
from megatron_zeda.evaluation.evaluate import EvaluationInputs, evaluate
from megatron_zeda.rollout import Sampling, read_rollouts, rollout
from megatron_zeda.rollout.hf_folder import load_model

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


def test_a_static_model_has_the_epsilon_of_its_configuration(tmp_path: Path, tiny_glm_static: Path) -> None:
    for said, epsilon in ((..., 1e-6), (1e-5, 1e-5), (3e-4, 3e-4)):
        folder = edit_config(tiny_glm_static, tmp_path / str(epsilon), zeda_latent_norm_eps=said)
        for layer in load_model(folder, device=CPU).model.layers:
            assert layer.self_attn.q_a_layernorm.variance_epsilon == epsilon
            assert layer.self_attn.kv_a_layernorm.variance_epsilon == epsilon


def test_rollouts_and_evaluation_of_a_student(tmp_path: Path, drafting: Path) -> None:
    prompts = write_lines(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("ab", "a long one", "q?")])
    sampling = Sampling(max_new_tokens=7, temperature=0.0)
    rollout(drafting / "static", prompts, tmp_path / "rollouts.jsonl", sampling)
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
