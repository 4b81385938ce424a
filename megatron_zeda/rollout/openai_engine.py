"""Generation by a server that speaks OpenAI's completions protocol, with token ids in and out.

Texts are not enough: a response that is tokenised again is another one. So the server must take a list of ids as
``prompt`` (the protocol allows it) and return the ids that it sampled, which is an extension: ``return_token_ids`` of
vLLM, or log-probabilities whose tokens read ``token_id:17``. One that does neither is refused before anything is asked.

Every request has a time limit and is sent again after time-outs, broken connections and the server's own failures. What
a server cannot answer is a failed response. A server where nobody listens, or that answered nobody all the time that
one request was tried, is gone: the rest fails at once.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPException
from math import isfinite
from threading import Event, Lock, Thread
from typing import Any

import numpy as np

from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.engine import Request, Response, Sampling

_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # HTTP states that may pass
_PROBE_SECONDS = 60.0
_TOKEN_ID = "token_id:"
# Servers compute in bf16, and one batch rounds unlike another.
_SAME_LOGPROB = 0.05
# What a server would take from the model's generation_config.json (vLLM does) if it were not said: nothing of the kind.
_NEUTRAL = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
# Servers keep a position or two at the end of the context for themselves.
_CONTEXT_SLACK = 2


class _BadAnswerError(Exception):
    """The server answered something that is no response to the request."""


class OpenAIEngine:
    """Answers prompts through a server.

    Attributes:
        weights_version: number of updates of the weights that the server has, for the responses; None: unknown.
    """

    collective = False

    def __init__(
        self,
        url: str,
        codec: Codec,
        *,
        vocab_size: int,
        served_model: str | None = None,
        concurrency: int = 32,
        timeout_minutes: float = 10.0,
        max_retries: int = 3,
        retry_seconds: float = 1.0,
        api_key: str | None = None,
        kind: str = "openai",
    ) -> None:
        """Ask the server which model it has, and whether it keeps to what this engine needs.

        Args:
            url: ``http://host:port/v1``.
            codec: the trainer's tokenizer, special tokens and context.
            vocab_size: ids are below it.
            served_model: the model's name at the server; None: the only one it has.
            concurrency: requests under way at once.
            timeout_minutes: longest wait for one response.
            max_retries: how often a request is sent again.
            retry_seconds: wait before the first retry, doubled for every other one.
            api_key: None: the environment's ``OPENAI_API_KEY``, if it is set.
            kind: of the server, for the engine's name, which ``served_model`` follows if it is given.

        Raises:
            InputError: the server does not keep to what this engine needs, has another tokenizer or no such model.
            ZedaError: it cannot be reached.
        """
        self.url, self.codec, self.vocab_size = url.rstrip("/"), codec, vocab_size
        self.concurrency, self.max_retries, self.retry_seconds = concurrency, max_retries, retry_seconds
        self.seconds = 60.0 * timeout_minutes
        self.weights_version: int | None = None
        self._key = os.environ.get("OPENAI_API_KEY") if api_key is None else api_key
        self._gone = Event()
        self._answered = 0.0  # when the server last answered anything
        self.context = codec.context
        self._vllm = False
        self.model = self._find_model(served_model)
        # Not the name that the server gives: SGLang's is the folder of the weights, and changes with them.
        self.name = f"{kind} {served_model}" if served_model else kind
        self._checked: set[tuple[float, float]] = set()
        self._check_tokenizer()

    # ---- what the server is -----------------------------------------------------------------------------------------

    def _find_model(self, wanted: str | None) -> str:
        listed = self._ask("GET", f"{self.url}/models", None, self._probe_seconds)
        models = {str(entry["id"]): entry for entry in listed.get("data", []) if "id" in entry}
        owners = {entry.get("owned_by") for entry in models.values()}
        self._vllm = owners == {"vllm"}
        # SGLang names its model after the folder that it loaded last, and does not ask for the name.
        if len(models) == 1 and (wanted is None or owners == {"sglang"}):
            wanted = next(iter(models))
        if wanted is None or wanted not in models:
            raise InputError(
                "the server has no such model" if wanted else "the server has several models",
                where=self.url,
                value=wanted or ", ".join(models),
                rule=f"it has {', '.join(models) or 'none'}",
                fix="name one with rollout.served_model (--served-model)",
            )
        longest = models[wanted].get("max_model_len")
        if isinstance(longest, int):
            self.context = min(self.context, longest)
        return wanted

    @property
    def _probe_seconds(self) -> float:
        return min(self.seconds, _PROBE_SECONDS)

    def _check_tokenizer(self) -> None:
        """Compare tokenizers where the server tells, and see that it takes and returns ids."""
        text = "The 12 quick foxes, naïve: x = {y}\n"
        try:
            ours = self.codec.tokenizer.encode(text)
        except InputError:  # a folder without a tokenizer: only ids are ever exchanged
            ours = []
        root = self.url.removesuffix("/v1")
        try:
            answer = self._ask(
                "POST",
                f"{root}/tokenize",
                {"model": self.model, "prompt": text, "add_special_tokens": False},
                self._probe_seconds,
            )
        except (ZedaError, InputError):  # not every server has it
            answer = {}
        theirs = answer.get("tokens")
        if ours and isinstance(theirs, list) and theirs != ours:
            raise InputError(
                "the server has another tokenizer",
                where=self.url,
                value=f"{len(theirs)} ids for a text of {len(ours)} of ours",
                rule="prompts are sent and responses are trained on as ids",
                fix="serve a model with the tokenizer of dataset.tokenizer",
            )
        probe = ours[:8] or [0]
        response = self._answer(Request(probe, 0), Sampling(max_new_tokens=1, temperature=0.0), self._probe_seconds)
        if response.finish_reason == "error":
            raise InputError(
                f"the server cannot be used: {response.error}",
                where=self.url,
                fix="serve with vLLM or another server that returns token ids and log-probabilities",
            )

    def _check_logprobs(self, sampling: Sampling) -> str | None:
        """Refuse log-probabilities of another distribution than the model's own.

        Servers may give those after temperature and top-p. At temperature 1 without top-p all agree.

        Returns:
            Why the server could not be asked, if so.
        """
        settings = (sampling.temperature, sampling.top_p)
        if settings in self._checked or settings == (1.0, 1.0):
            return None
        prompt = [self.codec.eos_ids[0] if self.codec.eos_ids else 0]
        try:
            plain = self._first_token(prompt, 1.0, 1.0)
            asked = self._first_token(prompt, *settings)
        except (ZedaError, _BadAnswerError) as error:
            return str(error)
        common = plain.keys() & asked.keys()
        if not common:
            raise InputError(
                "the server's log-probabilities cannot be checked",
                where=self.url,
                rule="it must give `top_logprobs`, as at temperature 1 over all tokens",
                fix="sample at temperature 1 without top_p, or serve with vLLM",
            )
        for token in common:
            if abs(plain[token] - asked[token]) > _SAME_LOGPROB:
                raise InputError(
                    "the server's log-probabilities are not the model's",
                    where=self.url,
                    value=f"{asked[token]:.4f} at temperature {settings[0]:g}, top_p {settings[1]:g}",
                    rule=f"{plain[token]:.4f}, as at temperature 1 over all tokens",
                    fix="sample at temperature 1 without top_p, or start the server so that it gives the model's own "
                    "(vLLM: --logprobs-mode raw_logprobs)",
                )
        self._checked.add(settings)
        return None

    def _first_token(self, prompt: list[int], temperature: float, top_p: float) -> dict[str, float]:
        """Log-probabilities of the most probable first tokens, by the server's names for them."""
        sampling = Sampling(max_new_tokens=1, temperature=temperature, top_p=top_p)
        answer = self._complete(Request(prompt, 0), sampling, self._probe_seconds, logprobs=3)
        try:
            choice = answer["choices"][0]
        except (KeyError, IndexError, TypeError) as error:
            raise _BadAnswerError(f"the server's answer lacks {error}") from error
        try:
            top = choice["logprobs"]["top_logprobs"][0]
            return {str(name): float(value) for name, value in top.items() if isfinite(value)}
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            return {}

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Answer requests; see :class:`~megatron_zeda.rollout.engine.RolloutEngine`.

        Raises:
            InputError: the server's log-probabilities are of another distribution.
        """
        self._gone = Event()  # requests of a call that was interrupted keep theirs
        trouble = self._check_logprobs(sampling)
        if trouble is not None:
            return [_failed(trouble) for _ in requests]
        try:
            return _in_threads(
                lambda request: self._answer(request, sampling, self.seconds), requests, self.concurrency
            )
        except BaseException:
            self._gone.set()
            raise

    def _answer(self, request: Request, sampling: Sampling, seconds: float) -> Response:
        response, began, gone = Response(weights_version=self.weights_version), time.monotonic(), self._gone
        try:
            answer = self._complete(request, sampling, seconds)
            self._read(answer, request, sampling, response)
        except (_BadAnswerError, ZedaError) as error:
            response.fail(str(error))
            if self._answered < began:
                gone.set()
        return response

    def _complete(self, request: Request, sampling: Sampling, seconds: float, *, logprobs: int = 1) -> Any:
        stop = self._stop_ids(sampling)
        if len(request.prompt_ids) >= self.context:
            raise _BadAnswerError(f"a prompt of {len(request.prompt_ids)} tokens leaves no room in {self.context}")
        body = _NEUTRAL | {
            "model": self.model,
            "prompt": request.prompt_ids,
            "max_tokens": self._most(request, sampling),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed_of(sampling, request),
            "logprobs": logprobs,
            "n": 1,
            "stream": False,
            # Extensions of vLLM, which SGLang and others share in part. What ends a response is for us to say; but with
            # ignore_eos SGLang ignores stop_token_ids, too.
            "stop_token_ids": stop,
            "ignore_eos": self._vllm,
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        return self._ask("POST", f"{self.url}/completions", body, seconds, retries=self.max_retries)

    def _most(self, request: Request, sampling: Sampling) -> int:
        """Most tokens that a response may have."""
        return min(sampling.max_new_tokens, self.context - len(request.prompt_ids))

    def _stop_ids(self, sampling: Sampling) -> list[int]:
        return list(self.codec.eos_ids if sampling.stop_token_ids is None else sampling.stop_token_ids)

    def _read(self, answer: Any, request: Request, sampling: Sampling, response: Response) -> None:
        """Take a response out of the server's answer, believing nothing."""
        try:
            choice = answer["choices"][0]
            reason, logprobs = choice["finish_reason"], choice["logprobs"]["token_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise _BadAnswerError(f"the server's answer lacks {error}") from error
        sent = choice.get("prompt_token_ids", answer.get("prompt_token_ids"))
        if sent is not None and sent != request.prompt_ids:
            raise _BadAnswerError("the server read another prompt than it was sent: it has another tokenizer")
        ids = _sampled_ids(choice)
        if reason not in ("stop", "length"):
            raise _BadAnswerError(f"the response ended with {reason!r}")
        if not all(0 <= token < self.vocab_size for token in ids):
            raise _BadAnswerError(f"token ids beyond the vocabulary of {self.vocab_size}: it has another tokenizer")
        if len(logprobs) != len(ids) or not all(_is_logprob(value) for value in logprobs):
            raise _BadAnswerError(f"{len(ids)} tokens without a log-probability each")
        if not ids:
            raise _BadAnswerError("a response without tokens")
        most, stop = self._most(request, sampling), set(self._stop_ids(sampling))
        if len(ids) > most:
            raise _BadAnswerError(f"{len(ids)} tokens, more than the {most} that were asked for")
        if not stop.isdisjoint(ids[:-1]):
            raise _BadAnswerError("the response goes on after a token that ends it")
        if reason == "stop" and ids[-1] not in stop:
            raise _BadAnswerError("the token that ended the response is missing")
        at_the_end = len(request.prompt_ids) + len(ids) >= self.context - _CONTEXT_SLACK
        if reason == "length" and len(ids) < most and not at_the_end:
            raise _BadAnswerError(f"cut after {len(ids)} tokens, of {most} that were asked for")
        if self.weights_version is not None:
            response.weights_version = _version_of(answer, self.weights_version)
        response.ids, response.finish_reason = ids, "stop" if ids[-1] in stop else "length"
        response.logprobs = [round(min(0.0, float(value)), 6) for value in logprobs]

    # ---- the wire ---------------------------------------------------------------------------------------------------

    def _ask(self, method: str, url: str, body: Any, seconds: float, *, retries: int = 0) -> Any:
        """Send a request until it is answered.

        Raises:
            InputError: the server says that the request is wrong.
            ZedaError: it could not be asked, or failed, as often as it was tried.
        """
        trouble, gone = "", self._gone
        for wait in _waits(retries, self.retry_seconds):
            if gone.wait(wait):
                break
            try:
                answer = send_json(method, url, body, seconds, self._key)
                self._answered = time.monotonic()
                return answer
            except urllib.error.HTTPError as error:
                self._answered = time.monotonic()
                trouble = f"HTTP {error.code}: {_reason(error)}"
                if error.code not in _AGAIN:
                    raise InputError(f"the server refused: {trouble}", where=url) from error
            except TimeoutError:
                trouble = f"no answer within {seconds:g} s"
            except (OSError, HTTPException, ValueError) as error:  # ValueError: what came is not JSON
                trouble = f"{type(error).__name__}: {error}"
                if isinstance(getattr(error, "reason", None), ConnectionRefusedError):
                    trouble = "nobody listens there"
        if trouble == "nobody listens there":
            gone.set()
        tries = f", {retries + 1} times" if retries else ""
        trouble = f"{trouble}{tries}" if trouble else "the server is gone"
        raise ZedaError(trouble, where=url, fix="start the server, or look at its log")


def send_json(method: str, url: str, body: Any, seconds: float, key: str | None = None) -> Any:
    """Send one HTTP request and return what the answer's JSON says; an empty answer is ``{}``.

    Raises:
        urllib.error.HTTPError: the server's status is an error.
        OSError: no connection, or none in time (``TimeoutError``).
        ValueError: the answer is not JSON.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            content = answer.read()
    except urllib.error.HTTPError:
        raise
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise TimeoutError from error
        raise
    return json.loads(content) if content.strip() else {}


def _in_threads(answer: Callable[[Request], Response], requests: Sequence[Request], concurrency: int) -> list[Response]:
    """Answer requests, so many at once; an interrupt does not wait for those under way (an executor's would)."""
    responses = [_failed("not asked") for _ in requests]
    numbered, lock = iter(enumerate(requests)), Lock()

    def work() -> None:
        while True:
            with lock:
                index, request = next(numbered, (-1, None))
            if request is None:
                return
            try:
                responses[index] = answer(request)
            except Exception as error:  # of this response alone
                responses[index].fail(f"{type(error).__name__}: {error}")

    threads = [Thread(target=work, daemon=True) for _ in range(min(concurrency, len(requests)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        with lock:
            for _ in numbered:  # nobody asks for the rest
                pass
        raise
    return responses


def _version_of(answer: Any, known: int) -> int:
    """The number of the weights that sampled an answer: what the server says (SGLang does), or what is known."""
    told = (answer.get("metadata") or {}).get("weight_version")
    return int(told) if isinstance(told, str) and told.isdecimal() else known


def _failed(reason: str) -> Response:
    response = Response()
    response.fail(reason)
    return response


def seed_of(sampling: Sampling, request: Request) -> int:
    """The seed of one request: of the run's seed and the row alone."""
    return int(np.random.SeedSequence([sampling.seed, request.row]).generate_state(1)[0] >> 1)


def _waits(retries: int, first: float) -> Iterator[float]:
    yield 0.0
    for attempt in range(retries):
        yield first * 2**attempt


def _sampled_ids(choice: Any) -> list[int]:
    """The token ids of a response, from wherever the server puts them."""
    ids = choice.get("token_ids")
    if ids is None:
        names = choice["logprobs"].get("tokens") or []
        if not all(isinstance(name, str) and name.startswith(_TOKEN_ID) for name in names) or not names:
            raise _BadAnswerError("the server returns no token ids (vLLM does)")
        ids = [name.removeprefix(_TOKEN_ID) for name in names]
    try:
        return [int(token) for token in ids]
    except (TypeError, ValueError) as error:
        raise _BadAnswerError("the server's token ids are not numbers") from error


def _is_logprob(value: Any) -> bool:
    return isinstance(value, (int, float)) and isfinite(value) and value <= 1e-3


def _reason(error: urllib.error.HTTPError) -> str:
    """What the body of an error says, in one line."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, HTTPException):
        return str(error.reason)
    try:
        content = json.loads(text)
        text = str(content.get("error", content).get("message", text))
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:200]
