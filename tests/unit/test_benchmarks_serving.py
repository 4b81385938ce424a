"""The serving benchmarks at tiny sizes: what they compare is the same model, and they write what they promise."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SERVING = Path(__file__).parents[2] / "benchmarks" / "serving"
SHAPES = ("tiny-qwen3", "tiny-glm")


@pytest.fixture(autouse=True)
def _own_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The scripts import their neighbours, as scripts do. What they change in this process is put back."""
    threads, known = torch.get_num_threads(), set(sys.modules)
    monkeypatch.syspath_prepend(str(SERVING.parent))
    monkeypatch.syspath_prepend(str(SERVING))
    import side_by_side

    monkeypatch.setattr(side_by_side, "_keep_freed_memory", lambda: None)
    yield
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    for name in ("layer", "model", "sweep", "mtp", "serving_models", "side_by_side"):
        if name not in known:
            sys.modules.pop(name, None)


def louder(experts: torch.nn.Module) -> None:
    """Weights of a size at which a narrow layer's experts make a difference."""
    for parameter in experts.parameters():
        parameter.mul_(20)


@pytest.mark.parametrize("shape", SHAPES)
def test_compared_blocks_compute_the_same(shape: str) -> None:
    import layer
    import serving_models as compared

    device = compared.start(1)
    found = compared.blocks(shape, 8, "grouped_mm", device)
    for block in found.values():
        block.float()
    for block in (found["static"], found["dense zeros"]):  # the others have the first one's
        louder(block.experts)
    hidden = torch.randn(1, 64, 32)
    gate = found["ours"].gate
    assert compared.set_rate(gate, hidden[0], 0.0) == pytest.approx(0.0, abs=0.02)
    reached = compared.set_rate(gate, hidden[0], 0.5)
    assert reached == pytest.approx(0.5, abs=0.02)
    layer.copy_router(gate, found["dense zeros"].gate)
    ours = found["ours"](hidden)
    for other in ("dense zeros", "expert 0"):
        torch.testing.assert_close(found[other](hidden), ours, atol=1e-5, rtol=1e-4)
    assert not ours.allclose(found["static"](hidden), atol=1e-2, rtol=1e-2)
    gate.zero_logit_bias = float("-inf")
    torch.testing.assert_close(found["ours"](hidden), found["static"](hidden), atol=1e-5, rtol=1e-4)


def test_layer_writes_ratios_and_targets(tmp_path: Path) -> None:
    import layer

    output = tmp_path / "layer.json"
    arguments = ["--shape", "tiny-glm", "--tokens", "1", "256", "--skip-rates", "0", "0.5", "--seconds", "0.001"]
    layer.main([*arguments, "--implementations", "eager", "batched_mm", "--threads", "1", "--output", str(output)])
    record = json.loads(output.read_text())
    points = [(found["implementation"], found["tokens"], found["skip_rate_asked"]) for found in record["results"]]
    assert points == [
        *(("eager", tokens, rate) for tokens in (1, 256) for rate in (0.0, 0.5)),
        *(("batched_mm", 1, rate) for rate in (0.0, 0.5)),
    ]
    for found in record["results"]:
        assert found["skip_rate"] == pytest.approx(found["skip_rate_asked"], abs=0.02)
        for form in ("ours", "dense_zeros", "expert_0"):
            ratio = found[f"static_over_{form}"]
            assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert [target["limit"] for target in record["targets"]] == [0.98, 1.7, 0.98, 1.3, 0.98, 1.7]
    assert all(target["met"] == (target["measured"] >= target["limit"]) for target in record["targets"])


@pytest.mark.parametrize("shape", SHAPES)
def test_compared_models_are_the_same_without_skipping(shape: str) -> None:
    import serving_models as compared

    device = compared.start(1)
    static, ours = compared.models(shape, 8, "grouped_mm", 2, device)
    static.float()
    ours.float()
    for decoder_layer in static.model.layers:
        if hasattr(decoder_layer.mlp, "experts"):
            louder(decoder_layer.mlp.experts)
    ids = torch.randint(0, 64, (2, 16))
    for gate in compared.gates(ours):
        gate.zero_logit_bias = float("-inf")
    torch.testing.assert_close(ours(ids).logits, static(ids).logits, atol=1e-5, rtol=1e-4)
    for gate in compared.gates(ours):
        gate.zero_logit_bias = 0.0
    assert compared.set_rates(ours, ids, 0.5) == pytest.approx(0.5, abs=0.03)
    assert not ours(ids).logits.allclose(static(ids).logits, atol=1e-2, rtol=1e-2)


def test_model_writes_speedups_beside_the_flop_model(tmp_path: Path) -> None:
    import model

    from megatron_zeda.evaluation.flops import ModelShape

    output = tmp_path / "model.json"
    arguments = ["--shape", "tiny-qwen3", "--layers", "2", "--prompt", "32", "--batch", "2", "--steps", "2"]
    arguments += ["--chunk", "16", "--skip-rates", "0.5", "--rounds", "1", "--threads", "1", "--output", str(output)]
    model.main(arguments)
    record = json.loads(output.read_text())
    prefill, decode = record["results"]
    assert (prefill["stage"], decode["stage"]) == ("prefill", "decode")
    assert prefill["skip_rate"] == pytest.approx(0.5, abs=0.03) and 0 < decode["skip_rate"] < 1
    shape = ModelShape.from_hf_config(model.hf_values("tiny-qwen3", num_zero=8))
    wanted = shape.static().prefill_flops(32) / shape.prefill_flops(32, prefill["skip_rate"])
    assert prefill["theoretical_speedup"] == pytest.approx(wanted, rel=1e-3)
    wanted = shape.static().decode_flops(2, prefix=32) / shape.decode_flops(2, decode["skip_rate"], prefix=32)
    assert decode["theoretical_speedup"] == pytest.approx(wanted, rel=1e-3)
    assert [target["limit"] for target in record["targets"]] == [0.95, 0.95]


