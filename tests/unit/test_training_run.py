"""Whole runs of stage 1 in this process: what they write, that they resume exactly, what they refuse (laws 6, 7, 8)."""

import dataclasses
import errno
import hashlib
import json
import pickle
import re
import shutil
from pathlib import Path
from traceback import StackSummary
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import newest_iteration
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from training_runs import make_config, make_run

from megatron_zeda.config import Config
from megatron_zeda.conversion import verify_checkpoint
from megatron_zeda.data import BatchOrder, Sample, load_samples
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import load_hf_config
from megatron_zeda.training import train

pytestmark = pytest.mark.slow  # whole training runs: `make test`, not `make check`

KEYS = [
    "step", "loss", "ce", "kl_forward", "kl_reverse", "balance_loss", "balance_loss_per_layer", "skip_rate",
    "skip_rate_per_layer", "grad_norm",
    "lr", "tokens_per_second", "skipped_steps", "zero_expert_weight",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("training")
    make_run(folder)
    return folder


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def samples_of(config: Config, paths: list[str]) -> list[Sample]:
    return [s for path in paths for s in load_samples(Path(path), seq_length=64, vocab_size=96, tokenizer=None)]


@pytest.fixture(scope="module")
def whole(root: Path) -> Config:
    """An uninterrupted run that saved at steps 3 and 6 and exported."""
    config = make_config(root, "whole")
    config.checkpoint.save_interval, config.checkpoint.export_hf = 3, True
    config.validation.eval_interval, config.logger.tensorboard = 2, True
    assert train(config) == 0
    return config


def test_what_a_run_leaves(whole: Config) -> None:
    lines = [json.loads(line) for line in (whole.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert [key for key in line if key != "validation"] == KEYS
        evaluated = line["step"] % 2 == 0
        assert ("validation" in line) == evaluated and line["kl_forward"] is None
        assert not evaluated or line["validation"]["kl_forward"] > 0
        assert (
            len(line["skip_rate_per_layer"]) == len(line["balance_loss_per_layer"]) == 2
            and line["tokens_per_second"] > 0
        )
        balance = whole.zero_experts.balance_coeff * 2 * line["balance_loss"]
        assert line["loss"] == pytest.approx(line["ce"] + balance)
    assert sorted(path.name for path in whole.run_dir.iterdir()) == [
        "checkpoints", "config.yaml", "hf", "metrics.jsonl", "tensorboard",
    ]  # fmt: skip
    assert sorted(path.name for path in whole.save_dir.iterdir()) == [
        "hf", "iter_0000003", "iter_0000006", "latest_checkpointed_iteration.txt", "zeda_manifest.json",
    ]  # fmt: skip
    for name in ("config.yaml", "zeda_manifest.json", ".metadata"):
        assert (whole.save_dir / "iter_0000006" / name).is_file()
    assert "train_iters: 6" in (whole.run_dir / "config.yaml").read_text()
    manifest = json.loads((whole.save_dir / "zeda_manifest.json").read_text())
    assert manifest["precision"] == {"parameters": "fp32", "compute": "fp32"}


def test_law_7_a_killed_run_goes_on_as_if_it_had_not_been(root: Path, whole: Config) -> None:
    config = make_config(root, "killed")
    config.checkpoint.save_interval, config.checkpoint.export_hf, config.validation.eval_interval = 3, True, 2
    shutil.copytree(whole.run_dir, config.run_dir)
    # Killed while it wrote the line of step 5 and the checkpoint after the one of step 3.
    shutil.rmtree(config.run_dir / "hf")
    shutil.rmtree(config.save_dir / "iter_0000006")
    (config.save_dir / ".iter_0000006.partial").mkdir()
    (config.save_dir / "latest_checkpointed_iteration.txt").write_text("3")
    text = (config.run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (config.run_dir / "metrics.jsonl").write_text("".join(text[:4]) + text[4][:30])

    assert train(config) == 0
    assert metrics(config) == metrics(whole)
    assert verify_checkpoint(whole.run_dir / "hf", config.run_dir / "hf") == []
    assert not list(config.save_dir.glob(".*"))

    # Started once more, there is nothing to do and nothing changes.
    assert train(config) == 0
    assert metrics(config) == metrics(whole)


@pytest.mark.parametrize("changes", [{"use_distributed_optimizer": False}, {"bf16": True}, {"packing": True}])
def test_law_7_with_other_settings(root: Path, changes: dict[str, bool]) -> None:
    runs = []
    for name, interval in (("one-go", 100), ("two-goes", 2)):
        config = make_config(root, f"{name}-{next(iter(changes))}")
        config.checkpoint.save_interval, config.train.train_iters = interval, 4
        config.teacher.checkpoint, config.dataset.validation = None, []
        for key, value in changes.items():
            section = {"bf16": config.model, "packing": config.dataset}.get(key, config.optimizer)
            setattr(section, key, value)
        assert train(config) == 0
        runs.append(config)
    (runs[1].save_dir / "latest_checkpointed_iteration.txt").write_text("2")
    assert train(runs[1]) == 0
    assert metrics(runs[0]) == metrics(runs[1])


# ---- law 6 and the held-out numbers, against stock transformers ------------------------------------------------------


def zero_selections(folder: Path, rows: list[list[int]]) -> tuple[list[Tensor], list[Tensor]]:
    """Per sequence: logits ``[S, V]``, and zero experts chosen ``[layers, S]``, by the model's router inputs."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    chosen: list[Tensor] = []
    for layer in model.model.layers:

        def count(module: Any, inputs: tuple[Tensor, ...]) -> None:
            weight = module.gate.weight
            logits = inputs[0].flatten(0, -2) @ weight.t()
            logits[:, 8:] += getattr(model.config, "zeda_zero_logit_bias", 0.0)
            top = logits.topk(2, dim=-1).indices
            chosen.append((top >= 8).sum(-1))

        layer.mlp.register_forward_pre_hook(count)
    logits, zeros = [], []
    with torch.no_grad():
        for row in rows:
            chosen.clear()
            logits.append(model(torch.tensor([row])).logits[0].double())
            zeros.append(torch.stack(chosen))
    return logits, zeros


@pytest.mark.parametrize(("recompute", "packing"), [(False, False), (True, False), (True, True)])
def test_law_6_the_reported_skip_rate_is_the_exported_models(root: Path, recompute: bool, packing: bool) -> None:
    config = make_config(root, f"law6-{recompute}-{packing}")
    config.train.train_iters, config.train.micro_batch_size = 1, 2
    config.dataset.packing = packing
    if recompute:
        config.model.recompute_granularity, config.model.recompute_method = "full", "uniform"
        config.model.recompute_num_layers = 1
    assert train(config) == 0

    # The rate of step 1 is that of the weights before it, on every token that is not padding.
    samples = samples_of(config, config.dataset.train)
    order = BatchOrder(len(samples), seed=config.dataset.seed)
    rows = [samples[order[i]].tokens[:-1].tolist() for i in range(8)]
    _, zeros = zero_selections(root / "student_hf", rows)
    chosen = torch.cat(zeros, dim=1).double()
    expected = (chosen.sum(1) / (2 * chosen.shape[1])).tolist()
    assert metrics(config)[0]["skip_rate_per_layer"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_step_equals_transformers_autograd(root: Path, packing: bool) -> None:
    from transformers import AutoModelForCausalLM

    config = make_config(root, f"autograd-{packing}")
    config.train.train_iters, config.zero_experts.balance_coeff = 1, 0.0
    config.dataset.packing = packing
    assert train(config) == 0
    samples = samples_of(config, config.dataset.train)
    order = BatchOrder(len(samples), seed=config.dataset.seed)
    model = AutoModelForCausalLM.from_pretrained(root / "student_hf", trust_remote_code=True)
    total, count = torch.zeros(()), 0
    for sample in (samples[order[i]] for i in range(8)):
        tokens, predicts = torch.from_numpy(sample.tokens).long(), torch.from_numpy(sample.is_response[1:])
        log_p = torch.log_softmax(model(tokens[None, :-1]).logits[0][predicts], -1)
        total = total - log_p.gather(1, tokens[1:][predicts][:, None]).sum()
        count += int(predicts.sum())
    (total / count).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    [line] = metrics(config)
    assert line["ce"] == pytest.approx(total.item() / count, rel=1e-5)
    assert line["loss"] == line["ce"]
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_law_6_the_dial_is_exported(root: Path) -> None:
    config = make_config(root, "dial")
    config.train.train_iters, config.checkpoint.save_interval, config.checkpoint.export_hf = 2, 1, True
    config.zero_experts.logit_bias, config.teacher.checkpoint = -0.5, None
    assert train(config) == 0
    samples = samples_of(config, config.dataset.validation)
    ce, skipped = [], []
    logits, zeros = zero_selections(config.run_dir / "hf", [sample.tokens[:-1].tolist() for sample in samples])
    for sample, logits_SV, chosen in zip(samples, logits, zeros, strict=True):
        predicts = torch.from_numpy(sample.is_response[1:])
        labels = torch.from_numpy(sample.tokens[1:])[predicts].long()
        ce.append(-torch.log_softmax(logits_SV[predicts], -1).gather(1, labels[:, None])[:, 0])
        skipped.append(chosen[:, predicts].double() / 2)
    last = metrics(config)[-1]["validation"]
    assert last["skip_rate_per_layer"] == pytest.approx(torch.cat(skipped, dim=1).mean(1).tolist(), abs=1e-12)
    assert last["ce"] == pytest.approx(torch.cat(ce).mean().item(), rel=1e-5)

    # Turned elsewhere, or back to where the model had it, it is turned in the export too.
    for step, bias, exported in ((3, float("-inf"), float("-inf")), (4, None, 0.0)):
        config.zero_experts.logit_bias, config.train.train_iters = bias, step
        assert train(config) == 0
        assert load_hf_config(config.run_dir / "hf")["zeda_zero_logit_bias"] == exported


def test_held_out_numbers_equal_transformers(root: Path, whole: Config) -> None:
    config = make_config(root, "held-out")
    shutil.copytree(whole.run_dir, config.run_dir)
    last = metrics(config)[-1]["validation"]
    samples = samples_of(config, config.dataset.validation)
    rows = [sample.tokens[:-1].tolist() for sample in samples]
    student, zeros = zero_selections(whole.run_dir / "hf", rows)
    teacher, _ = zero_selections(root / "teacher_hf", rows)
    ce, kl, skipped = [], [], []
    for sample, logits_s, logits_t, chosen in zip(samples, student, teacher, zeros, strict=True):
        predicts = torch.from_numpy(sample.is_response[1:])
        log_s, log_t = torch.log_softmax(logits_s[predicts], -1), torch.log_softmax(logits_t[predicts], -1)
        labels = torch.from_numpy(sample.tokens[1:])[predicts].long()
        ce.append(-log_s.gather(1, labels[:, None])[:, 0])
        kl.append((log_t.exp() * (log_t - log_s)).sum(-1))
        skipped.append(chosen[:, predicts].double() / 2)
    assert last["tokens"] == sum(map(len, ce))
    assert last["ce"] == pytest.approx(torch.cat(ce).mean().item(), rel=1e-5)
    assert last["kl_forward"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-4, abs=1e-7)
    assert last["skip_rate_per_layer"] == pytest.approx(torch.cat(skipped, dim=1).mean(1).tolist(), abs=1e-12)


def test_evaluation_leaves_training_alone(root: Path, whole: Config) -> None:
    config = make_config(root, "no-evaluation")
    config.dataset.validation, config.teacher.checkpoint = [], None
    assert train(config) == 0
    keep = [key for key in KEYS if key not in ("kl_forward", "tokens_per_second")]
    assert [{k: line[k] for k in keep} for line in metrics(config)] == [
        {k: line[k] for k in keep} for line in metrics(whole)
    ]


# ---- law 8: the teacher ----------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_law_8_the_teacher_is_never_written(root: Path) -> None:
    before = digest(root / "teacher"), digest(root / "student")
    config = make_config(root, "law8")
    config.train.train_iters = 1
    train(config)
    assert (digest(root / "teacher"), digest(root / "student")) == before


def test_law_8_the_gate_refuses_a_student_of_another_teacher(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    from megatron_zeda.conversion import hf_to_megatron

    shutil.copytree(root / "teacher_hf", root / "other_hf")
    file = root / "other_hf" / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("layers.1.mlp.gate.weight"))
    weights[name][0] += 0.5
    save_file(weights, file, metadata={"format": "pt"})
    hf_to_megatron(root / "other_hf", root / "other")

    config = make_config(root, "gate")
    config.teacher.checkpoint = str(root / "other")
    with pytest.raises(ZedaError, match="with its zero experts masked the student is not the teacher: mean KL"):
        train(config)
    assert not list(config.run_dir.glob("checkpoints/iter_*"))
    config.teacher.checkpoint = str(root / "teacher")
    config.train.train_iters = 1
    train(config)
    assert "parity gate passed" in capsys.readouterr().out


def test_teachers_that_cannot_be(root: Path, tmp_path: Path) -> None:
    config = make_config(root, "wrong-teacher")
    config.teacher.checkpoint = str(root / "student")
    with pytest.raises(InputError, match="the teacher has zero experts"):
        train(config)
    shutil.copytree(root / "teacher", tmp_path / "small")
    shape = json.loads((tmp_path / "small" / "hf" / "config.json").read_text())
    (tmp_path / "small" / "hf" / "config.json").write_text(json.dumps(shape | {"vocab_size": 64}))
    config.teacher.checkpoint = str(tmp_path / "small")
    with pytest.raises(InputError, match="do not belong together: vocab_size"):
        train(config)


def test_the_run_says_what_the_teacher_leaves_in_memory(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(root, "memory")
    config.train.train_iters = 1
    assert train(config) == 0
    # Eleven sequences are two batches: one output layer, and the hidden states of all response tokens, in fp32.
    responses = sum(int(s.is_response[1:].sum()) for s in samples_of(config, config.dataset.validation))
    size = 4 * 32 * (96 + responses) / 2**20
    assert f"on the held-out batches (2) take {size:.3f} MiB on this rank" in capsys.readouterr().out


def test_without_a_teacher_the_run_says_so(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(root, "alone")
    config.teacher.checkpoint, config.train.train_iters = None, 1
    assert train(config) == 0
    assert "teacher: none (teacher.checkpoint is null): no parity gate" in capsys.readouterr().out
    assert metrics(config)[0]["kl_forward"] is None


# ---- the objective ---------------------------------------------------------------------------------------------------


def test_alpha_means_the_same_whatever_the_share_of_response_tokens(root: Path) -> None:
    norms = []
    for share in ("many", "few"):
        lines = []
        for sample in samples_of(make_config(root, share), [str(root / "train.jsonl")]):
            tokens = sample.tokens.tolist()
            cut = 1 if share == "many" else len(tokens) - 1  # same sequences, another part of them is response
            lines.append(json.dumps({"prompt_ids": tokens[:cut], "response_ids": tokens[cut:]}))
        (root / f"{share}.jsonl").write_text("\n".join(lines))
        config = make_config(root, f"alpha-{share}")
        config.dataset.train = [str(root / f"{share}.jsonl")]
        config.train.train_iters, config.distillation.cross_entropy = 1, 0.0  # the balancing loss alone
        train(config)
        norms.append(metrics(config)[0]["grad_norm"])
    assert norms[0] > 1e-3 and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_the_balancing_gradient_equals_autograd_of_the_equation(root: Path) -> None:
    """Alpha times equation 5, summed over layers, its mean over micro-batches: no constant factor may slip in."""
    from transformers import AutoModelForCausalLM

    config = make_config(root, "balance-autograd")
    config.train.train_iters, config.distillation.cross_entropy = 1, 0.0
    config.zero_experts.balance_coeff, config.teacher.checkpoint = 0.3, None
    assert train(config) == 0

    samples = samples_of(config, config.dataset.train)
    order = BatchOrder(len(samples), seed=config.dataset.seed)
    model = AutoModelForCausalLM.from_pretrained(root / "student_hf", trust_remote_code=True)
    real, zero, top_k = 8, 4, 2
    weight = 2.0  # of the zero group: half of the selections, E = 8 and Z = 4
    total = torch.zeros((), dtype=torch.float64)
    for start in (0, 4):  # micro-batches of four sequences
        router_logits: list[list[Tensor]] = [[], []]
        hooks = [
            layer.mlp.register_forward_pre_hook(
                lambda module, inputs, found=found: found.append(inputs[0].flatten(0, -2) @ module.gate.weight.t())
            )
            for layer, found in zip(model.model.layers, router_logits, strict=True)
        ]
        for index in range(start, start + 4):
            model(torch.from_numpy(samples[order[index]].tokens).long()[None, :-1])
        for hook in hooks:
            hook.remove()
        for found in router_logits:
            logits_TG = torch.cat(found).double()
            p_TG = torch.softmax(logits_TG, -1)
            p_E, p_Z = p_TG[:, :real].sum(-1).mean(), p_TG[:, real:].sum(-1).mean()
            f_Z = (logits_TG.topk(top_k, -1).indices >= real).double().sum(-1).mean()
            balance = (top_k - f_Z) * p_E / real + f_Z * p_Z / (weight * zero)
            total = total + 0.3 * (real + weight * zero) / top_k * balance / 2
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    [line] = metrics(config)
    assert norm > 1e-3 and line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert line["loss"] == pytest.approx(total.item(), rel=1e-5)


# ---- trouble ---------------------------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_counted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_zeda.training import step

    real, calls = step._masked_loss, iter(range(100))

    def sometimes_nan(*args: Any) -> Any:
        loss, tokens, logged = real(*args)
        return (loss * float("nan") if next(calls) == 2 else loss), tokens, logged  # first micro-batch of step 2

    monkeypatch.setattr(step, "_masked_loss", sometimes_nan)
    config = make_config(root, "nan")
    config.train.train_iters = 4
    assert train(config) == 0
    lines = metrics(config)
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
    assert lines[1]["grad_norm"] is None and lines[3]["grad_norm"] is not None
    assert lines[2]["lr"] == lines[1]["lr"]  # the schedule waited too


def test_a_run_that_stays_infinite_ends(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_zeda.training import step

    real = step._masked_loss

    def infinite(*args: Any) -> Any:
        loss, tokens, logged = real(*args)
        return loss * torch.inf, tokens, logged * torch.inf

    monkeypatch.setattr(step, "_masked_loss", infinite)
    config = make_config(root, "infinite")
    config.train.train_iters = 50
    with pytest.raises(ZedaError, match="step 10: 10 steps in a row changed nothing: 10 without a finite loss"):
        train(config)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_leaves_no_half_checkpoint(
    root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    from megatron.core import dist_checkpointing

    def full(state: Any, folder: str, **_: Any) -> None:
        (Path(folder) / "__0_0.distcp").write_bytes(b"half")
        if wrapped:  # what arrives from the writers' threads
            monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4096))
            raise CheckpointException("write", {0: (RuntimeError("Worker failure"), StackSummary())})
        raise OSError(errno.ENOSPC, "No space left on device")

    config = make_config(root, f"full-disk-{wrapped}")
    config.checkpoint.save_interval = 3
    shutil.copytree(whole.run_dir, config.run_dir)
    shutil.rmtree(config.save_dir / "iter_0000006")
    (config.save_dir / "latest_checkpointed_iteration.txt").write_text("3")
    monkeypatch.setattr(dist_checkpointing, "save", full)
    with pytest.raises(ZedaError, match="the disk is full"):
        train(config)
    assert sorted(path.name for path in config.save_dir.glob("*iter*")) == [
        "iter_0000003",
        "latest_checkpointed_iteration.txt",
    ]
    assert (config.save_dir / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert not list(config.save_dir.glob(".*"))


def test_only_the_last_checkpoints_are_kept(root: Path) -> None:
    config = make_config(root, "keep")
    config.checkpoint.save_interval, config.checkpoint.keep_last = 1, 2
    config.train.train_iters = 4
    train(config)
    assert [path.name for path in sorted(config.save_dir.glob("iter_*"))] == ["iter_0000003", "iter_0000004"]


@pytest.mark.parametrize("keep_last", [None, 1])
def test_stale_newer_checkpoints_give_way_to_the_one_just_written(
    root: Path, whole: Config, keep_last: int | None
) -> None:
    config = make_config(root, f"stale-{keep_last}")
    config.checkpoint.save_interval, config.checkpoint.keep_last, config.train.train_iters = 3, keep_last, 4
    shutil.copytree(whole.run_dir, config.run_dir)
    # Killed after the rename of step 6's folder and before the tracker named it.
    (config.save_dir / "latest_checkpointed_iteration.txt").write_text("3")
    assert train(config) == 0
    kept = ["iter_0000004"] if keep_last else ["iter_0000003", "iter_0000004"]
    assert sorted(path.name for path in config.save_dir.glob("iter_*")) == kept
    assert (config.save_dir / "latest_checkpointed_iteration.txt").read_text() == "4\n"
    config.train.train_iters = 5
    assert train(config) == 0


def test_a_new_run_does_not_destroy_another_one(root: Path) -> None:
    config = make_config(root, "taken")
    config.run_dir.mkdir()
    (config.run_dir / "prompts").mkdir()  # other files are no obstacle, nor are metrics without a line
    (config.run_dir / "metrics.jsonl").touch()
    config.train.train_iters, config.teacher.checkpoint = 1, None
    assert train(config) == 0
    shutil.rmtree(config.save_dir)
    (config.run_dir / "config.yaml").write_text("precious")
    before = digest(config.run_dir)
    with pytest.raises(InputError, match=r"metrics\.jsonl: the metrics of a run, but no checkpoint .*; choose another"):
        train(config)
    assert digest(config.run_dir) == before


def test_a_run_killed_before_its_first_checkpoint_begins_anew(root: Path) -> None:
    config = make_config(root, "killed-early")
    config.train.train_iters, config.teacher.checkpoint = 2, None
    assert train(config) == 0
    expected = [line["ce"] for line in metrics(config)]
    shutil.rmtree(config.save_dir)
    assert train(config) == 0
    assert [line["ce"] for line in metrics(config)] == expected and len(expected) == 2


def test_settings_that_change_the_samples_are_named_on_resuming(
    root: Path, whole: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(root, "other-data")
    shutil.copytree(whole.run_dir, config.run_dir)
    config.train.train_iters, config.teacher.checkpoint = 7, None
    assert train(config) == 0
    assert "warning" not in capsys.readouterr().out
    config.train.train_iters, config.dataset.seed, config.train.global_batch_size = 8, 77, 4
    config.dataset.train = [str(root / "validation.jsonl")]
    shutil.copytree(root / "student", root / "student-copy")
    config.model.checkpoint = str(root / "student-copy")
    assert train(config) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == [
        "dataset.train", "dataset.seed", "train.global_batch_size", "model.checkpoint",
    ]  # fmt: skip
    assert f"was {whole.dataset.seed} when the checkpoint was written and is 77 now" in warnings[1]


def test_foreign_lines_among_the_metrics_are_named(root: Path, whole: Config) -> None:
    config = make_config(root, "foreign-metrics")
    shutil.copytree(whole.run_dir, config.run_dir)
    (config.run_dir / "metrics.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: a line without a step"):
        train(config)


def test_without_a_terminal_every_interval_has_a_line(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(root, "lines")
    config.train.train_iters, config.logger.log_interval, config.teacher.checkpoint = 5, 2, None
    assert train(config) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"step \d+/5: ", line)]
    assert [line.split(":")[0] for line in lines] == ["step 2/5", "step 4/5"]
    step = metrics(config)[3]
    assert lines[1].startswith(
        f"step 4/5: loss {step['loss']:.4f}, ce {step['ce']:.4f}, skip rate {100 * step['skip_rate']:.1f} %, "
        f"balance {step['balance_loss']:.4f}, grad norm {step['grad_norm']:.4g}, lr {step['lr']:.3g}, "
    )
    assert re.search(r", [\d,]+ tokens/s$", lines[1])


def test_the_export_needs_no_process_group(root: Path, whole: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state

    from megatron_zeda import conversion

    real = conversion.megatron_to_hf
    config = make_config(root, "export")
    config.checkpoint.export_hf, config.teacher.checkpoint = True, None
    shutil.copytree(whole.run_dir, config.run_dir)
    (config.run_dir / ".hf.new" / "hf").mkdir(parents=True)  # an export was killed
    (config.run_dir / "hf" / "config.json").unlink()

    def export(megatron: Path, hf: Path) -> Any:
        assert not parallel_state.model_parallel_is_initialized()
        return real(megatron, hf)

    monkeypatch.setattr(conversion, "megatron_to_hf", export)
    assert train(config) == 0
    assert (config.run_dir / "hf" / "config.json").is_file()

    def fail(megatron: Path, hf: Path) -> Any:
        hf.mkdir()
        raise ZedaError("broken")

    monkeypatch.setattr(conversion, "megatron_to_hf", fail)
    with pytest.raises(ZedaError, match="broken"):
        train(config)
    assert (config.run_dir / "hf" / "config.json").is_file() and not list(config.run_dir.glob(".*"))


@pytest.mark.parametrize(
    ("kind", "wrapped"),  # a RuntimeError within the reader is about the checkpoint
    [
        (torch.OutOfMemoryError, False),
        (torch.OutOfMemoryError, True),
        (torch.distributed.DistBackendError, False),
        (torch.distributed.DistBackendError, True),
        (RuntimeError, False),
    ],
)
def test_trouble_of_the_machine_is_not_blamed_on_the_checkpoint(
    root: Path, monkeypatch: pytest.MonkeyPatch, kind: type[RuntimeError], wrapped: bool
) -> None:
    from megatron.core import dist_checkpointing

    error = kind("CUDA out of memory")

    def load(*_: Any, **__: Any) -> Any:
        raise CheckpointException("read", {0: (error, StackSummary())}) if wrapped else error

    monkeypatch.setattr(dist_checkpointing, "load", load)
    config = make_config(root, f"machine-{kind.__name__}-{wrapped}")
    with pytest.raises(kind, match="CUDA out of memory") as caught:
        train(config)
    assert caught.value is error


def test_bad_checkpoints(root: Path, whole: Config, tmp_path: Path) -> None:
    config = make_config(root, "bad-checkpoint")
    config.checkpoint.load = str(tmp_path)
    with pytest.raises(InputError, match=r"checkpoint\.load: no latest_checkpointed_iteration\.txt"):
        train(config)
    config.checkpoint.load = str(root / "student")
    with pytest.raises(InputError, match="weights and no training state"):
        train(config)
    config.checkpoint.load = None

    config.model.checkpoint = str(root / "teacher")
    with pytest.raises(InputError, match="a static model without zero experts"):
        train(config)

    shutil.copytree(root / "student", tmp_path / "truncated")
    [file, *_] = newest_iteration(tmp_path / "truncated").glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    config.model.checkpoint = str(tmp_path / "truncated")
    with pytest.raises(ZedaError, match="truncated"):
        train(config)

    shutil.copytree(root / "student", tmp_path / "wide")
    shape = json.loads((tmp_path / "wide" / "hf" / "config.json").read_text())
    (tmp_path / "wide" / "hf" / "config.json").write_text(json.dumps(shape | {"moe_intermediate_size": 24}))
    config.model.checkpoint, config.teacher.checkpoint = str(tmp_path / "wide"), None
    with pytest.raises(ZedaError, match="the checkpoint cannot be loaded into this model"):
        train(config)


class Malicious:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_a_malicious_pickle_is_not_loaded(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "student", tmp_path / "evil")
    (newest_iteration(tmp_path / "evil") / ".metadata").write_bytes(pickle.dumps(Malicious(tmp_path / "mark")))
    config = make_config(root, "evil")
    config.model.checkpoint = str(tmp_path / "evil")
    with pytest.raises(ZedaError):
        train(config)
    assert not (tmp_path / "mark").exists()


def test_training_goes_on_in_another_folder(root: Path, whole: Config) -> None:
    config = make_config(root, "longer")
    config.checkpoint.load = str(whole.save_dir)
    config.train.train_iters = 8
    assert train(config) == 0
    assert [line["step"] for line in metrics(config)] == [7, 8]
    assert dataclasses.asdict(config)["checkpoint"]["load"] == str(whole.save_dir)
