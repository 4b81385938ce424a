"""The client of OpenAI-compatible servers against a real local server, and every way in which one may fail."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from completions_server import CompletionsServer, serving, transformers_completions
from tiny_hf import VOCABULARY

from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout import Codec, Request, Response, Sampling, TransformersEngine, openai_engine
from megatron_zeda.rollout.hf_folder import load_model, read_config
from megatron_zeda.rollout.openai_engine import OpenAIEngine

GREEDY = Sampling(max_new_tokens=6, temperature=0.0, stop_token_ids=(9, 14, 45))
SAMPLED = Sampling(max_new_tokens=4, seed=3)


@pytest.fixture(scope="module")
def codec(tiny_dynamic: Path) -> Codec:
    return Codec(tiny_dynamic, read_config(tiny_dynamic))


@pytest.fixture(scope="module")
def model(tiny_dynamic: Path) -> Any:
    return load_model(tiny_dynamic, device=torch.device("cpu"))


@pytest.fixture
def server(model: Any, codec: Codec) -> Iterator[CompletionsServer]:
    with serving(transformers_completions(model), tokenize=codec.tokenizer.encode) as running:
        yield running


def connect(server: CompletionsServer, codec: Codec, **settings: Any) -> OpenAIEngine:
    defaults: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "concurrency": 4,
        "retry_seconds": 0.01,
        "max_retries": 2,
    }
    return OpenAIEngine(server.url, codec, **defaults | settings)


def requests(count: int = 5) -> list[Request]:
    rng = random.Random(0)
    return [Request([rng.randrange(5, 47) for _ in range(rng.randrange(1, 9))], row) for row in range(count)]


def errors(responses: list[Response]) -> list[str | None]:
    assert all(not r.ids and not r.logprobs for r in responses if r.finish_reason == "error")
    return [response.error for response in responses]


def test_greedy_responses_are_those_of_transformers(
    server: CompletionsServer, codec: Codec, tiny_dynamic: Path
) -> None:
    engine = connect(server, codec)
    engine.weights_version = 7
    found, wanted = engine.generate(requests(), GREEDY), TransformersEngine(tiny_dynamic).generate(requests(), GREEDY)
    assert [r.ids for r in found] == [r.ids for r in wanted]
    assert [r.finish_reason for r in found] == [r.finish_reason for r in wanted]
    assert {r.finish_reason for r in found} == {"stop", "length"}
    assert {r.weights_version for r in found} == {7}
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_samples_depend_on_seed_and_row_alone(server: CompletionsServer, codec: Codec) -> None:
    engine = connect(server, codec)
    whole = engine.generate(requests(), SAMPLED)
    rest = engine.generate(requests()[3:], SAMPLED)
    assert [r.ids for r in rest] == [r.ids for r in whole[3:]]
    other = engine.generate(requests(), Sampling(max_new_tokens=4, seed=4))
    assert [r.ids for r in other] != [r.ids for r in whole]
    twice = engine.generate([Request([7], 0), Request([7], 1), Request([7], 2)], SAMPLED)
    assert len({tuple(r.ids) for r in twice}) > 1
    assert all(body["ignore_eos"] and body["stop_token_ids"] == codec.eos_ids for body in server.seen[-3:])


def test_the_servers_own_settings_change_no_sample(server: CompletionsServer, codec: Codec) -> None:
    """vLLM takes what a request does not say from the model's generation_config.json."""
    engine = connect(server, codec)
    wanted = engine.generate(requests(), SAMPLED)
    server.defaults = {"top_k": 1, "min_p": 0.9, "repetition_penalty": 3.0, "presence_penalty": 2.0}
    assert [r.ids for r in engine.generate(requests(), SAMPLED)] == [r.ids for r in wanted]


