"""Whole runs with the teacher in the step: the objective, placements, kills, broken losses (laws 7 and 8)."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import make_config, make_run

from megatron_zeda.config import Config
from megatron_zeda.conversion import megatron_io
from megatron_zeda.data import BatchOrder, load_samples
from megatron_zeda.distillation import FrozenTeacher
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import load_hf_config
from megatron_zeda.training import teacher as teachers
from megatron_zeda.training import train

pytestmark = pytest.mark.slow  # whole training runs: `make test`, not `make check`


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("distillation")
    make_run(folder)
    return folder


def distilling(root: Path, name: str, *, steps: int = 4) -> Config:
    config = make_config(root, name)
    config.distillation.cross_entropy, config.distillation.forward_kl, config.distillation.reverse_kl = 0.3, 0.5, 0.8
    config.distillation.chunk_size, config.train.train_iters = 7, steps
    config.dataset.validation = []
    return config


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(root: Path) -> Config:
    config = distilling(root, "whole")
    config.checkpoint.save_interval = 2
    assert train(config) == 0
    return config


# ---- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_step_equals_autograd_of_transformers_models(root: Path, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    if tied:
        make_run(tmp_path, tie_word_embeddings=True)
    folder = tmp_path if tied else root
    config = distilling(folder, f"autograd-{tied}", steps=1)
    config.zero_experts.balance_coeff, config.distillation.temperature = 0.0, 1.5
    assert train(config) == 0

    samples = load_samples(folder / "train.jsonl", seq_length=64, vocab_size=96, tokenizer=None)
    order = BatchOrder(len(samples), seed=config.dataset.seed)
    student = AutoModelForCausalLM.from_pretrained(folder / "student_hf", trust_remote_code=True)
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher_hf")
    terms, count = torch.zeros(3, dtype=torch.float64), 0
    for sample in (samples[order[i]] for i in range(8)):
        tokens, predicts = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.is_response[1:])
        logits_s = student(tokens[None, :-1]).logits[0][predicts].double()
        with torch.no_grad():
            logits_t = teacher(tokens[None, :-1]).logits[0][predicts].double()
        log_s, log_t = torch.log_softmax(logits_s / 1.5, -1), torch.log_softmax(logits_t / 1.5, -1)
        ce = -torch.log_softmax(logits_s, -1).gather(1, tokens[1:][predicts][:, None]).sum()
        terms = terms + torch.stack([ce, _kl(log_t, log_s), _kl(log_s, log_t)])
        count += int(predicts.sum())
    terms = terms / count
    loss = terms @ torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]).norm()
    [line] = metrics(config)
    assert [line["ce"], line["kl_forward"], line["kl_reverse"]] == pytest.approx(terms.tolist(), rel=1e-4)
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5) and terms[1] > 1e-3
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


def test_terms_without_weight_are_not_there(root: Path) -> None:
    config = distilling(root, "reverse-only", steps=1)
    config.distillation.cross_entropy = config.distillation.forward_kl = 0.0
    assert train(config) == 0
    [line] = metrics(config)
    assert line["ce"] is None and line["kl_forward"] is None
    balance = config.zero_experts.balance_coeff * 2 * line["balance_loss"]
    assert line["loss"] == pytest.approx(0.8 * line["kl_reverse"] + balance)


# ---- law 7 -----------------------------------------------------------------------------------------------------------


def test_law_7_a_killed_run_with_a_teacher_goes_on_as_if_it_had_not_been(root: Path, whole: Config) -> None:
    config = distilling(root, "killed")
    config.checkpoint.save_interval = 2
    shutil.copytree(whole.run_dir, config.run_dir)
    shutil.rmtree(config.save_dir / "iter_0000004")
    (config.save_dir / "latest_checkpointed_iteration.txt").write_text("2")
    assert train(config) == 0
    assert metrics(config) == metrics(whole) and len(metrics(whole)) == 4


# ---- law 8 -----------------------------------------------------------------------------------------------------------


def test_law_8_the_teacher_is_in_no_checkpoint_and_its_bytes_are_hashed(
    root: Path, whole: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(root, "alone")
    config.train.train_iters, config.dataset.validation, config.teacher.checkpoint = 1, [], None
    assert train(config) == 0
    keys = [
        set(megatron_io.check_pickles(megatron_io.latest_checkpoint_dir(run.save_dir)).state_dict_metadata)
        for run in (config, whole)
    ]
    assert keys[0] == keys[1]
    capsys.readouterr()
    assert train(distilling(root, "hashed", steps=1)) == 0
    assert re.search(r"the teacher is what it was before: SHA-256 [0-9a-f]{16}", capsys.readouterr().out)


def test_law_8_a_teacher_that_changes_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FrozenTeacher.states

    def flip(self: FrozenTeacher, *args: Any, **kwargs: Any) -> Any:
        next(self.chunks[0].parameters()).data.view(torch.int32)[0, 0] ^= 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(FrozenTeacher, "states", flip)
    config = distilling(root, "flipped", steps=2)  # the fixture's pass and two steps: the bit ends up flipped
    with pytest.raises(ZedaError, match="the teacher's weights changed while the student was trained"):
        train(config)


def test_law_8_the_teacher_records_no_routing(root: Path, megatron: None) -> None:
    from megatron.core.transformer.moe.router_replay import RouterReplay

    config = distilling(root, "replay")
    config.model.overrides = {"moe_enable_routing_replay": True}
    before = len(RouterReplay.global_router_replay_instances)
    assert teachers.build(config, load_hf_config(root / "student" / "hf")) is not None
    assert len(RouterReplay.global_router_replay_instances) == before


# ---- where the teacher is --------------------------------------------------------------------------------------------


def test_a_teacher_in_host_memory_is_the_same_teacher(
    root: Path, whole: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = distilling(root, "host")
    config.teacher.placement = "host"
    assert train(config) == 0
    assert metrics(config) == metrics(whole)
    out = capsys.readouterr().out
    weights = re.search(r"placement host: ([\d.]+) MiB of weights in pinned host memory", out)
    size = sum(file.stat().st_size for file in (root / "teacher_hf").glob("*.safetensors"))
    assert weights and float(weights[1]) * 2**20 == pytest.approx(size, rel=0.05)
    assert f"and {96 * 32 * 4 / 2**20:.3f} MiB of output layer between passes" in out
    # Eight sequences of 64 tokens, every one a response token, in fp32.
    assert f"about {8 * 64 * 32 * 4 / 2**20:.3f} MiB a step" in out


def test_weights_in_host_memory_are_on_the_device_during_a_pass_only(root: Path, megatron: None) -> None:
    config = distilling(root, "place")
    config.teacher.placement = "host"
    teacher = teachers.build(config, load_hf_config(root / "student" / "hf"))
    assert teacher is not None and teacher._host is not None
    before, parameters = teacher.fingerprint(), list(teacher.chunks[0].parameters())
    home = [parameter.data_ptr() for parameter in parameters]
    with teacher._host.on_device():
        away = [weakref.ref(parameter.untyped_storage()) for parameter in parameters]
        assert not {parameter.data_ptr() for parameter in parameters} & set(home)
        assert teacher.fingerprint() == before
        parameters[0].data.zero_()
    assert not any(storage() is not None for storage in away)
    assert [parameter.data_ptr() for parameter in parameters] == home
    assert teacher.fingerprint() == before  # what happened to the copy did not reach the weights


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_losses_that_are_not_finite_are_skipped_counted_and_end_the_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_zeda.training import step

    real, calls = step.linear_objective, iter(range(1000))

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss, sums = real(*args, **kwargs)
        call = next(calls)  # two in a step
        return (loss * float("inf" if call >= 4 else "nan"), sums) if call == 2 or call >= 4 else (loss, sums)

    monkeypatch.setattr(step, "linear_objective", broken)
    config = distilling(root, "broken", steps=50)
    config.train.max_skipped_steps = 3
    config.checkpoint.save_interval = 1
    with pytest.raises(
        ZedaError, match="step 4: 3 steps in a row changed nothing: 3 without a finite loss and gradient"
    ):
        train(config)
    lines = metrics(config)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 2, 3]
    assert lines[1]["loss"] is None and lines[0]["loss"] is not None
    # A run that goes on after a kill still knows how many there were in a row.
    (config.save_dir / "latest_checkpointed_iteration.txt").write_text("3")
    with pytest.raises(ZedaError, match="step 4: 3 steps in a row"):
        train(config)


def test_a_teacher_worse_than_chance_is_refused(root: Path) -> None:
    config = distilling(root, "chance")
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    wrong = [line | {"response_ids": [(token + 48) % 96 for token in line["response_ids"]]} for line in lines]
    (root / "wrong.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wrong))
    config.dataset.train = [str(root / "wrong.jsonl")]
    with pytest.raises(
        ZedaError, match=r"cross entropy on \d+ response tokens is [\d.]+ nats, and guessing costs 4.564"
    ):
        train(config)


def test_a_teacher_that_training_has_written_is_refused(root: Path, whole: Config, tmp_path: Path) -> None:
    shutil.copytree(whole.save_dir, tmp_path / "trained")
    shutil.copy(root / "teacher" / "hf" / "config.json", tmp_path / "trained" / "hf" / "config.json")
    config = distilling(root, "trained-teacher")
    config.teacher.checkpoint = str(tmp_path / "trained")
    with pytest.raises(InputError, match="the teacher is a checkpoint that training has written"):
        train(config)
    config.teacher.checkpoint = str(root / "student")
    with pytest.raises(InputError, match="the teacher has zero experts"):
        train(config)
