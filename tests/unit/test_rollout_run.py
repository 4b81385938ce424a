"""``zeda rollout`` from files to file: formats, order, resuming, the command line."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from completions_server import serving, transformers_completions
from tiny_hf import EOS, VOCABULARY, write_lines

from megatron_zeda.conversion import hf_to_megatron
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout import Sampling, cli, read_rollouts, rollout, vllm_engine
from megatron_zeda.rollout.hf_folder import load_model, weights_version
from megatron_zeda.rollout.sources import megatron_source, openai_source, transformers_source, vllm_source
from megatron_zeda.rollout.transformers_engine import TransformersEngine

PROMPTS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "ab"}], "id": "first", "answer": "b", "task": "echo"},
    {"prompt": "a long plain text", "id": "second"},
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "z?"}]},
    {"prompt": "q", "id": "last"},
]
SAMPLED = Sampling(max_new_tokens=6, temperature=1.3, samples_per_prompt=2, seed=9)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "prompts.jsonl", PROMPTS)


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(character) for character in text]


def test_the_output_has_the_prompts_in_order_with_everything_about_them(
    tmp_path: Path, tiny_dynamic: Path, prompts: Path
) -> None:
    output = tmp_path / "out.jsonl"
    summary = rollout(transformers_source(tiny_dynamic, batch_size=3), prompts, output, SAMPLED)
    lines = read_rollouts(output)
    assert [line.id for line in lines] == ["first", "first", "second", "second", 2, 2, "last", "last"]
    assert [line.sampling["sample"] for line in lines] == [0, 1] * 4
    user, assistant = VOCABULARY.index("<user>"), VOCABULARY.index("<assistant>")
    assert lines[0].prompt_ids == [user, *ids("ab"), EOS, assistant]
    assert lines[2].prompt_ids == ids("a long plain text")
    assert (lines[1].answer, lines[1].task, lines[2].answer) == ("b", "echo", None)
    version = weights_version(tiny_dynamic)
    for line in lines:
        stopped = line.response_ids[-1] == EOS
        text = [VOCABULARY[token] for token in (line.response_ids[:-1] if stopped else line.response_ids)]
        assert line.finish_reason == ("stop" if stopped else "length")
        assert line.messages[-1] == {"role": "assistant", "content": "".join(text)}
        assert line.logprobs is not None and len(line.logprobs) == len(line.response_ids) <= 6
        assert line.weights_version == version
        assert line.engine.startswith("transformers ") and "float32" in line.engine
        assert line.sampling | {"sample": 0} == {
            "temperature": 1.3,
            "top_p": 1.0,
            "max_new_tokens": 6,
            "samples_per_prompt": 2,
            "seed": 9,
            "sample": 0,
        }
    assert lines[4].messages[:-1] == PROMPTS[2]["prompt"]
    assert summary["responses"] == summary["new_responses"] == 8
    assert summary["new_tokens"] == sum(len(line.response_ids) for line in lines)


def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    tmp_path: Path, tiny_static: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    rollout(transformers_source(tiny_static), prompts, whole, SAMPLED)
    original = TransformersEngine.generate

    def killed(self: TransformersEngine, requests: Any, sampling: Any) -> Any:
        if requests[0].row:
            raise KeyboardInterrupt
        return original(self, requests, sampling)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TransformersEngine, "generate", killed)
        rollout(replace(transformers_source(tiny_static), window=3), prompts, output, SAMPLED)
    partial = tmp_path / "out.jsonl.partial"
    partial.write_text(partial.read_text() + '{"id": "second", "mes')
    summary = rollout(transformers_source(tiny_static), prompts, output, SAMPLED)
    assert (summary["resumed_after"], summary["new_responses"]) == (3, 5)
    for found, wanted in zip(read_rollouts(output), read_rollouts(whole), strict=True):
        assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-5)  # other batches round differently
        assert replace(found, logprobs=None) == replace(wanted, logprobs=None)

    def never(self: TransformersEngine, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a complete output was generated again")

    monkeypatch.setattr(TransformersEngine, "generate", never)
    assert rollout(transformers_source(tiny_static), prompts, output, SAMPLED)["new_responses"] == 0


def test_an_output_of_another_run_is_refused(
    tmp_path: Path, tiny_static: Path, tiny_dynamic: Path, prompts: Path
) -> None:
    output = tmp_path / "out.jsonl"
    rollout(transformers_source(tiny_static), prompts, output, SAMPLED)
    content = output.read_text()
    with pytest.raises(InputError, match="another `weights_version`"):
        rollout(transformers_source(tiny_dynamic), prompts, output, SAMPLED)
    with pytest.raises(InputError, match="another `sampling`"):
        rollout(
            transformers_source(tiny_static),
            prompts,
            output,
            Sampling(max_new_tokens=6, temperature=1.3, samples_per_prompt=2),
        )
    assert output.read_text() == content


def test_a_prompt_longer_than_the_context_is_named(tmp_path: Path, tiny_static: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b" * 96}])
    with pytest.raises(InputError, match=r"p.jsonl:2: the prompt has 96 tokens; fewer than 96"):
        rollout(transformers_source(tiny_static), path, tmp_path / "out.jsonl", SAMPLED)
    assert not list(tmp_path.glob("out*"))


def test_a_response_that_cannot_be_had_names_its_prompt(
    tmp_path: Path, tiny_static: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without that prompt, the same command goes on."""
    original = TransformersEngine.generate

    def generate(self: TransformersEngine, requests: Any, sampling: Any) -> Any:
        responses = original(self, requests, sampling)
        for request, response in zip(requests, responses, strict=True):
            if request.prompt_ids == ids("a long plain text"):
                response.fail("too hard")
        return responses

    monkeypatch.setattr(TransformersEngine, "generate", generate)
    output = tmp_path / "out.jsonl"
    with pytest.raises(ZedaError, match=rf"2 of 8 responses .* to {prompts}:2: too hard; .*delete that prompt"):
        rollout(transformers_source(tiny_static), prompts, output, SAMPLED)
    write_lines(prompts, [PROMPTS[0], *PROMPTS[2:]])
    summary = rollout(transformers_source(tiny_static), prompts, output, SAMPLED)
    assert (summary["resumed_after"], summary["new_responses"]) == (2, 4)