def test_stop_tokens_end_responses_of_sglang_too(model: Any, codec: Codec, tiny_dynamic: Path) -> None:
    wanted = TransformersEngine(tiny_dynamic).generate(requests(), GREEDY)
    with serving(transformers_completions(model), engine="sglang") as server:
        server.models[0]["id"] = "/folder/rollout_weights/7"  # its name after it loaded other weights
        engine = connect(server, codec, served_model="student", kind="openai")
        found = engine.generate(requests(), GREEDY)
    assert [(r.ids, r.finish_reason) for r in found] == [(r.ids, r.finish_reason) for r in wanted]
    assert {r.finish_reason for r in found} == {"stop", "length"}
    assert engine.name == "openai student"


def test_the_engines_name_has_no_folder(server: CompletionsServer, codec: Codec) -> None:
    server.models[0]["id"] = "/folder/rollout_weights/7"
    assert connect(server, codec, kind="vllm").name == "vllm"


def test_responses_have_the_version_that_the_server_tells(model: Any, codec: Codec) -> None:
    with serving(transformers_completions(model), engine="sglang") as server:
        engine = connect(server, codec)
        engine.weights_version = 0
        assert engine.generate(requests(1), GREEDY)[0].weights_version == 0  # "default"
        server.version, engine.weights_version = "6", 7
        assert engine.generate(requests(1), GREEDY)[0].weights_version == 6


def test_ids_may_come_as_names_of_tokens(model: Any, codec: Codec) -> None:
    with serving(transformers_completions(model, ids="tokens")) as server:
        (response,) = connect(server, codec).generate([Request([7, 8], 0)], GREEDY)
        assert response.finish_reason != "error" and response.ids


@pytest.mark.parametrize("fault", ["error_500", "cut", "not_json"])
def test_what_passes_is_tried_again(server: CompletionsServer, codec: Codec, fault: str) -> None:
    engine = connect(server, codec)
    wanted = engine.generate(requests(3), GREEDY)
    server.faults[fault] = 2
    before = len(server.seen)
    found = engine.generate(requests(3), GREEDY)
    assert [r.ids for r in found] == [r.ids for r in wanted]
    assert len(server.seen) - before == 5


def test_what_takes_too_long_is_tried_again(server: CompletionsServer, codec: Codec) -> None:
    engine = connect(server, codec, max_retries=6)
    wanted = engine.generate(requests(2), GREEDY)
    server.faults["slow"], engine.seconds = 1, 1.5
    assert [r.ids for r in engine.generate(requests(2), GREEDY)] == [r.ids for r in wanted]
    assert server.faults["slow"] == 0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("error_500", "a fault of kind 500, 3 times"), ("error_400", "HTTP 400: a fault of kind 400"), ("cut", "3 times")],
)
def test_what_stays_is_a_failed_response(server: CompletionsServer, codec: Codec, fault: str, reason: str) -> None:
    engine = connect(server, codec)
    server.faults[fault] = 100
    found = errors(engine.generate(requests(2), GREEDY))
    assert all(error is not None and reason in error for error in found), found
    server.faults.clear()
    assert errors(engine.generate(requests(2), GREEDY)) == [None, None]


def test_a_server_that_hangs_is_given_up(server: CompletionsServer, codec: Codec) -> None:
    engine = connect(server, codec, max_retries=1)
    engine.seconds = 0.2
    server.faults["slow"] = 100
    for error in errors(engine.generate(requests(2), GREEDY)):
        assert error is not None and "no answer within 0.2 s, 2 times" in error


def test_a_server_that_hangs_is_waited_for_once(server: CompletionsServer, codec: Codec) -> None:
    engine = connect(server, codec, max_retries=1, concurrency=2)
    engine.seconds, server.faults["slow"] = 0.2, 1000
    before = len(server.seen)
    found = errors(engine.generate(requests(40), SAMPLED))
    assert any("no answer within 0.2 s, 2 times" in str(error) for error in found[:2])
    assert len(server.seen) - before <= 8 and sum("gone" in str(error) for error in found) > 30
    server.faults.clear()
    engine.seconds = 60.0
    assert errors(engine.generate(requests(2), SAMPLED)) == [None, None]


