"""Whole runs with the other methods: what is trained, what the exports compute, that a resumed run is the whole one."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import make_config, make_run

from megatron_zeda.config import Config
from megatron_zeda.conversion import megatron_to_hf
from megatron_zeda.data import load_samples
from megatron_zeda.errors import InputError
from megatron_zeda.evaluation.scoring import score_rollouts
from megatron_zeda.rollout.files import Rollout
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.training import loop, train
from megatron_zeda.zero_experts import controlled_weight

pytestmark = pytest.mark.slow  # whole training runs: `make test`, not `make check`

STATIC = ("net", "dynamic_skipping")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("methods")
    make_run(folder, num_experts_per_tok=4)
    return folder


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]


def config_for(root: Path, method: Any, name: str = "") -> Config:
    config = make_config(root, name or method)
    config.zero_experts.method = method
    config.train.train_iters, config.checkpoint.export_hf = 3, True
    if method in STATIC:
        config.model.checkpoint = str(root / "teacher")
    if method == "dynamic_skipping":
        config.zero_experts.target_skip_rate = 0.4
    return config


def rollouts(path: Path) -> list[Rollout]:
    """The conversations of a file, as an evaluation reads them."""
    made = []
    for sample in load_samples(path, seq_length=64, vocab_size=96, tokenizer=None):
        ids, first = sample.tokens.tolist(), int(sample.is_response.argmax())
        made.append(Rollout(0, [], ids[:first], ids[first:], None, "stop", {}, "", ""))
    return made


@pytest.mark.parametrize("method", ["net", "adamoe", "copy", "dynamic_skipping"])
def test_what_a_method_trains_is_what_its_export_computes(root: Path, method: str) -> None:
    """Law 6, and law 5 of the cross entropy: Megatron's held-out numbers are those of transformers with the export."""
    config = config_for(root, method)
    assert train(config) == 0
    exported = load_model(config.run_dir / "hf", device=torch.device("cpu"), trust_remote_code=method != "net")
    teacher = load_model(root / "teacher_hf", device=torch.device("cpu"))
    found = score_rollouts(exported, rollouts(root / "validation.jsonl"), teacher=teacher)
    keys = json.loads((config.run_dir / "hf/config.json").read_text())
    assert keys["num_experts_per_tok"] == (2 if method == "net" else 4)
    if method == "dynamic_skipping":
        calibration = json.loads((config.run_dir / "calibration.json").read_text())
        assert keys["zeda_dynamic_skipping_beta"] == calibration["beta"]
        assert calibration["skip_rate"] == pytest.approx(0.4, abs=0.01)
        assert 0.25 < found.skip_rate < 0.55  # on other tokens
        first = rollouts(root / "train.jsonl")[: 3 * 8]  # three global batches, every token that is read, both layers
        read = [(len(sample.prompt_ids), len(sample.response_ids)) for sample in first]
        assert calibration["tokens"] == sum(prompt + response - 1 for prompt, response in read)
        config.zero_experts.balance_tokens, config.checkpoint.export_hf = "response", False
        config.logger.run_dir = str(root / "skipping-responses")
        assert train(config) == 0
        again = json.loads((config.run_dir / "calibration.json").read_text())
        assert again["tokens"] == sum(response for _, response in read) and again["beta"] != calibration["beta"]
        return
    outcome = metrics(config)[-1]["validation"]
    assert found.kl_to_teacher == pytest.approx(outcome["kl_forward"], rel=1e-4)
    assert found.kl_to_teacher is not None and found.kl_to_teacher > 1e-3
    if method == "net":
        assert outcome["skip_rate"] is None and found.skip_rate == 0
        assert keys["zeda_teacher_num_experts_per_tok"] == 4 and "auto_map" not in keys
    else:
        assert found.skip_rate_per_layer == pytest.approx(outcome["skip_rate_per_layer"], abs=1e-9)
        assert found.skip_rate > 0.05


