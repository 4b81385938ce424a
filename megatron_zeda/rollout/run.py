"""From a prompt file to a rollout file, with any engine."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_zeda.errors import ZedaError
from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.engine import Request, Response, RolloutEngine, Sampling
from megatron_zeda.rollout.files import Expected, Prompt, Rollout, RolloutWriter, read_prompts


@dataclass(frozen=True)
class Source:
    """Who answers.

    Attributes:
        engine: generates.
        codec: prompts to ids, ids to texts.
        weights_version: names the weights in every line.
        window: responses that are asked for at once. Engines sort them by length, and a window is what a run that is
            stopped loses.
    """

    engine: RolloutEngine
    codec: Codec
    weights_version: str
    window: int


def rollout(source: Source, prompts: Path, output: Path, sampling: Sampling) -> dict[str, Any]:
    """Write the responses of a model to a prompt file, one line per response, in the order of the prompts.

    A run that was stopped goes on where its output ends.

    Args:
        source: who answers.
        prompts: the prompt file.
        output: the rollout file.
        sampling: how tokens are drawn; samples of one prompt are consecutive lines.

    Returns:
        A summary: counts, mean length, share that stopped by itself, seconds.

    Raises:
        InputError: a bad prompt file, or an output made with other settings.
        ZedaError: a response that could not be had; what was there before it is written.
    """
    started = time.monotonic()
    alone = not source.engine.collective
    lines = read_prompts(prompts)
    encoded = [source.codec.encode(prompt) for prompt in lines]
    rows = [(index, sample) for index in range(len(lines)) for sample in range(sampling.samples_per_prompt)]
    expected = [Expected(lines[i].id, encoded[i], _sampling_record(sampling, sample)) for i, sample in rows]
    writer = None
    if alone or _is_first():
        writer = RolloutWriter(output, expected, engine=source.engine.name, weights_version=source.weights_version)
    done = (len(rows), 0) if writer is None else (writer.num_done, writer.complete and output.exists())
    first, finished = done if alone else _from_first(done)
    resumed = first
    written: list[Response] = []
    if not finished:
        with nullcontext() if writer is None else writer, _progress(len(rows), first, writer is None) as bar:
            while first < len(rows):
                asked = range(first, min(first + source.window, len(rows)))
                requests = [Request(encoded[rows[row][0]], row) for row in asked]
                responses = source.engine.generate(requests, sampling)
                good = _before_a_failure(responses)
                if writer is not None:
                    answered = zip(asked, good, strict=False)
                    writer.write(
                        [_line(source, lines[rows[row][0]], expected[row], response) for row, response in answered]
                    )
                written += good
                bar.update(len(good))
                if len(good) < len(responses):
                    raise _failure(responses, lines[rows[first + len(good)][0]], output)
                first += len(responses)
    tokens, new = sum(len(response.ids) for response in written), len(written)
    stopped = sum(response.finish_reason == "stop" for response in written)
    return {
        "output": str(output),
        "prompts": len(lines),
        "responses": len(rows),
        "resumed_after": resumed,
        "new_responses": new,
        "new_tokens": tokens,
        "mean_response_tokens": tokens / new if new else None,
        "stopped_share": stopped / new if new else None,
        "cut_share": 1 - stopped / new if new else None,
        "empty": sum(response.empty for response in written),
        "weights_version": source.weights_version,
        "seconds": round(time.monotonic() - started, 2),
    }


def _before_a_failure(responses: Sequence[Response]) -> list[Response]:
    """The responses before the first one that cannot be written: a file has no gaps."""
    bad = next((i for i, r in enumerate(responses) if r.finish_reason == "error" or not r.ids), len(responses))
    return list(responses[:bad])


def _failure(responses: Sequence[Response], first: Prompt, output: Path) -> ZedaError:
    failed = [r for r in responses if r.finish_reason == "error" or not r.ids]
    return ZedaError(
        f"{len(failed)} of {len(responses)} responses could not be had; the first, to {first.where}: "
        f"{failed[0].error or 'a response without tokens'}",
        where=output,
        fix="see to the engine, or delete that prompt, and run the same command again, which goes on from here",
    )


def _sampling_record(sampling: Sampling, sample: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "samples_per_prompt": sampling.samples_per_prompt,
        "seed": sampling.seed,
        "sample": sample,
    }
    if sampling.stop_token_ids is not None:
        record["stop_token_ids"] = list(sampling.stop_token_ids)
    return record


def _line(source: Source, prompt: Prompt, expected: Expected, response: Response) -> Rollout:
    assert response.finish_reason != "error"
    return Rollout(
        id=prompt.id,
        messages=[*prompt.messages, {"role": "assistant", "content": source.codec.text(response)}],
        prompt_ids=expected.prompt_ids,
        response_ids=response.ids,
        logprobs=response.logprobs,
        finish_reason=response.finish_reason,
        sampling=expected.sampling,
        engine=source.engine.name,
        weights_version=source.weights_version,
        answer=prompt.answer,
        task=prompt.task,
    )


def _progress(total: int, initial: int, quiet: bool) -> Any:
    quiet = quiet or not sys.stderr.isatty()
    return tqdm(total=total, initial=initial, desc="rollout", unit="response", file=sys.stderr, disable=quiet)


def _is_first() -> bool:
    import torch.distributed as dist

    return dist.get_rank() == 0


def _from_first(value: Any) -> Any:
    """What the first rank has, on all ranks."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