def test_an_interrupt_does_not_wait_for_the_server(server: CompletionsServer, codec: Codec) -> None:
    engine = connect(server, codec)  # ten minutes for an answer
    server.faults["slow"] = 1000
    before, main = len(server.seen), threading.get_ident()

    def interrupt() -> None:
        while len(server.seen) == before:
            server.ending.wait(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(requests(40), SAMPLED)
    assert not server.ending.is_set() and len(server.seen) - before <= 4


def test_a_server_that_died_fails_the_rest_at_once(model: Any, codec: Codec) -> None:
    with serving(transformers_completions(model)) as server:
        engine = connect(server, codec, concurrency=1)
        assert errors(engine.generate(requests(1), GREEDY)) == [None]
        answered = threading.Event()

        def die(answer: dict[str, Any]) -> None:
            answered.set()
            threading.Thread(target=server.shutdown).start()
            server.socket.close()

        server.edit = die
        found = errors(engine.generate(requests(40), GREEDY))
    assert found[0] is None and answered.is_set()
    assert "nobody listens" in str(found[-2]) or "gone" in str(found[-1])
    assert sum("gone" in str(error) for error in found) > 30  # not forty times all retries


def test_nobody_listens(codec: Codec) -> None:
    with pytest.raises(ZedaError, match="nobody listens there"):
        OpenAIEngine("http://127.0.0.1:9/v1", codec, vocab_size=47, retry_seconds=0.0)


def _choice(answer: dict[str, Any]) -> dict[str, Any]:
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def _drop_last(answer: dict[str, Any]) -> None:
    choice = _choice(answer)
    choice["finish_reason"] = "stop"
    for values in (choice["token_ids"], choice["logprobs"]["token_logprobs"]):
        values[:] = [9, *values][:1] if values is choice["token_ids"] else values[:1]
    choice["token_ids"][:] = [8]


def _cut(tokens: int) -> Callable[[dict[str, Any]], None]:
    def edit(answer: dict[str, Any]) -> None:
        choice = _choice(answer)
        choice["finish_reason"] = "length"
        for values in (choice["token_ids"], choice["logprobs"]["token_logprobs"]):
            del values[tokens:]

    return edit


def _stop_at_the_limit(answer: dict[str, Any]) -> None:
    """The sixth of six tokens ends the response, and the server counts before it looks."""
    choice = _choice(answer)
    choice["finish_reason"] = "length"
    choice["token_ids"][:] = [5, 6, 7, 8, 10, 9]
    choice["logprobs"]["token_logprobs"][:] = [5e-4] * 6  # above 0 by rounding


def test_a_token_that_ends_a_response_at_its_limit_ends_it(server: CompletionsServer, codec: Codec) -> None:
    engine = connect(server, codec)
    server.edit = _stop_at_the_limit
    (response,) = engine.generate(requests(1), GREEDY)
    assert response.finish_reason == "stop" and response.logprobs == [0.0] * 6


def _too_many(answer: dict[str, Any]) -> None:
    choice = _choice(answer)
    choice["finish_reason"] = "length"
    choice["token_ids"][:] = [5, 6, 7, 8, 10, 11, 12]
    choice["logprobs"]["token_logprobs"][:] = [-1.0] * 7


def _go_on(answer: dict[str, Any]) -> None:
    choice = _choice(answer)
    choice["finish_reason"] = "length"
    choice["token_ids"][:] = [5, 9, 7, 8]
    choice["logprobs"]["token_logprobs"][:] = [-1.0] * 4


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda a: _choice(a)["token_ids"].__setitem__(0, 47), "beyond the vocabulary"),
        (lambda a: _choice(a).update(prompt_token_ids=[1, 2]), "another tokenizer"),
        (lambda a: _choice(a)["logprobs"]["token_logprobs"].pop(), "log-probability"),
        (lambda a: _choice(a)["logprobs"]["token_logprobs"].__setitem__(0, None), "log-probability"),
        (lambda a: _choice(a)["logprobs"]["token_logprobs"].__setitem__(0, 0.5), "log-probability"),
        (lambda a: _choice(a).update(finish_reason="abort"), "abort"),
        (lambda a: a.update(choices=[]), "lacks"),
        (_drop_last, "the token that ended the response is missing"),
        (_cut(0), "a response without tokens"),
        (_cut(1), "cut after 1 tokens, of 6 that were asked for"),
        (_too_many, "7 tokens, more than the 6 that were asked for"),
        (_go_on, "goes on after a token that ends it"),
    ],
)
def test_answers_that_are_none_are_not_believed(
    server: CompletionsServer, codec: Codec, edit: Any, reason: str
) -> None:
    engine = connect(server, codec)
    server.edit = edit
    (error,) = errors(engine.generate(requests(1), GREEDY))
    assert error is not None and reason in error