def test_net_halves_k_once(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run, from the first one's checkpoints, has the same K, with and without the teacher's config.json."""
    first = config_for(root, "net", "net-first")
    first.train.train_iters, first.checkpoint.export_hf = 1, False
    assert train(first) == 0
    for name, hf in (("net-second", None), ("net-third", str(root / "teacher_hf"))):
        second = config_for(root, "net", name)
        second.model.hf, second.model.checkpoint = hf, str(first.save_dir)
        second.teacher.checkpoint, second.train.train_iters, second.checkpoint.export_hf = None, 1, False
        capsys.readouterr()
        assert train(second) == 0
        assert "NET: 2 of the teacher's 4 experts a token" in capsys.readouterr().out
    other = config_for(root, "adamoe", "net-first")  # a run does not go on with another method
    with pytest.raises(InputError, match="method `net`"):
        train(other)
    with pytest.raises(InputError, match="method `net`"):
        wrong = config_for(root, "zeda", "net-wrong")
        wrong.model.checkpoint = str(first.save_dir)
        train(wrong)


def test_the_controller_moves_w_and_survives_a_kill(root: Path) -> None:
    """Law 7: w is part of a checkpoint; every step's w follows from the one before by the controller's equation."""
    config = config_for(root, "zeda", "controlled")
    config.zero_experts.skip_rate_gain, config.zero_experts.target_skip_rate = 2.0, 0.6
    config.train.train_iters, config.checkpoint.save_interval, config.checkpoint.export_hf = 4, 2, False
    config.scheduler.lr_decay_iters = 4
    assert train(config) == 0
    lines = metrics(config)
    initial = lines[0]["zero_expert_weight"]
    assert initial == pytest.approx(0.6 * 8 / (4 * 0.4))
    for one, after in itertools.pairwise(lines):
        expected = controlled_weight(
            one["zero_expert_weight"], initial=initial, target=0.6, measured=one["skip_rate"], gain=2.0
        )
        assert after["zero_expert_weight"] == pytest.approx(expected, rel=1e-12)
    assert lines[-1]["zero_expert_weight"] != pytest.approx(initial, rel=1e-3)

    killed = config_for(root, "zeda", "controlled-killed")
    killed.zero_experts, killed.train, killed.checkpoint = config.zero_experts, config.train, config.checkpoint
    killed.scheduler = config.scheduler
    shutil.copytree(config.run_dir, killed.run_dir)
    shutil.rmtree(killed.save_dir / "iter_0000004")
    (killed.save_dir / "latest_checkpointed_iteration.txt").write_text("2")
    assert train(killed) == 0
    keys = ("loss", "skip_rate", "zero_expert_weight", "grad_norm")
    assert [[line[key] for key in keys] for line in metrics(killed)] == [[line[key] for key in keys] for line in lines]


def test_a_step_that_changes_nothing_does_not_move_w(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = loop.train_step, itertools.count(1)

    def second_one_is_broken(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        return replace(result, updated=False) if next(calls) == 2 else result

    monkeypatch.setattr(loop, "train_step", second_one_is_broken)
    config = config_for(root, "zeda", "controlled-broken")
    config.zero_experts.skip_rate_gain, config.zero_experts.target_skip_rate = 2.0, 0.6
    config.checkpoint.export_hf, config.dataset.validation, config.teacher.checkpoint = False, [], None
    assert train(config) == 0
    first, second, third = (line["zero_expert_weight"] for line in metrics(config))
    assert first != second == third


def test_only_routers_are_trained(root: Path) -> None:
    """With recomputation, where a frozen embedding would cut off every gradient."""
    config = config_for(root, "zeda", "routers")
    config.train.trainable, config.checkpoint.export_hf = "router", False
    config.model.recompute_granularity, config.model.recompute_method = "full", "uniform"
    config.model.recompute_num_layers = 1
    assert train(config) == 0
    megatron_to_hf(config.save_dir, root / "routers_hf")
    before, after = (
        load_model(root / name, device=torch.device("cpu")).state_dict() for name in ("student_hf", "routers_hf")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith("mlp.gate.weight")}


def test_balancing_response_tokens_counts_what_validation_counts(root: Path) -> None:
    """On the same tokens: the training skip rate of the first step is that of an evaluation of the start."""
    config = config_for(root, "zeda", "response")
    config.zero_experts.balance_tokens, config.checkpoint.export_hf = "response", False
    config.train.train_iters, config.dataset.validation = 1, []
    config.train.global_batch_size = 40  # all samples, in whatever order
    assert train(config) == 0
    model = load_model(root / "student_hf", device=torch.device("cpu"))
    found = score_rollouts(model, rollouts(root / "train.jsonl"))
    assert metrics(config)[0]["skip_rate_per_layer"] == pytest.approx(found.skip_rate_per_layer, abs=1e-9)
    assert found.skip_rate != pytest.approx(found.skip_rate_prompt, abs=1e-3)
