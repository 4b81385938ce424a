"""The ``zeda`` command: exit codes, what is printed where, and what is not imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_zeda import cli, platform
from megatron_zeda.config import Config
from megatron_zeda.config_io import load_config
from megatron_zeda.errors import InputError, ZedaError

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples/qwen3_30b_a3b/stage1.yaml")
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration whose inputs all exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "start").mkdir()
    (tmp_path / "start/latest_checkpointed_iteration.txt").write_text("0")
    (tmp_path / "a b.jsonl").write_text("")
    (tmp_path / "start/hf").mkdir()
    shutil.copy(ROOT / "examples/qwen3_30b_a3b/config.json", tmp_path / "start/hf")
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {checkpoint: start}\ndataset: {train: a b.jsonl}\ntrain: {train_iters: 3}\nlogger: {run_dir: run}\n"
    )
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that training was started with, instead of training."""
    calls: list[Config] = []

    def train(config: Config) -> int:
        calls.append(config)
        return 0

    monkeypatch.setitem(sys.modules, "megatron_zeda.training", SimpleNamespace(train=train))  # type: ignore[arg-type]
    return calls


class TestCheck:
    @pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.parent.name + "/" + path.name)
    def test_every_example_passes(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", str(path)]) == 0, capsys.readouterr().err

    def test_the_full_size_example_on_eight_processes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)  # from anywhere
        assert cli.main(["check", EXAMPLE, "--world-size", "8"]) == 0
        out = capsys.readouterr().out
        facts = dict(line[4:].split(": ") for line in out.splitlines() if line.startswith("#   "))
        assert facts["data_parallel_size"] == "2" and facts["tokens_per_pack"] == "32768"
        assert facts["target_skip_rate"] == "0.5" and facts["num_zero_experts"] == "64"
        assert "does not exist: to be provided before training" in out
        # In one bucket, each save would hold another copy of all expert states in host memory.
        assert load_config(EXAMPLE, world_size=8).ddp.overlap_grad_reduce
        # What is printed is the whole configuration again.
        (tmp_path / "resolved.yaml").write_text(out)
        assert load_config(tmp_path / "resolved.yaml", world_size=8) == load_config(EXAMPLE, world_size=8)

    def test_json(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert (
            cli.main(
                ["check", str(ready), "--json", "--world-size", "4", "optimizer.lr=1e-3", "teacher.checkpoint=gone"]
            )
            == 0
        )
        printed = json.loads(capsys.readouterr().out)
        assert printed["config"]["optimizer"]["lr"] == 1e-3
        assert printed["derived"]["data_parallel_size"] == 4
        assert printed["notes"] == ["teacher.checkpoint: gone does not exist: to be provided before training"]

    def test_problems_go_to_stderr_one_a_line(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", str(ready), "model.seq_lenght=3", "logger.wandb_project=p"]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        first, second = captured.err.splitlines()
        assert first.startswith("error: model.seq_lenght: ") and "did you mean seq_length?" in first
        assert second.startswith("error: logger.wandb_project: ")

    def test_problems_as_json(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", str(ready), "--json", "logger.wandb_project=p"]) == 2
        assert len(json.loads(capsys.readouterr().out)["problems"]) == 1

    def test_impossible_world_size(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", EXAMPLE, "--world-size", "12"]) == 2
        assert "does not divide the world size 12" in capsys.readouterr().err

    def test_overrides_may_stand_anywhere(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            "check",
            "--world-size",
            "2",
            str(ready),
            "train.seed=1",
            "--json",
            "--train.seed=2",
            "train.seed=3",
        ]
        assert cli.main(arguments) == 0
        assert json.loads(capsys.readouterr().out)["config"]["train"]["seed"] == 3

    def test_files_can_be_required(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", str(ready), "dataset.train=no.jsonl"]) == 0
        assert cli.main(["check", str(ready), "--require-files", "dataset.train=no.jsonl"]) == 2
        assert "error: dataset.train: no.jsonl does not exist" in capsys.readouterr().err

    def test_a_wrong_kind_of_file_is_always_a_problem(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", str(ready), "dataset.train=start"]) == 2
        assert "start is a folder" in capsys.readouterr().err

    def test_refusals_do_not_wait_for_the_model(self, ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = [
            "check",
            str(ready),
            "model.checkpoint=not_yet",
            "model.overrides.moe_router_num_groups=4",
            "model.overrides.moe_aux_loss_coeff=0.1",
            "model.overrides.mtp_num_layers=1",
            "model.overrides.moe_router_topk=8",  # more than Megatron-Core's default model has experts
            "model.overrides.nonsense=1",
        ]
        assert cli.main(arguments) == 2
        keys = [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()]
        names = ("moe_router_num_groups", "moe_aux_loss_coeff", "mtp_num_layers", "nonsense")
        assert sorted(keys) == sorted(f"model.overrides.{name}" for name in names)
        assert cli.main([*arguments[:3], "model.overrides.moe_z_loss_coeff=1e-3"]) == 0
        assert "not checked" in capsys.readouterr().out

    def test_all_refusals_are_named_at_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What zero experts refuse, unknown fields, and what the trainer decides, each under its own key."""
        overrides = {
            "moe_router_num_groups": "4",
            "moe_router_load_balancing_type": "sinkhorn",
            "transformer_impl": "inference_optimized",  # judged although this machine has no such layers
            "moe_z_los_coeff": "1",
            "fp8_param": "true",
            "moe_router_topk": "2",
        }
        arguments = [f"model.overrides.{name}={value}" for name, value in overrides.items()]
        assert cli.main(["check", EXAMPLE, *arguments]) == 2
        lines = {line.split(": ")[1]: line for line in capsys.readouterr().err.splitlines()}
        assert lines.keys() == {f"model.overrides.{name}" for name in overrides}
        for name, text in {
            "moe_router_num_groups": "real and zero experts",
            "moe_router_load_balancing_type": "sinkhorn",
            "transformer_impl": "K columns",
            "moe_z_los_coeff": "did you mean `moe_z_loss_coeff`?",
            "fp8_param": "FP8 is compute only",
            "moe_router_topk": "the checkpoint decides it",
        }.items():
            line = lines[f"model.overrides.{name}"]
            assert text in line and f"(override model.overrides.{name}={overrides[name]})" in line

    def test_megatron_core_judges_what_is_left(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["check", EXAMPLE, "model.overrides.cpu_offloading=true"]) == 2
        assert "Megatron-Core refuses this configuration" in capsys.readouterr().err

    def test_settings_for_gpus_are_right_on_a_machine_without(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Megatron-Core refuses each of them without the grouped GEMM, FP8 or a version of Transformer Engine."""
        monkeypatch.setattr(platform, "have_transformer_engine", lambda: False)
        arguments = [
            "check",
            EXAMPLE,
            "--json",
            "model.recompute_granularity=selective",
            "model.recompute_method=null",
            "model.recompute_num_layers=null",
            "model.recompute_modules=[moe_act]",
            "model.fp8=hybrid",
            "model.fp8_recipe=mxfp8",
            "model.overrides.fp8_output_proj=true",
            "model.overrides.symmetric_ar_type=two_shot",
        ]
        assert cli.main(arguments) == 0, capsys.readouterr().err
        notes = "\n".join(json.loads(capsys.readouterr().out)["notes"])
        for key in ("recompute_modules: moe_act", "overrides.fp8_output_proj", "overrides.symmetric_ar_type"):
            assert f"model.{key}" in notes
        # Where Transformer Engine is, the grouped GEMM is on without being asked for. What is wrong on every machine
        # stays wrong.
        assert cli.main([*arguments, "model.overrides.moe_grouped_gemm=false"]) == 2
        assert "moe_grouped_gemm" in capsys.readouterr().err

    def test_a_bad_configuration_is_answered_without_torch(self, ready: Path) -> None:
        program = (
            "import sys; from megatron_zeda.cli import main; code = main(sys.argv[1:]); "
            "assert not {'torch', 'megatron', 'transformers'} & set(sys.modules); sys.exit(code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, "check", str(ready), "train.stage=2", "model.checkpoint=not_yet"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr

    @pytest.mark.parametrize("module", ["megatron_zeda", "megatron_zeda.cli"])
    def test_as_a_module(self, module: str, tmp_path: Path) -> None:
        command = [sys.executable, "-m", module, "check", str(tmp_path / "no.yaml")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == f"error: {tmp_path}/no.yaml: the configuration file does not exist\n"


class TestTrain:
    def test_starts_training_with_the_merged_configuration(self, ready: Path, trained: list[Config]) -> None:
        assert cli.main(["train", str(ready), "optimizer.lr=1e-3", "--model.bf16=false"]) == 0
        assert trained[0].optimizer.lr == 1e-3 and trained[0].model.bf16 is False

    def test_missing_files_stop_it(
        self, ready: Path, trained: list[Config], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["train", str(ready), "dataset.train=no.jsonl", "model.checkpoint=gone"]) == 2
        assert capsys.readouterr().err.splitlines() == [
            "error: model.checkpoint: gone does not exist",
            "error: dataset.train: no.jsonl does not exist",
        ]
        assert trained == []

    def test_what_this_machine_cannot_do_is_an_error_here_and_a_note_of_check(
        self, ready: Path, trained: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(platform, "have_transformer_engine", lambda: False)
        monkeypatch.setattr(platform, "device", lambda: torch.device("cpu"))
        forced = {"moe_permute_fusion": False, "moe_grouped_gemm": False}
        monkeypatch.setattr(platform, "transformer_config_overrides", lambda: forced)
        overrides = [
            "model.moe_permute_fusion=true",
            "model.overrides.moe_grouped_gemm=true",
            "optimizer.use_precision_aware_optimizer=true",
        ]
        wanted = [
            "model.moe_permute_fusion",
            "model.overrides.moe_grouped_gemm",
            "optimizer.use_precision_aware_optimizer",
        ]
        # With Adam states in host memory torch's AdamW computes, which is everywhere.
        for offload, keys in (("false", wanted), ("true", wanted[:2])):
            arguments = [str(ready), *overrides, f"optimizer.optimizer_cpu_offload={offload}"]
            assert cli.main(["train", *arguments]) == 2
            found = capsys.readouterr().err.splitlines()
            assert [line.split(": ")[1] for line in found] == keys
            assert cli.main(["check", *arguments, "--json"]) == 0
            notes = json.loads(capsys.readouterr().out)["notes"]
            assert [line.split(": ")[0] for line in notes] == keys
        assert trained == []

    def test_the_world_size_comes_from_srun(
        self, ready: Path, trained: list[Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        variables = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_JOB_ID": "7"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "")  # so that what the command sets is undone
            monkeypatch.delenv(name)
        assert cli.main(["train", str(ready)]) == 2
        err = capsys.readouterr().err
        assert (
            err.startswith("[rank 0] error: train.global_batch_size: 128 is not a multiple of") and "size 3 = 3" in err
        )
        assert cli.main(["train", str(ready), "train.global_batch_size=9"]) == 0

    def test_only_rank_0_complains_about_the_configuration(
        self, ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cli.main(["train", str(ready), "train.stage=2"]) == 2
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("error", "code", "message"),
        [
            (ZedaError("the loss is not finite", where="step 3"), 1, "error: step 3: the loss is not finite\n"),
            (InputError("line 4 is not JSON", where="a.jsonl"), 2, "error: a.jsonl: line 4 is not JSON\n"),
            (KeyboardInterrupt(), 130, "interrupted\n"),
        ],
    )
    def test_exit_codes(
        self,
        ready: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        error: BaseException,
        code: int,
        message: str,
    ) -> None:
        def train(config: Config) -> int:
            raise error

        monkeypatch.setitem(sys.modules, "megatron_zeda.training", SimpleNamespace(train=train))  # type: ignore[arg-type]
        assert cli.main(["train", str(ready)]) == code
        assert capsys.readouterr().err == message

    @pytest.mark.parametrize(
        ("rank", "said", "printed"),
        [
            (0, None, "[rank 0] error: a.jsonl: line 4 is not JSON\n"),
            (1, "a.jsonl: line 4 is not JSON", ""),
            (1, "b.jsonl: no such file", "[rank 1] error: a.jsonl: line 4 is not JSON\n"),
            (1, None, "[rank 1] error: a.jsonl: line 4 is not JSON\n"),
        ],
    )
    def test_an_input_error_of_all_ranks_is_said_once(
        self,
        ready: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        rank: int,
        said: str | None,
        printed: str,
    ) -> None:
        def train(config: Config) -> int:
            raise InputError("line 4 is not JSON", where="a.jsonl")

        store = torch.distributed.HashStore()
        if said is not None:
            store.set(cli._ERROR_KEY, said)
        monkeypatch.setitem(sys.modules, "megatron_zeda.training", SimpleNamespace(train=train))  # type: ignore[arg-type]
        monkeypatch.setattr(cli, "_store_of_ranks", lambda ranks: store)
        monkeypatch.setattr(cli, "_PATIENCE", timedelta(seconds=0.1))
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cli.main(["train", str(ready)]) == 2
        assert capsys.readouterr().err == printed
        if rank == 0:
            assert store.get(cli._ERROR_KEY).decode() == "a.jsonl: line 4 is not JSON"


class TestOtherCommands:
    @pytest.mark.parametrize("command", ["rollout", "eval", "report"])
    def test_they_bring_their_own_flags(
        self, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        room = ModuleType("room")
        seen: list[Any] = []
        room.add_arguments = lambda parser: parser.add_argument("--flag", type=int)  # type: ignore[attr-defined]
        room.run = lambda args: seen.append(args.flag) or 1  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, cli.DELEGATED[command][0], room)
        assert cli.main([command, "--flag", "3"]) == 1
        assert seen == [3]
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--flag", "3", "model.hf=x"])
        assert caught.value.code == 2

    @pytest.mark.parametrize("command", ["rollout", "eval", "report"])
    def test_they_exist(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main([command, "--help"])
        assert caught.value.code == 0 and f"usage: zeda {command}" in capsys.readouterr().out

    @pytest.mark.parametrize("arguments", [[], ["nothing"], ["check"], ["check", "x.yaml", "--unknown"]])
    def test_wrong_usage_is_exit_2(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2 and "zeda" in capsys.readouterr().err

    def test_help_and_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        for flag in ("--help", "--version"):
            with pytest.raises(SystemExit) as caught:
                cli.main([flag])
            assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(command in printed for command in ("check", "train", "rollout", "eval", "report"))
