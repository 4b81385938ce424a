"""Stage 1 on a tiny GLM-4.7-Flash in this process: laws 6, 7 and 8, and what must not change."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import BIAS, assert_same_bits, load_hf_model, newest_iteration, read_tensors
from test_training_run import digest, metrics, samples_of
from torch import Tensor
from training_runs import make_config, make_glm_run

from megatron_zeda.config import Config
from megatron_zeda.conversion import verify_checkpoint
from megatron_zeda.data import BatchOrder
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import load_hf_config
from megatron_zeda.training import train

pytestmark = pytest.mark.slow

LAYERS, EXPERTS, TOPK = 3, 8, 2
DRAFTING = f"model.layers.{LAYERS}."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("training-glm")
    make_glm_run(folder, num_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def whole(root: Path) -> Config:
    """An uninterrupted run that saved at steps 3 and 6 and exported."""
    config = make_config(root, "whole")
    config.checkpoint.save_interval, config.checkpoint.export_hf, config.validation.eval_interval = 3, True, 2
    assert train(config) == 0
    return config


def test_a_run_starts_from_an_import_and_leaves_a_model(root: Path, whole: Config) -> None:
    assert newest_iteration(root / "student").name == "release"
    assert newest_iteration(whole.save_dir).name == "iter_0000006"
    manifest = json.loads((whole.save_dir / "zeda_manifest.json").read_text())
    assert manifest["iteration"] == 6 and "files" not in manifest  # the import's are not the run's
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert len({line["ce"] for line in lines}) == 6 and all(math.isfinite(line["ce"]) for line in lines)
    for line in lines:  # the dense layer has no router
        assert len(line["skip_rate_per_layer"]) == len(line["balance_loss_per_layer"]) == LAYERS - 1
        assert 0.0 < line["skip_rate"] < 1.0


def assert_moved_as_it_should(root: Path, config: Config) -> None:
    """The layer that drafts tokens and the selection biases go in and come out bit for bit, all else has moved."""
    before, after = read_tensors(root / "student_hf"), read_tensors(config.run_dir / "hf")
    assert before.keys() == after.keys()
    fixed = {name for name in before if name.startswith(DRAFTING) or name.endswith(BIAS)}
    assert len(fixed) > 20 and sum(not name.startswith(DRAFTING) for name in fixed) == LAYERS - 1
    assert_same_bits({name: before[name] for name in fixed}, {name: after[name] for name in fixed})
    assert all(before[name].dtype == torch.float32 for name in fixed if name.endswith(BIAS))
    still = [name for name in before.keys() - fixed if before[name].equal(after[name])]
    assert still == []


def test_training_moves_what_it_should_and_nothing_else(root: Path, whole: Config) -> None:
    assert_moved_as_it_should(root, whole)
    assert (whole.save_dir / "hf" / "carried.safetensors").is_file()
    assert load_hf_config(whole.run_dir / "hf")["zeda_latent_norm_eps"] == 1e-6


def test_law_7_a_killed_run_goes_on(root: Path, whole: Config) -> None:
    config = make_config(root, "killed")
    config.checkpoint.save_interval, config.checkpoint.export_hf, config.validation.eval_interval = 3, True, 2
    shutil.copytree(whole.run_dir, config.run_dir)
    shutil.rmtree(config.run_dir / "hf")
    shutil.rmtree(config.save_dir / "iter_0000006")
    (config.save_dir / "latest_checkpointed_iteration.txt").write_text("3")
    text = (config.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (config.run_dir / "metrics.jsonl").write_text("".join(text[:4]) + text[4][:30])
    assert train(config) == 0
    assert metrics(config) == metrics(whole)
    assert verify_checkpoint(whole.run_dir / "hf", config.run_dir / "hf") == []


@pytest.mark.parametrize("changes", [{"bf16": True}, {"packing": True}, {"recompute_granularity": "selective"}])
def test_law_7_with_other_settings_of_glm(root: Path, changes: dict[str, Any]) -> None:
    runs = []
    for name, interval in (("one-go", 100), ("two-goes", 2)):
        config = make_config(root, f"{name}-{next(iter(changes))}")
        config.checkpoint.save_interval, config.train.train_iters = interval, 4
        config.teacher.checkpoint, config.dataset.validation = None, []
        for key, value in changes.items():
            setattr(config.dataset if key == "packing" else config.model, key, value)
        if "recompute_granularity" in changes:
            config.model.recompute_modules = ["moe", "mlp"]
        assert train(config) == 0
        runs.append(config)
    (runs[1].save_dir / "latest_checkpointed_iteration.txt").write_text("2")
    assert train(runs[1]) == 0
    assert metrics(runs[0]) == metrics(runs[1])


def test_a_bf16_run_keeps_the_selection_bias_in_fp32(root: Path) -> None:
    config = make_config(root, "bf16-export")
    config.model.bf16, config.checkpoint.export_hf, config.train.train_iters = True, True, 2
    assert train(config) == 0
    before, after = read_tensors(root / "student_hf"), read_tensors(config.run_dir / "hf")
    fixed = {name for name in before if name.startswith(DRAFTING) or name.endswith(BIAS)}
    assert_same_bits({name: before[name] for name in fixed}, {name: after[name] for name in fixed})


def test_a_folder_without_a_configuration_beside_it_is_refused_at_once(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "student", tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "hf")
    config = make_config(root, "no-hf")
    config.model.hf, config.model.checkpoint = str(root / "student_hf"), str(tmp_path / "student")
    with pytest.raises(InputError, match=r"no config.json beside the checkpoint"):
        train(config)


def test_a_flipped_bit_is_found_before_training(root: Path, whole: Config, tmp_path: Path) -> None:
    """In the weights a run starts from, and in the optimizer states it goes on from."""
    for source, name in ((root / "student", "start"), (whole.save_dir, "resume")):
        folder = tmp_path / name
        shutil.copytree(source, folder)
        metadata = pickle.loads((newest_iteration(folder) / ".metadata").read_bytes())
        wanted = "exp_avg" if name == "resume" else "embedding"
        piece = next(info for index, info in metadata.storage_data.items() if wanted in index.fqn)
        file = newest_iteration(folder) / piece.relative_path
        data = bytearray(file.read_bytes())
        data[piece.offset + piece.length // 2] ^= 1  # amid the numbers
        file.write_bytes(data)
        config = make_config(root, f"flipped-{name}")
        if name == "start":
            config.model.checkpoint = str(folder)
        else:
            config.checkpoint.load, config.train.train_iters = str(folder), 8
        with pytest.raises(InputError, match=r"\.distcp \(.*the bytes are damaged \(CRC-32"):
            train(config)


# ---- law 6, against stock transformers' modules ----------------------------------------------------------------------


def zero_selections(folder: Path, rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Per sequence: logits ``[S, V]``, and zero experts chosen ``[MoE layers, S]``, from the router's inputs."""
    model = load_hf_model(folder)
    chosen: list[Tensor] = []

    def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
        scores = (inputs[0].flatten(0, -2).float() @ module.gate.weight.float().t()).sigmoid()
        bias = module.gate.e_score_correction_bias.clone()
        bias[EXPERTS:] += getattr(model.config, "zeda_zero_logit_bias", 0.0)
        chosen.append(((scores + bias).topk(TOPK, dim=-1).indices >= EXPERTS).sum(-1))

    for layer in model.model.layers[1:]:
        layer.mlp.register_forward_pre_hook(count)
    logits, zeros = [], []
    with torch.no_grad():
        for row in rows:
            chosen.clear()
            logits.append(model(torch.tensor([row])).logits[0].double())
            zeros.append(torch.stack(chosen))
    return logits, zeros


