"""The frozen teacher beside a student that is trained (law 8), and the scores computed from its states."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_runs import make_config, make_run

from megatron_zeda.config_megatron import transformer_config
from megatron_zeda.conversion.megatron_io import latest_iteration
from megatron_zeda.data import GlobalBatch, training_batches
from megatron_zeda.distillation import (
    FrozenTeacher,
    Objective,
    TeacherStates,
    num_bytes,
    parity_gate,
    ready_weight,
    score,
)
from megatron_zeda.distillation.teacher import _computing
from megatron_zeda.errors import ZedaError
from megatron_zeda.models import load_hf_config
from megatron_zeda.training import checkpoint, setup
from megatron_zeda.training.step import train_step
from megatron_zeda.zero_experts import router_statistics


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("teacher")
    make_run(folder)
    return folder


def build(root: Path, name: str) -> list[Any]:
    """The teacher's or the student's chunks with their weights."""
    assert latest_iteration(root / name) == 0
    hf_config = load_hf_config(root / name / "hf")
    chunks = setup.build_chunks(hf_config, transformer_config(make_config(root, "x"), hf_config, where=root / name))
    checkpoint.load_weights(chunks, root / name)
    return chunks


@pytest.fixture
def batch(root: Path, megatron: None) -> GlobalBatch:
    data = setup.load_data(make_config(root, "x"), load_hf_config(root / "student" / "hf"))
    return next(training_batches(data.train, seed=0, consumed_samples=0))


def test_law_8_training_the_student_leaves_the_teacher_alone(root: Path, batch: GlobalBatch) -> None:
    config = make_config(root, "x")
    teacher = FrozenTeacher(build(root, "teacher"))
    before = teacher.fingerprint()
    states = teacher.states(batch)
    student = setup.wrap_for_training(config, build(root, "student"))
    optimizer, scheduler = setup.build_optimizer(config, student, train_iters=10)
    for _ in range(3):
        assert train_step(student, optimizer, scheduler, batch, objective=Objective(), stop=False).updated
    assert teacher.fingerprint() == before
    again = teacher.states(batch)
    assert all(torch.equal(a, b) for a, b in zip(states.shares, again.shares, strict=True))

    mine = {id(p) for chunk in teacher.chunks for p in chunk.parameters()}
    assert not any(p.requires_grad or p.grad is not None for chunk in teacher.chunks for p in chunk.parameters())
    assert not any(chunk.training for chunk in teacher.chunks)
    assert not mine & {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_fingerprint_sees_one_bit(root: Path, megatron: None) -> None:
    teacher = FrozenTeacher(build(root, "teacher"))
    before = teacher.fingerprint()
    weight = next(teacher.chunks[0].parameters())
    weight.data.view(torch.int32)[0, 0] ^= 1
    assert teacher.fingerprint() != before
    weight.data.view(torch.int32)[0, 0] ^= 1
    assert teacher.fingerprint() == before


def test_states_outlive_the_teacher(root: Path, batch: GlobalBatch) -> None:
    teacher = FrozenTeacher(build(root, "teacher"))
    states = teacher.states(batch)
    weights = [weakref.ref(parameter) for chunk in teacher.chunks for parameter in chunk.parameters()]
    del teacher
    gc.collect()
    assert weights and not any(weight() is not None for weight in weights)
    assert states.weight is not None and states.weight.abs().sum() > 0
    assert sum(states.num_rows) == batch.loss_tokens
    assert num_bytes([states]) == 4 * 32 * (batch.loss_tokens + 96)


def test_the_states_of_all_batches_share_one_output_layer(root: Path, batch: GlobalBatch) -> None:
    teacher = FrozenTeacher(build(root, "teacher"))
    states = [teacher.states(batch) for _ in range(3)]
    assert states[0].weight is states[1].weight is states[2].weight is not None
    assert num_bytes(states) == 4 * 32 * (3 * batch.loss_tokens + 96)


def test_score_against_the_definition(root: Path, batch: GlobalBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_zeda.distillation import forward

    monkeypatch.setattr(forward, "_CHUNK_ELEMENTS", 96 * 7)  # several chunks, the last one smaller
    teacher_chunks, student = build(root, "teacher"), build(root, "student")
    states = FrozenTeacher(teacher_chunks).states(batch)
    student[0].eval()
    scores = score(student, batch, states, relative_tolerance=0.3)

    ce = kl = teacher_ce = torch.zeros((), dtype=torch.float64)
    differences, far = [], 0
    for micro in batch.micro_batches:
        chosen = micro.loss_mask > 0
        with torch.no_grad():
            logits = [model(micro.tokens, micro.position_ids, None) for model in (student[0], teacher_chunks[0])]
        (s, t) = (x[chosen].double() for x in logits)
        log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
        ce = ce - log_s.gather(1, micro.labels[chosen][:, None]).sum()
        teacher_ce = teacher_ce - log_t.gather(1, micro.labels[chosen][:, None]).sum()
        kl = kl + (log_t.exp() * (log_t - log_s)).sum()
        difference = (s - t).abs().amax(-1)
        differences.append(difference.max().item())
        far += int((difference > 0.3 * t.abs().amax(-1).clamp(min=1)).sum())
    assert scores.tokens == batch.loss_tokens
    assert scores.ce_sum == pytest.approx(ce.item(), rel=1e-5)
    assert scores.teacher_ce_sum == pytest.approx(teacher_ce.item(), rel=1e-5)
    assert scores.kl_sum == pytest.approx(kl.item(), rel=1e-4)
    assert scores.max_difference == pytest.approx(max(differences), rel=1e-4)
    assert scores.far_tokens == far and 0 < far < scores.tokens


def test_the_gate_leaves_the_student_as_it_was(root: Path, batch: GlobalBatch) -> None:
    states = FrozenTeacher(build(root, "teacher")).states(batch)
    student = build(root, "student")
    student[0].train()
    gate = parity_gate(student, states, batch, exact=True)
    assert gate.max_difference < 1e-5 and abs(gate.kl) < 1e-6 and gate.tokens == batch.loss_tokens
    assert student[0].training
    assert router_statistics(student).num_selections == (0, 0)
    student[0].eval()
    score(student, batch)
    assert router_statistics(student).skip_rate > 0.05  # no longer masked


@pytest.mark.parametrize("exact", [True, False])
def test_the_gate_refuses_another_model(root: Path, batch: GlobalBatch, exact: bool) -> None:
    states = FrozenTeacher(build(root, "teacher")).states(batch)
    student = build(root, "student")
    with torch.no_grad():
        student[0].decoder.layers[1].mlp.experts.local_experts[0].linear_fc2.weight.mul_(2.0)
    with pytest.raises(ZedaError, match=r"the student is not the teacher: mean KL .* response tokens differ"):
        parity_gate(student, states, batch, exact=exact)


def test_the_gate_refuses_garbage(root: Path, batch: GlobalBatch) -> None:
    student = build(root, "student")
    states = FrozenTeacher(build(root, "teacher")).states(batch)
    zeros = TeacherStates([torch.zeros_like(share) for share in states.shares], states.num_rows, torch.zeros(96, 32))
    with pytest.raises(
        ZedaError, match=r"the teacher's cross entropy on \d+ response tokens is 4.564 nats, and guessing"
    ):
        parity_gate(student, zeros, batch, exact=False)


def test_a_weight_that_is_used_outside_its_module_is_waited_for() -> None:
    """As its module's own forward pass waits, with ddp.overlap_param_gather; a tied weight is not the module's."""
    layer, tied, calls = torch.nn.Linear(3, 5, bias=False), torch.zeros(5, 3), []
    layer.register_forward_pre_hook(lambda module, inputs: calls.append(module))
    assert ready_weight(layer, None) is layer.weight and ready_weight(layer, tied) is tied
    assert calls == [layer, layer]


def test_a_pass_may_compute_without_fp8() -> None:
    """The gate compares in the student's precision; modules of a model share or copy its configuration."""
    shared, copied = SimpleNamespace(fp8="hybrid"), SimpleNamespace(fp8="hybrid")
    chunk, layer = torch.nn.Module(), torch.nn.Module()
    chunk.config, layer.config, chunk.layer = shared, copied, layer
    with _computing([chunk], fp8=True):
        assert (shared.fp8, copied.fp8) == ("hybrid", "hybrid")
    with pytest.raises(KeyError), _computing([chunk], fp8=False):
        assert (shared.fp8, copied.fp8) == (None, None)
        raise KeyError
    assert (shared.fp8, copied.fp8) == ("hybrid", "hybrid")