def test_prompts_are_judged_by_the_servers_context(tmp_path: Path, tiny_static: Path) -> None:
    model = load_model(tiny_static, device=torch.device("cpu"))
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b" * 20}])
    with serving(transformers_completions(model)) as server:
        server.models[0]["max_model_len"] = 12
        source = openai_source(tiny_static, server.url, batch_size=2)
        with pytest.raises(InputError, match=r"p.jsonl:2: the prompt has 20 tokens; fewer than 12"):
            rollout(source, path, tmp_path / "out.jsonl", SAMPLED)


def test_a_stop_loses_no_more_than_a_batch_of_a_large_model(
    tmp_path: Path, tiny_static: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_static, device=torch.device("cpu"))
    with serving(transformers_completions(model)) as server:
        assert openai_source(tiny_static, server.url, batch_size=3).window == 3
    monkeypatch.setattr(vllm_engine, "VLLMEngine", lambda *args, **settings: None)
    assert vllm_source(tiny_static, batch_size=3).window == 3
    hf_to_megatron(tiny_static, tmp_path / "megatron")
    with megatron_source(tmp_path / "megatron", sizes={}, batch_size=3) as source:
        assert source.window == 3


@pytest.mark.parametrize(
    "keys",
    [
        {"zce_types": ["copy"], "zeda_expert_type": "copy"},
        {"zeda_dynamic_skipping_beta": 0.3, "zce_nums": None, "zce_types": None, "use_zce_mask": None},
    ],
)
def test_methods_that_no_server_runs_are_refused(tmp_path: Path, tiny_dynamic: Path, keys: dict[str, Any]) -> None:
    config = json.loads((tiny_dynamic / "config.json").read_text()) | keys
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"cannot run method `(copy|dynamic_skipping)`.*use --engine transformers"):
        vllm_source(tmp_path)
    with pytest.raises(InputError, match="--engine openai cannot run method"):
        openai_source(tmp_path, "http://127.0.0.1:9/v1")


def test_impossible_batch_size_is_refused(tmp_path: Path, tiny_static: Path, prompts: Path) -> None:
    with pytest.raises(InputError, match="batch_size"):
        rollout(transformers_source(tiny_static, batch_size=0), prompts, tmp_path / "out.jsonl", SAMPLED)


def command(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


def test_the_command_writes_the_file_and_a_summary(
    tmp_path: Path, tiny_static: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    flags = ["--model", tiny_static, "--prompts", prompts, "--output", output, "--max-new-tokens", "4"]
    args = command(*flags, "--temperature", "0", "--json")
    assert cli.run(args) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["responses"] == len(read_rollouts(output)) == 4
    assert printed.err == ""
    assert cli.run(command(*flags, "--temperature", "0")) == 0
    assert "already complete, 4 responses" in capsys.readouterr().out