@pytest.mark.parametrize("packing", [False, True])
def test_law_6_the_reported_skip_rate_is_the_exported_glms(root: Path, packing: bool) -> None:
    config = make_config(root, f"law6-{packing}")
    config.train.train_iters, config.train.micro_batch_size, config.dataset.packing = 1, 2, packing
    assert train(config) == 0
    samples = samples_of(config, config.dataset.train)
    order = BatchOrder(len(samples), seed=config.dataset.seed)
    _, zeros = zero_selections(root / "student_hf", [samples[order[i]].tokens[:-1].tolist() for i in range(8)])
    chosen = torch.cat(zeros, dim=1).double()
    expected = (chosen.sum(1) / (TOPK * chosen.shape[1])).tolist()
    assert metrics(config)[0]["skip_rate_per_layer"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("bias", [None, -0.05])
def test_held_out_numbers_equal_the_exported_glms(root: Path, bias: float | None) -> None:
    config = make_config(root, f"held-out-{bias}")
    config.train.train_iters, config.checkpoint.export_hf = 2, True
    config.zero_experts.logit_bias = bias
    assert train(config) == 0
    samples = samples_of(config, config.dataset.validation)
    rows = [sample.tokens[:-1].tolist() for sample in samples]
    student, zeros = zero_selections(config.run_dir / "hf", rows)
    teacher = load_hf_model(root / "teacher_hf")
    ce, kl, skipped = [], [], []
    for sample, row, logits, chosen in zip(samples, rows, student, zeros, strict=True):
        predicts = torch.from_numpy(sample.is_response[1:])
        labels = torch.from_numpy(sample.tokens[1:])[predicts].long()
        with torch.no_grad():
            log_t = torch.log_softmax(teacher(torch.tensor([row])).logits[0].double()[predicts], -1)
        log_s = torch.log_softmax(logits[predicts], -1)
        ce.append(-log_s.gather(1, labels[:, None])[:, 0])
        kl.append((log_t.exp() * (log_t - log_s)).sum(-1))
        skipped.append(chosen[:, predicts].double() / TOPK)
    last = metrics(config)[-1]["validation"]
    assert last["ce"] == pytest.approx(torch.cat(ce).mean().item(), rel=1e-5)
    assert last["kl_forward"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4, abs=1e-7)
    assert last["skip_rate_per_layer"] == pytest.approx(torch.cat(skipped, dim=1).mean(1).tolist(), abs=1e-12)


def assert_first_step_is_autograds(root: Path, config: Config) -> None:
    """Cross entropy and gradient norm of step 1 against the bundled modelling file in stock transformers."""
    samples = samples_of(config, config.dataset.train)
    order = BatchOrder(len(samples), seed=config.dataset.seed)
    model = load_hf_model(root / "student_hf")
    total, count = torch.zeros(()), 0
    for sample in (samples[order[i]] for i in range(8)):
        tokens, predicts = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.is_response[1:])
        log_p = torch.log_softmax(model(tokens[None, :-1]).logits[0][predicts], -1)
        total = total - log_p.gather(1, tokens[1:][predicts][:, None]).sum()
        count += int(predicts.sum())
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    first = metrics(config)[0]
    assert first["ce"] == pytest.approx(total.item() / count, rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_the_first_step_equals_transformers_autograd_for_glm(root: Path) -> None:
    config = make_config(root, "autograd")
    config.train.train_iters, config.zero_experts.balance_coeff = 1, 0.0
    assert train(config) == 0
    assert_first_step_is_autograds(root, config)


def test_glm_4_5_air_trains(tmp_path: Path) -> None:
    """Grouped-query attention with partial rotary embeddings and biases, otherwise as above."""
    make_glm_run(tmp_path, family="glm4_moe")
    config = make_config(tmp_path, "run")
    config.train.train_iters, config.zero_experts.balance_coeff, config.checkpoint.export_hf = 3, 0.0, True
    assert train(config) == 0
    assert_first_step_is_autograds(tmp_path, config)
    assert_moved_as_it_should(tmp_path, config)


# ---- law 8 -----------------------------------------------------------------------------------------------------------


def test_law_8_the_teacher_of_a_glm_is_never_written(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(root / "teacher"), digest(root / "student")
    config = make_config(root, "law8")
    config.train.train_iters = 1
    assert train(config) == 0
    assert (digest(root / "teacher"), digest(root / "student")) == before
    out = capsys.readouterr().out
    assert "parity gate passed" in out
    count = sum(name.startswith(DRAFTING) for name in read_tensors(root / "student_hf"))
    assert f"\n{count} carried tensors beside the model: not trained" in out


def test_law_8_the_gate_sees_another_selection_bias(root: Path) -> None:
    from safetensors.torch import load_file, save_file

    from megatron_zeda.conversion import hf_to_megatron

    shutil.copytree(root / "teacher_hf", root / "other_hf")
    file = root / "other_hf" / "model.safetensors"
    weights = load_file(file)
    weights[f"model.layers.1.mlp.gate.{BIAS}"][0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
    hf_to_megatron(root / "other_hf", root / "other")
    config = make_config(root, "gate")
    config.teacher.checkpoint = str(root / "other")
    with pytest.raises(ZedaError, match="with its zero experts masked the student is not the teacher: mean KL"):
        train(config)
    assert not list(config.run_dir.glob("checkpoints/iter_*"))


def test_teacher_and_student_share_the_epsilon_of_latent_norms(root: Path, tmp_path: Path) -> None:
    """Not given it is ``rms_norm_eps``, as Megatron-Core has it."""
    config = make_config(root, "epsilon")
    config.teacher.checkpoint, config.train.train_iters = str(tmp_path / "teacher"), 1
    shutil.copytree(root / "teacher", tmp_path / "teacher")
    file = tmp_path / "teacher" / "hf" / "config.json"
    shape = json.loads(file.read_text())
    del shape["zeda_latent_norm_eps"]
    file.write_text(json.dumps(shape))
    with pytest.raises(InputError, match=r"do not belong together: latent_norm_epsilon"):
        train(config)
    file.write_text(json.dumps(shape | {"rms_norm_eps": 1e-6}))
    with pytest.raises(InputError, match=r"do not belong together: layernorm_epsilon \(1e-05 and 1e-06\);"):
        train(config)
