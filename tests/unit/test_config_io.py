"""Reading configurations: precedence, inheritance, overrides, and every kind of wrong input at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_zeda.config import Config
from megatron_zeda.config_io import ConfigErrors, load_config, missing_inputs, to_yaml

MINIMAL = """
model: {checkpoint: somewhere}
dataset: {train: a.jsonl}
train: {train_iters: 10}
logger: {run_dir: run}
"""


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(path: Path, *overrides: str, world_size: int | None = None) -> list[str]:
    """The lines of the error that loading raises."""
    with pytest.raises(ConfigErrors) as caught:
        load_config(path, overrides, world_size=world_size)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only_problem(path: Path, *overrides: str, world_size: int | None = None) -> str:
    found = problems(path, *overrides, world_size=world_size)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path, MINIMAL)


class TestValues:
    def test_defaults_stay_where_nothing_is_said(self, minimal: Path) -> None:
        config = load_config(minimal)
        assert config.optimizer == Config().optimizer
        assert config.dataset.train == ["a.jsonl"]
        assert config.train.train_iters == 10

    def test_defaults_are_the_papers(self) -> None:
        config = Config()
        optimizer, zero = config.optimizer, config.zero_experts
        assert (optimizer.lr, optimizer.min_lr, optimizer.weight_decay) == (2e-5, 0.0, 0.1)
        assert (optimizer.adam_beta1, optimizer.adam_beta2) == (0.9, 0.98)
        assert (config.scheduler.lr_decay_style, config.scheduler.lr_warmup_fraction) == ("cosine", 0.1)
        assert (zero.weight, zero.balance_coeff, config.train.global_batch_size) == (2.0, 0.1, 128)
        assert config.model.moe_router_dtype == "fp32"

    def test_precedence_is_defaults_base_file_overrides(self, tmp_path: Path) -> None:
        (tmp_path / "deeper").mkdir()
        write(tmp_path, MINIMAL + "optimizer: {lr: 1.0e-3, weight_decay: 0.3, adam_beta2: 0.5}", "base.yaml")
        path = write(tmp_path / "deeper", "base: ../base.yaml\noptimizer: {lr: 2.0e-3, weight_decay: 0.4}\n")
        config = load_config(path, ["optimizer.lr=3e-3"])
        assert config.optimizer.lr == 3e-3  # the override
        assert config.optimizer.weight_decay == 0.4  # the file
        assert config.optimizer.adam_beta2 == 0.5  # its base
        assert config.optimizer.adam_beta1 == 0.9  # the default

    def test_the_last_override_wins(self, minimal: Path) -> None:
        assert load_config(minimal, ["train.seed=1", "train.seed=2"]).train.seed == 2

    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("optimizer.lr=1e-5", 1e-5),  # YAML 1.1 would make it a string
            ("--optimizer.lr=1e-5", 1e-5),
            ("optimizer.min_lr=0", 0.0),
            ("zero_experts.logit_bias=-.inf", float("-inf")),
            ("model.bf16=false", False),
            ("checkpoint.keep_last=null", None),
            ("dataset.train=[x.jsonl, y.jsonl]", ["x.jsonl", "y.jsonl"]),
            ("dataset.train=one.jsonl", ["one.jsonl"]),
            ("logger.run_dir=/a=b,c (1)/[x", "/a=b,c (1)/[x"),
            ("logger.run_dir='*/x'", "*/x"),
            ("model.overrides={moe_z_loss_coeff: 1.0}", {"moe_z_loss_coeff": 1.0}),
            ("model.overrides.moe_per_layer_logging=true", {"moe_per_layer_logging": True}),
        ],
    )
    def test_overrides_are_yaml_values(self, minimal: Path, override: str, value: object) -> None:
        config = load_config(minimal, [override])
        section, name = override.removeprefix("--").partition("=")[0].split(".")[:2]
        got = getattr(getattr(config, section), name)
        assert got == value and type(got) is type(value)

    def test_interpolation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WHERE", "/big")
        path = write(tmp_path, MINIMAL + "checkpoint: {save: '${oc.env:WHERE}/${logger.run_dir}'}")
        assert load_config(path, ["logger.run_dir=r1"]).checkpoint.save == "/big/r1"

    def test_a_base_can_leave_a_value_to_be_given(self, tmp_path: Path) -> None:
        write(tmp_path, MINIMAL + "checkpoint:\n  save: ???\n", "base.yaml")
        path = write(tmp_path, "base: base.yaml")
        line = only_problem(path)
        assert line == f"checkpoint.save: a value must be given here ({tmp_path / 'base.yaml'}:7)"
        assert load_config(path, ["checkpoint.save=here"]).checkpoint.save == "here"

    def test_an_empty_section_is_no_change(self, tmp_path: Path) -> None:
        assert load_config(write(tmp_path, MINIMAL + "optimizer:\n")).optimizer == Config().optimizer

    def test_yaml_round_trip(self, minimal: Path, tmp_path: Path) -> None:
        overrides = [
            "zero_experts.logit_bias=-.inf",
            "model.overrides={offload_modules: [1, x]}",
            "logger.run_dir='1e-5'",
        ]
        config = load_config(minimal, overrides)
        again = load_config(write(tmp_path, to_yaml(config), "again.yaml"))
        assert again == config
        assert to_yaml(again) == to_yaml(config)


class TestWrongInput:
    def test_all_problems_at_once_each_with_its_origin(self, tmp_path: Path) -> None:
        path = write(
            tmp_path,
            "model:\n"
            "  checkpoint: x\n"
            "  seq_lenght: 3\n"
            "  recompute_granularity: ful\n"
            "train:\n"
            "  train_iters: 1.5\n"
            "  global_batch_size: abc\n"
            "modle: {}\n"
            "dataset: {train: a.jsonl, num_workers: 2}\n"
            "logger: {run_dir: r}\n",
        )
        found = problems(path, "optimizer.lr=fast", "train.micro_batch_size=0")
        expected = [
            ("model.seq_lenght", "did you mean seq_length?", f"({path}:3)"),
            ("modle", "did you mean model?", f"({path}:8)"),
            ("model.recompute_granularity", "did you mean full?", f"({path}:4)"),
            ("train.train_iters", "1.5 is given, a valid integer is wanted", f"({path}:6)"),
            ("train.micro_batch_size", "greater than or equal to 1", "(override train.micro_batch_size=0)"),
            ("train.global_batch_size", '"abc" is given, a valid integer', f"({path}:7)"),
            ("optimizer.lr", '"fast" is given, a valid number', "(override optimizer.lr=fast)"),
            ("dataset.num_workers", "2 is refused: the training process tokenises", f"({path}:9)"),
        ]
        assert len(found) == len(expected), found
        for line, (key, text, origin) in zip(found, expected, strict=True):
            assert line.startswith(f"{key}: ") and text in line and line.endswith(origin), line

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("model.tensor_parallel_size=2", "did you mean tensor_model_parallel_size?"),
            ("train.lr=1e-5", "did you mean optimizer.lr?"),
            ("optimiser.lr=1", "did you mean optimizer?"),
            ("train.seed=1.0", "1.0 is given, a valid integer is wanted"),
            ("train.seed='1'", '"1" is given, a valid integer is wanted'),
            ("train.seed=true", "true is given, a valid integer is wanted"),
            ("model.bf16=1", "1 is given, a valid boolean is wanted"),
            ("optimizer.lr=.nan", "NaN is given"),
            ("optimizer.lr=-1", "greater than 0 is wanted"),
            ("optimizer.adam_beta2=1.0", "less than 1 is wanted"),
            ("zero_experts.target_skip_rate=1", "less than 1 is wanted"),
            ("dataset.train=[1, x]", "element 0: a valid string is wanted"),
            ("logger.run_dir=3", "3 is given, a valid string is wanted"),
            ("model.overrides=3", "3 is given, a mapping is wanted"),
            ("optimizer=adam", "a section with keys of its own is wanted, not 'adam'"),
            ("model.moe_router_dtype=fp23", "did you mean fp32?"),
            ("model.seq_length=${train.nothing}", "Interpolation key 'train.nothing' not found"),
            ("logger.run_dir=???", "a value must be given here"),
            ("logger.run_dir=*/x", "put it in quotes"),
            ("model.hf=[", "put it in quotes"),
            ("+model.hf=x", "write model.hf=x"),
            ("++model.hf=x", "write model.hf=x"),
            ("~model.hf", "write model.hf=null"),
            ("model.hf", "write section.key=value"),
            ("=x", "write section.key=value"),
            ("model..hf=x", "write section.key=value"),
        ],
    )
    def test_override(self, minimal: Path, override: str, message: str) -> None:
        assert message in only_problem(minimal, override)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: [1", "not valid YAML"),
            ("a: 1\na: 2", "duplicate key"),
            ("- 1\n- 2", "a mapping of sections is wanted"),
            ("model:\n\tseq_length: 3", "not valid YAML"),
            ("a: !!python/object/apply:os.system [ls]", "not valid YAML"),
            ("base: 3", "the path of one YAML file is wanted"),
            ("base: nowhere.yaml", "nowhere.yaml: the configuration file does not exist"),
            ("base: config.yaml", "in a circle"),
        ],
    )
    def test_file(self, tmp_path: Path, text: str, message: str) -> None:
        assert message in only_problem(write(tmp_path, text))

    def test_missing_file(self, tmp_path: Path) -> None:
        assert "does not exist" in only_problem(tmp_path / "no.yaml")

    def test_a_problem_is_not_reported_twice_through_a_rule(self, minimal: Path) -> None:
        # A batch size that is no number must not also fail the divisibility of the default that takes its place.
        line = only_problem(minimal, "train.global_batch_size=abc", "train.micro_batch_size=7")
        assert line.startswith("train.global_batch_size: ")

    def test_what_a_run_must_name(self, tmp_path: Path) -> None:
        found = [line.split(":")[0] for line in problems(write(tmp_path, ""))]
        assert found == ["model.checkpoint", "dataset.train", "logger.run_dir", "train.train_iters"]


class TestInputs:
    def test_what_is_absent_and_what_is_wrong(self, minimal: Path, tmp_path: Path) -> None:
        folder, file = tmp_path / "folder", write(tmp_path, "", "file.jsonl")
        folder.mkdir()
        overrides = [
            f"model.hf={folder}",
            f"model.checkpoint={folder}",
            f"dataset.train=[{file}, {folder}, {tmp_path}/no.jsonl]",
            f"logger.run_dir={file}",
            f"teacher.checkpoint={tmp_path}/teacher",
            f"dataset.tokenizer={tmp_path}/t.model",
        ]
        absent, wrong = missing_inputs(load_config(minimal, overrides))
        assert [line.split(":")[0] for line in absent] == ["teacher.checkpoint", "dataset.train", "dataset.tokenizer"]
        assert [line.split(":")[0] for line in wrong] == [
            "model.hf",
            "model.checkpoint",
            "dataset.train",
            "logger.run_dir",
        ]
        assert "config.json" in wrong[0] and "latest_checkpointed_iteration.txt" in wrong[1]

    def test_a_complete_run_has_neither(self, minimal: Path, tmp_path: Path) -> None:
        checkpoint, file = tmp_path / "checkpoint", write(tmp_path, "", "file.jsonl")
        (checkpoint / "hf").mkdir(parents=True)
        write(checkpoint, "0", "latest_checkpointed_iteration.txt")
        write(checkpoint / "hf", "{}", "config.json")
        overrides = [f"teacher.checkpoint={checkpoint}", f"dataset.train={file}", f"logger.run_dir={tmp_path}/run"]
        config = load_config(minimal, overrides)
        config.model.checkpoint = str(checkpoint)
        assert missing_inputs(config) == ([], [])
        (checkpoint / "hf/config.json").unlink()
        assert [line.split(":")[0] for line in missing_inputs(config)[1]] == ["model.checkpoint", "teacher.checkpoint"]
