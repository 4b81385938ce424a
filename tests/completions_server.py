"""A small HTTP server that speaks OpenAI's completions protocol as vLLM or SGLang does, for tests of its client.

The model behind it is a ``transformers`` one; the protocol is the real one, over a real socket. Faults are switched on
by name and wear off after so many requests. What the two servers do was read in their sources (vLLM 0.32, SGLang 0.5):

- vLLM fills in what a request does not say from the model's ``generation_config.json``, checks ``stop_token_ids`` with
  ``ignore_eos``, too, and keeps its prefix cache, saying so, while a request holds a part of it.
- SGLang checks no ``stop_token_ids`` with ``ignore_eos``, names its model after the folder that it loaded, and returns
  the version that came with the weights. (Real ones return ids only if their completions are made to.)
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

Complete = Callable[[dict[str, Any]], dict[str, Any]]


class CompletionsServer(ThreadingHTTPServer):
    """Answers ``/v1/models``, ``/v1/completions``, ``/tokenize`` and the two ways to load weights.

    Attributes:
        faults: name -> how many more completions it strikes: ``slow`` (no answer before the end), ``error_500``,
            ``error_400``, ``cut`` (closes the connection in the middle), ``not_json``.
        engine: which server it is like.
        defaults: what completions that do not say it get, as vLLM takes it from ``generation_config.json``.
        busy: how many more times the prefix cache cannot be reset, unless running requests are begun anew.
        version: the number of the weights that SGLang was told.
        edit: changes an answer before it is sent.
        seen: the bodies of all completions, and ``(path, body)`` of every other POST.
    """

    daemon_threads = True

    def __init__(
        self, complete: Complete, *, tokenize: Callable[[str], list[int]] | None = None, engine: str = "vllm"
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.complete, self.tokenize, self.engine = complete, tokenize, engine
        self.defaults: dict[str, Any] = {}
        self.busy, self.version = 0, "default"
        self.faults: Counter[str] = Counter()
        self.ending = threading.Event()
        self.edit: Callable[[dict[str, Any]], None] = lambda answer: None
        self.seen: list[dict[str, Any]] = []
        self.posts: list[tuple[str, Any]] = []
        self.models: list[dict[str, Any]] = [{"id": "tiny", "max_model_len": 96, "owned_by": engine}]
        self.loaded = "first"
        self.lock = threading.Lock()

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def url(self) -> str:
        return f"{self.root}/v1"

    def strikes(self, name: str) -> bool:
        with self.lock:
            struck = self.faults[name] > 0
            self.faults[name] -= struck
            return struck

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gave up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: CompletionsServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self._send(200, {"data": self.server.models})
        elif self.path == "/get_model_info":
            self._send(200, {"model_path": self.server.loaded})
        else:
            self._send(404, {})

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(content) if content else None
        if self.path == "/v1/completions":
            self._complete(body)
            return
        server.posts.append((self.path, body))
        if self.path == "/tokenize" and server.tokenize is not None:
            self._send(200, {"tokens": server.tokenize(body["prompt"])})
        elif self.path == "/update_weights_from_disk":
            server.loaded, server.version = body["model_path"], body.get("weight_version", server.version)
            server.models = [server.models[0] | {"id": server.loaded}]
            self._send(200, {"success": True, "message": "ok"})
        elif self.path == "/collective_rpc":
            server.loaded = body["kwargs"]["weights_path"]
            self._send(200, {"results": [None]})
        elif self.path.startswith("/reset_prefix_cache"):
            done = server.busy < 1 or "reset_running_requests=true" in self.path
            server.busy -= 1
            self._send(200, {"success": done})
        else:
            self._send(404, {"error": {"message": "no such path"}})

    def _complete(self, body: dict[str, Any]) -> None:
        server = self.server
        with server.lock:
            server.seen.append(body)
        for status in (500, 400):
            if server.strikes(f"error_{status}"):
                self._send(status, {"error": {"message": f"a fault of kind {status}"}})
                return
        if server.strikes("slow"):
            server.ending.wait()
            return
        if server.engine == "vllm":
            body = server.defaults | body
        elif body.get("ignore_eos"):
            body = body | {"stop_token_ids": []}
        with server.lock:
            answer = server.complete(body)
        if server.engine == "sglang":
            answer["metadata"] = {"weight_version": server.version}
        server.edit(answer)
        if server.strikes("not_json"):
            self._send(200, None, raw=b"<html>")
        elif server.strikes("cut"):
            self._send(200, answer, cut=True)
        else:
            self._send(200, answer)

    def _send(self, status: int, answer: Any, *, raw: bytes | None = None, cut: bool = False) -> None:
        content = raw if raw is not None else (b"" if answer is None else json.dumps(answer).encode())
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut or self.close_connection


@contextmanager
def serving(complete: Complete, **settings: Any) -> Iterator[CompletionsServer]:
    """A server that runs within the block."""
    server = CompletionsServer(complete, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _narrowed(logits: torch.Tensor, sequence: list[int], body: dict[str, Any]) -> torch.Tensor:
    """Logits ``[V]`` after what narrows the distribution; what a request does not say does nothing."""
    penalty, top_k, min_p = body.get("repetition_penalty", 1.0), body.get("top_k", 0), body.get("min_p", 0.0)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    seen[sequence] = True
    logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if top_k > 0:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)


def transformers_completions(model: Any, *, processed: bool = False, ids: str = "token_ids") -> Complete:
    """Completions of a ``transformers`` causal language model, one forward pass of the whole sequence per token.

    Args:
        model: in eval mode.
        processed: log-probabilities after temperature, as some servers give them.
        ids: how the sampled ids are returned: "token_ids", "tokens" (as ``token_id:17``) or "" (not at all).
    """

    @torch.no_grad()
    def complete(body: dict[str, Any]) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(body["seed"])
        sequence, logprobs, tops, reason = list(body["prompt"]), [], [], "length"
        new: list[int] = []
        while len(new) < body["max_tokens"] and reason == "length":
            logits = model(torch.tensor([sequence])).logits[0, -1].double()
            heated = _narrowed(logits / (body["temperature"] or 1.0), sequence, body)
            if body["temperature"] == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial(heated.softmax(-1), 1, generator=generator))
            known = (heated if processed else logits).log_softmax(-1)
            logprobs.append(float(known[token]))
            tops.append(
                {f"token_id:{i}": float(known[i]) for i in known.topk(max(1, body["logprobs"])).indices.tolist()}
            )
            new.append(token)
            sequence.append(token)
            if token in body["stop_token_ids"]:
                reason = "stop"
        choice: dict[str, Any] = {
            "index": 0,
            "text": "?",
            "finish_reason": reason,
            "logprobs": {
                "token_logprobs": logprobs,
                "top_logprobs": tops,
                "tokens": [f"token_id:{token}" if ids == "tokens" else "?" for token in new],
            },
        }
        if ids == "token_ids":
            choice |= {"token_ids": new, "prompt_token_ids": body["prompt"]}
        return {"choices": [choice]}

    return complete