def test_decoding_goes_on_behind_the_prompt_every_time() -> None:
    """A repeated measurement decodes the same positions, with the logits of the whole sequence at once."""
    import model
    import serving_models as compared

    device = compared.start(1)
    _, ours = compared.models("tiny-glm", 8, "grouped_mm", 2, device)
    ours.float()
    ids, seen = torch.randint(0, 64, (2, 12)), []
    run = model.decoding(ours, ids, 3, chunk=10)
    ours.register_forward_hook(lambda module, args, output: seen.append(output.logits[:, -1]))
    run()
    run()
    whole = ours(torch.cat([ids, ids[:, :1].expand(-1, 3)], dim=1)).logits[:, -3:]
    for step in range(3):
        torch.testing.assert_close(seen[step], whole[:, step], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[3 + step], whole[:, step], atol=1e-5, rtol=1e-4)


class Client:
    """Stands in for ``vllm bench serve``: writes a result as it does."""

    def __init__(self, speed: float) -> None:
        self.speed, self.commands = speed, []

    def __call__(self, words: list[str], check: bool) -> None:
        assert check
        flags = dict(itertools.pairwise(words))
        self.commands.append(flags)
        requests = int(flags["--num-prompts"])
        result = {"completed": requests, "num_prompts": requests, "output_throughput": 100.0 * self.speed}
        result |= {"mean_ttft_ms": 50.0 / self.speed, "mean_tpot_ms": 0.0}
        (Path(flags["--result-dir"]) / flags["--result-filename"]).write_text(json.dumps(result))


def test_sweep_compares_two_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sweep

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n\n{"prompt": [{"role": "system", "content": "x"}, {"content": "two"}]}\n')
    options = ["--tokenizer", "folder", "--prompts", str(prompts), "--folder", str(tmp_path / "out")]
    for label, speed in (("static", 1.0), ("zeda", 1.25)):
        client = Client(speed)
        monkeypatch.setattr(subprocess, "run", client)
        sweep.main(["run", "--label", label, *options, "--concurrency", "4", "16", "--output-tokens", "7"])
    lengths = [(flags["--max-concurrency"], flags["--custom-output-len"]) for flags in client.commands]
    assert lengths == [("4", "7"), ("16", "7"), ("16", "1")]  # the last one: prompts alone
    assert [json.loads(line)["prompt"] for line in (tmp_path / "out/prompts.jsonl").open()] == ["one", "two"]
    assert "sent twice" in capsys.readouterr().out
    sweep.main(["draw", "--folder", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out/sweep.json").read_text())
    assert list(rows) == ["4", "16", "prefill"]
    assert rows["16"]["output_throughput"] == {"static": 100.0, "ours": 125.0, "gain": 1.25}
    assert rows["16"]["mean_ttft_ms"]["gain"] == 1.25 and "mean_tpot_ms" not in rows["16"]
    assert "| 16 | 100.0, 125.0 (1.25 x) | 50.0, 40.0 (1.25 x) |  |" in capsys.readouterr().out
    assert (tmp_path / "out/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_sweep_refuses_unanswered_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sweep

    def half(words: list[str], check: bool) -> None:
        folder, file = (words[words.index(flag) + 1] for flag in ("--result-dir", "--result-filename"))
        (Path(folder) / file).write_text('{"completed": 8, "num_prompts": 16}')

    monkeypatch.setattr(subprocess, "run", half)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "one"}\n')
    options = ["--tokenizer", "folder", "--prompts", str(tmp_path / "prompts.jsonl"), "--folder", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="8 of 16 requests"):
        sweep.main(["run", "--label", "zeda", *options])
    with pytest.raises(SystemExit, match="no static_"):
        sweep.main(["draw", "--folder", str(tmp_path / "out")])


@pytest.mark.parametrize("family", ["glm4_moe_lite", "glm4_moe"])
def test_drafts_of_a_student_without_skipping_are_the_teachers(tmp_path: Path, family: str) -> None:
    import mtp
    from checkpoints import load_hf_model, make_hf

    from megatron_zeda.conversion import inject_zero_experts

    static = make_hf(tmp_path / "static", family=family, mtp=True)
    inject_zero_experts(static, tmp_path / "dynamic", num_zero_experts=2)
    teacher = load_hf_model(static)
    student = load_hf_model(tmp_path / "dynamic", zeda_zero_logit_bias=float("-inf"))
    ids = torch.randint(0, 64, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        drafted, own = mtp.drafts(teacher, mtp.drafting_layer(static, teacher), ids)
        torch.testing.assert_close(own, teacher(ids).logits[0, 1:])
        theirs, _ = mtp.drafts(student, mtp.drafting_layer(tmp_path / "dynamic", student), ids)
        torch.testing.assert_close(theirs, drafted, atol=1e-5, rtol=1e-4)
        layer = mtp.drafting_layer(static, teacher)
        found = mtp.acceptance(teacher, layer, [(ids[0, :5].tolist(), ids[0, 5:].tolist())])
    agreed = (drafted.argmax(-1) == own.argmax(-1))[4:-1]  # about tokens 6 to 19
    assert found == {
        "drafts": 14,
        "accepted": agreed.sum().item() / 14,
        "tokens_per_pass": 1 + agreed.sum().item() / 14,
    }
