"""Rollouts with ``transformers``: a Hugging Face folder and a prompt file in, a rollout file out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_zeda.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_zeda.errors import InputError
from megatron_zeda.platform import device as platform_device
from megatron_zeda.rollout.decode import Response, Sampling, decode
from megatron_zeda.rollout.files import Expected, Prompt, Rollout, RolloutWriter, read_prompts
from megatron_zeda.rollout.hf_folder import load_model, read_config, resolve_dtype, weights_version

# Prompts are sorted by length within a window of this many batches: little padding, and lines still reach the file in
# the order of the prompts while the run goes on.
_WINDOW_BATCHES = 16


class TransformersEngine:
    """A model and its tokenizer, ready to answer prompts."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "auto",
        device: torch.device | None = None,
        trust_remote_code: bool = False,
        num_experts_per_token: int | None = None,
    ) -> None:
        """Load a folder; see :func:`megatron_zeda.rollout.hf_folder.load_model` for the arguments and errors."""
        import transformers

        self.folder = folder
        self.device = device or platform_device()
        self.config = read_config(folder)
        self._tokenizer = load_tokenizer(folder)
        self.model = load_model(
            folder,
            device=self.device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            num_experts_per_token=num_experts_per_token,
        )
        compute = str(resolve_dtype(dtype, self.config, self.device)).removeprefix("torch.")
        self.name = f"transformers {transformers.__version__}, {compute}, {self.device.type}"
        self.context = int(self.config["max_position_embeddings"])
        self.eos_ids = self._eos_ids()

    def _eos_ids(self) -> list[int]:
        from_tokenizer = self._tokenizer.eos_token_id if self._tokenizer else None
        for found in (self.model.generation_config.eos_token_id, self.config.get("eos_token_id"), from_tokenizer):
            if found is not None:
                return [int(i) for i in found] if isinstance(found, list) else [int(found)]
        return []

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The folder's tokenizer.

        Raises:
            InputError: the folder has none, which is legal until a text has to be read or written.
        """
        if self._tokenizer is None:
            raise InputError(
                "the folder has no tokenizer",
                where=self.folder,
                rule="prompts and texts need one",
                fix="copy the model's tokenizer files into it",
            )
        return self._tokenizer

    @property
    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, where the folder has a tokenizer that tells."""
        known = getattr(self._tokenizer, "tokenizer", None)
        return None if known is None else known.get_vocab()

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, ending where the response begins.

        Raises:
            InputError: the prompt has no tokens or leaves no room for a response in the model's context.
        """
        if isinstance(prompt.content, str):
            ids = self.tokenizer.encode(prompt.content)
        else:
            ids = self.tokenizer.encode_chat(prompt.content, add_generation_prompt=True)
        if not ids:
            raise InputError(
                "the prompt has no tokens", where=prompt.where, value=prompt.content, fix="delete the line"
            )
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens",
                where=prompt.where,
                rule=f"fewer than {self.context}, the context (max_position_embeddings), so that a response fits",
                fix="shorten or delete the prompt",
            )
        return ids

    def text(self, response: Response) -> str:
        """Return the text of a response, without the token that ended it."""
        ids = response.ids[:-1] if response.finish_reason == "stop" else response.ids
        return self.tokenizer.decode(ids)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, batch_size: int, first_row: int = 0
    ) -> Iterator[list[Response]]:
        """Answer prompts, yielding runs of consecutive responses in the order of the prompts.

        Args:
            prompts: token ids; repeat a prompt to sample it several times.
            sampling: how tokens are drawn.
            batch_size: rows that are generated together.
            first_row: number of ``prompts[0]`` in the whole run (a row's random numbers depend on its number).
        """
        window = batch_size * _WINDOW_BATCHES
        for start in range(0, len(prompts), window):
            indices = range(start, min(start + window, len(prompts)))
            # Longest first: running out of memory happens at once or never.
            order = sorted(indices, key=lambda i: len(prompts[i]), reverse=True)
            responses: dict[int, Response] = {}
            for first in range(0, len(order), batch_size):
                batch = order[first : first + batch_size]
                done = decode(
                    self.model,
                    [prompts[i] for i in batch],
                    sampling=sampling,
                    rows=[first_row + i for i in batch],
                    eos_ids=self.eos_ids,
                    context=self.context,
                )
                responses.update(zip(batch, done, strict=True))
            yield [responses[i] for i in indices]


def rollout(
    model: Path,
    prompts: Path,
    output: Path,
    sampling: Sampling,
    *,
    batch_size: int = 128,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Write the responses of a model to a prompt file, one line per response, in the order of the prompts.

    A run that was stopped goes on where its output ends.

    Args:
        model: Hugging Face folder, static or dynamic.
        prompts: the prompt file.
        output: the rollout file.
        sampling: how tokens are drawn; samples of one prompt are consecutive lines.
        batch_size: responses generated together.
        dtype: see :func:`megatron_zeda.rollout.hf_folder.resolve_dtype`.
        trust_remote_code: run modelling code found in the folder.
        device: where to compute; the GPU if there is one.

    Returns:
        A summary: counts, mean length, share that stopped by itself, seconds.

    Raises:
        InputError: a bad prompt file, model folder, or an output made with other settings.
    """
    if batch_size < 1:
        raise InputError("out of range", where="batch_size", value=batch_size, rule="at least 1")
    started = time.monotonic()
    lines = read_prompts(prompts)
    engine = TransformersEngine(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    version = weights_version(model)
    encoded = [engine.encode(prompt) for prompt in lines]
    rows = [(index, sample) for index in range(len(lines)) for sample in range(sampling.samples_per_prompt)]
    expected = [Expected(lines[i].id, encoded[i], _sampling_record(sampling, sample)) for i, sample in rows]
    writer = RolloutWriter(output, expected, engine=engine.name, weights_version=version)
    resumed = first = writer.num_done
    tokens = stopped = 0
    if not (writer.complete and output.exists()):
        with writer, _progress(len(rows), first) as bar:
            pending = [encoded[i] for i, _ in rows[first:]]
            for responses in engine.generate(pending, sampling, batch_size=batch_size, first_row=first):
                done = rows[first : first + len(responses)]
                writer.write(
                    [
                        _line(engine, lines[i], expected[first + k], response, version)
                        for k, ((i, _), response) in enumerate(zip(done, responses, strict=True))
                    ]
                )
                first += len(responses)
                tokens += sum(len(response.ids) for response in responses)
                stopped += sum(response.finish_reason == "stop" for response in responses)
                bar.update(len(responses))
    new, seconds = len(rows) - resumed, time.monotonic() - started
    return {
        "output": str(output),
        "prompts": len(lines),
        "responses": len(rows),
        "resumed_after": resumed,
        "new_responses": new,
        "new_tokens": tokens,
        "mean_response_tokens": tokens / new if new else None,
        "stopped_share": stopped / new if new else None,
        "weights_version": version,
        "seconds": round(seconds, 2),
    }


def _sampling_record(sampling: Sampling, sample: int) -> dict[str, Any]:
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "samples_per_prompt": sampling.samples_per_prompt,
        "seed": sampling.seed,
        "sample": sample,
    }


def _line(engine: TransformersEngine, prompt: Prompt, expected: Expected, response: Response, version: str) -> Rollout:
    return Rollout(
        id=prompt.id,
        messages=[*prompt.messages, {"role": "assistant", "content": engine.text(response)}],
        prompt_ids=expected.prompt_ids,
        response_ids=response.ids,
        logprobs=response.logprobs,
        finish_reason=response.finish_reason,
        sampling=expected.sampling,
        engine=engine.name,
        weights_version=version,
        answer=prompt.answer,
        task=prompt.task,
    )


def _progress(total: int, initial: int) -> Any:
    return tqdm(
        total=total, initial=initial, desc="rollout", unit="response", file=sys.stderr, disable=not sys.stderr.isatty()
    )