def test_servers_that_do_not_fit_are_refused_before_anything_is_asked(model: Any, codec: Codec) -> None:
    without_ids, other = transformers_completions(model, ids=""), [1, 2, 3]
    with serving(without_ids) as server, pytest.raises(InputError, match="returns no token ids"):
        connect(server, codec)
    with (
        serving(transformers_completions(model), tokenize=lambda text: other) as server,
        pytest.raises(InputError, match="another tokenizer"),
    ):
        connect(server, codec)
    with serving(transformers_completions(model)) as server:
        with pytest.raises(InputError, match="no such model"):
            connect(server, codec, served_model="other")
        server.models.append({"id": "second"})
        with pytest.raises(InputError, match="several models"):
            connect(server, codec)
        engine = connect(server, codec, served_model="tiny")
        assert (engine.name, engine.model) == ("openai tiny", "tiny")


def test_log_probabilities_of_another_distribution_are_refused(model: Any, codec: Codec) -> None:
    hot = Sampling(max_new_tokens=4, temperature=0.5)
    with serving(transformers_completions(model, processed=True)) as server:
        engine = connect(server, codec)
        with pytest.raises(InputError, match="log-probabilities are not the model's"):
            engine.generate(requests(2), hot)
        assert errors(engine.generate(requests(2), SAMPLED)) == [None, None]  # at temperature 1 they are
    with serving(transformers_completions(model)) as server:
        assert errors(connect(server, codec).generate(requests(2), hot)) == [None, None]
        server.edit = lambda answer: _choice(answer)["logprobs"].pop("top_logprobs")
        with pytest.raises(InputError, match="log-probabilities cannot be checked"):
            connect(server, codec).generate(requests(2), hot)


def test_the_context_is_the_smaller_one(server: CompletionsServer, codec: Codec) -> None:
    server.models[0]["max_model_len"] = 10
    engine = connect(server, codec)
    long, short = engine.generate([Request([7] * 10, 0), Request([7] * 8, 1)], GREEDY)
    assert long.error is not None and "leaves no room" in long.error
    assert len(short.ids) <= 2
    server.models[0]["max_model_len"] = 96
    small = Codec(codec.folder, read_config(codec.folder), context=20)
    assert (engine.context, connect(server, small).context) == (10, 20)


def test_no_more_requests_than_asked_for_are_under_way(codec: Codec) -> None:
    """And they carry the key."""
    now, most, keys = [0], [0], set[str | None]()
    lock = threading.Lock()

    def send(method: str, url: str, body: Any, seconds: float, key: str | None = None) -> Any:
        keys.add(key)
        if method == "GET":
            return {"data": [{"id": "tiny"}]}
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        threading.Event().wait(0.02)
        with lock:
            now[0] -= 1
        names = {"token_logprobs": [-1.0], "tokens": ["token_id:7"]}
        return {"choices": [{"finish_reason": "length", "logprobs": names, "token_ids": [7]}]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_engine, "send_json", send)
        engine = OpenAIEngine("http://localhost", codec, vocab_size=47, concurrency=3, api_key="secret")
        found = engine.generate(requests(24), Sampling(max_new_tokens=1))
    assert errors(found) == [None] * 24 and 1 < most[0] <= 3 and keys == {"secret"}
