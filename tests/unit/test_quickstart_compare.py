"""The driver of `make compare`: its plan, its order of runs, what it takes up again, and what it computes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from megatron_zeda.config_io import load_config
from megatron_zeda.errors import InputError
from megatron_zeda.models.registry import family_for

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def modules() -> dict[str, ModuleType]:
    sys.path.insert(0, str(QUICKSTART))
    try:
        import compare
        import compare_job
        import compare_plan
        import compare_report
        import inputs

        return {
            "compare": compare,
            "job": compare_job,
            "plan": compare_plan,
            "report": compare_report,
            "inputs": inputs,
        }
    finally:
        sys.path.remove(str(QUICKSTART))


@pytest.mark.parametrize("tune", [False, True])
def test_the_plan_starts_every_run_after_the_one_it_needs(modules: dict[str, ModuleType], tune: bool) -> None:
    runs = modules["plan"].plan(tune=tune)
    names = [run.name for run in runs]
    assert len(names) == len(set(names))
    for run in runs:
        if run.needs:
            assert names.index(run.needs) < names.index(run.name)
        assert run.stage in (0, 1, 2) and bool(run.needs) == (run.stage == 2)
    if tune:
        return
    labels: dict[str, set[int]] = {}
    for run in runs:
        if run.seed:
            labels.setdefault(run.label, set()).add(run.seed)
    assert all(seeds == {1, 2, 3} for seeds in labels.values())
    drawn = {label for _, family, _ in modules["report"].FAMILIES for label in family}
    assert drawn <= {run.label for run in runs}


class Finished:
    """A process that has ended; its result is there when it went well."""

    def __init__(self, done: set[str], name: str, code: int) -> None:
        self.returncode = code
        if code == 0:
            done.add(name)

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self) -> int:
        return self.returncode


def test_runs_that_are_done_are_not_repeated_and_a_failure_stops_only_what_needs_it(
    modules: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    run = modules["plan"].Run
    runs = [run("a", 1), run("a_2", 1, stage=2, start="a"), run("b", 1), run("b_2", 1, stage=2, start="b"), run("c", 1)]
    done, started = {"c.seed1"}, []

    def start(found: Any) -> Finished:
        assert found.needs is None or found.needs in done
        started.append(found.name)
        return Finished(done, found.name, int(found.label == "b"))

    failed = modules["compare"].work(runs, lambda name: name in done, start, jobs=2, poll=0)
    assert failed == ["b.seed1", "b_2.seed1"]
    assert sorted(started) == ["a.seed1", "a_2.seed1", "b.seed1"]
    started.clear()
    assert modules["compare"].work(runs[:2], lambda name: name in done, start, jobs=2, poll=0) == []
    assert started == []
    capsys.readouterr()


def test_a_selection_brings_what_it_starts_from(modules: dict[str, ModuleType]) -> None:
    runs = modules["plan"].plan((2,))
    chosen = [run.name for run in modules["compare"].selected(runs, ["ce_2_sampled"])]
    assert chosen == ["zeda_ce.seed2", "ce_2_sampled.seed2"]


def test_its_held_out_questions_are_not_those_the_settings_were_chosen_on(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, plan = modules["inputs"], modules["plan"]
    inputs.write_prompts(tmp_path / "quickstart", inputs.Sizes())
    inputs.write_prompts(tmp_path / "compare", plan.SIZES, skip_held_out=plan.QUICKSTART_HELD_OUT_FACTS)
    capsys.readouterr()

    def lines(folder: str, name: str) -> set[str]:
        return set((tmp_path / folder / f"{name}.jsonl").read_text().splitlines())

    ours = lines("compare", "heldout")
    assert len(ours) == plan.SIZES.held_out_facts + plan.SIZES.held_out_algorithms
    assert not ours & (lines("quickstart", "heldout") | lines("compare", "train"))


def result(label: str, seed: int, *, accuracy: float = 0.9, topk: int = 4, skip: float = 0.5) -> dict[str, Any]:
    evaluation = {
        "accuracy": accuracy, "kl_to_teacher": 0.1, "perplexity": 40.0, "skip_rate": skip, "skip_rate_prompt": skip,
        "response_tokens": 10, "prompt_tokens": 30, "model": {"num_experts_per_token": topk},
    }  # fmt: skip
    run = {"label": label, "seed": seed, "start": ""}
    return {
        "run": run, "evaluation": evaluation, "dial": [], "training": None, "cpu_seconds": 1.0, "versions": {}
    }  # fmt: skip


def with_points(found: dict[str, Any], start: str, points: list[tuple[int, float]]) -> dict[str, Any]:
    found["run"]["start"] = start
    found["training"] = {"points": [{"sampled_tokens": tokens, "kl_forward": kl} for tokens, kl in points]}
    return found


def test_tables_and_the_tokens_to_the_same_kl(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    found = {"teacher": result("teacher", 0, skip=0.0), "net.seed1": result("net", 1, topk=2, skip=0.0)}
    for seed, accuracy in ((1, 0.8), (2, 0.9)):
        found[f"zeda.seed{seed}"] = with_points(result("zeda", seed, accuracy=accuracy), "", [(0, 0.3)])
        # From 0.3, the full KL is at 0.1 after 100 tokens, the sampled one after 400: a ratio of four.
        full, sampled = [(100, 0.1), (200, 0.05)], [(200, 0.2), (400, 0.1)]
        found[f"ce_2.seed{seed}"] = with_points(result("ce_2", seed), "zeda", full)
        found[f"ce_2_sampled.seed{seed}"] = with_points(result("ce_2_sampled", seed), "zeda", sampled)
    built = modules["report"].build(found)
    zeda = built["labels"]["zeda"]
    assert zeda["seeds"] == 2 and zeda["accuracy"]["mean"] == pytest.approx(0.85)
    assert zeda["accuracy"]["sd"] == pytest.approx(0.1 / 2**0.5)
    assert built["labels"]["net"]["saved"]["mean"] == 0.5 and built["labels"]["net"]["accuracy"]["sd"] is None
    ratio = built["tokens_to_the_same_kl"]["sampled"]
    assert ratio["geometric_mean"] == pytest.approx(4.0)
    assert [row["tokens_full"] for row in ratio["per_seed"]] == pytest.approx([100, 100])
    assert "4.00, 4.00" in modules["report"].markdown(built)
    for name, value in found.items():
        modules["report"].json.dump(value, (tmp_path / f"{name}.json").open("w"))
    modules["report"].write(tmp_path, tmp_path / "out")
    for picture in ("pareto.png", "estimators.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")


def test_an_estimator_that_never_gets_below_the_start_has_no_ratio(modules: dict[str, ModuleType]) -> None:
    found = {
        "zeda.seed1": with_points(result("zeda", 1), "", [(0, 0.3)]),
        "ce_2.seed1": with_points(result("ce_2", 1), "zeda", [(100, 0.1)]),
        "ce_2_sampled.seed1": with_points(result("ce_2_sampled", 1), "zeda", [(100, 0.4)]),
    }
    (row,) = modules["report"].tokens_ratios(found)["sampled"]["per_seed"]
    assert row["ratio"] is None and row["best"] == 0.3
    assert modules["report"].tokens_to([[0, 0.3], [100, 0.1]], 0.2) == pytest.approx(50)
    assert modules["report"].tokens_to([[0, 0.3], [100, 0.1]], 0.05) is None


def test_the_controller_is_judged_by_the_last_third_of_its_steps(modules: dict[str, ModuleType]) -> None:
    controlled = with_points(result("zeda_controlled", 1, skip=0.48), "", [(0, 0.3)])
    controlled["run"]["settings"] = ["zero_experts.weight=2.0", "zero_experts.target_skip_rate=0.5"]
    controlled["training"]["skip_rates"] = [0.1] * 40 + [0.49] * 10 + [0.53] * 10
    built = modules["report"].build({"teacher": result("teacher", 0), "zeda_controlled.seed1": controlled})
    (row,) = built["controller"]
    assert (row["target"], row["low"], row["high"], row["evaluated"]) == pytest.approx((0.5, 0.49, 0.53, 0.48))
    assert row["mean"] == pytest.approx(0.51)
    assert "| 1 | 50.0 | 51.0 | 49.0 to 53.0 | 48.0 |" in modules["report"].markdown(built)


def test_a_resumed_run_counts_a_repeated_step_once(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    lines = [
        '{"step": 1, "skip_rate": 0.4, "rollout": {"tokens": 10}, "validation": {"kl_forward": 0.5, "kl_per": [1]}}',
        '{"step": 2, "rollout": {"tokens": 20}}',
        '{"step": 2, "rollout": {"tokens": 20}, "validation": {"kl_forward": 0.4}}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert modules["job"].curve(tmp_path / "metrics.jsonl") == {
        "steps": 2,
        "sampled_tokens": 30,
        "points": [
            {"step": 1, "sampled_tokens": 10, "kl_forward": 0.5},
            {"step": 2, "sampled_tokens": 30, "kl_forward": 0.4},
        ],
        "skip_rates": [0.4, None],
    }
    assert modules["job"].curve(tmp_path / "absent") is None


def test_every_run_has_settings_that_are_served(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    static = json.loads((QUICKSTART / "teacher" / "config.json").read_text())
    dynamic = family_for(static).make_dynamic(static, 8)
    refused = {}
    runs = {(run.stage, run.settings): run for run in [*modules["plan"].plan((1,)), *modules["plan"].plan(tune=True)]}
    for run in runs.values():
        if run.stage:
            command = modules["job"].training(run, tmp_path, tmp_path / "run", tmp_path / "hf")
            path, *overrides = (str(word) for word in command[4:])
            try:
                load_config(path, overrides, world_size=1, hf_config=dynamic if run.zero_experts else static)
            except InputError as error:
                refused[run.name] = str(error)
    assert not refused
