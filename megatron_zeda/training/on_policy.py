"""Stage 2: every step trains on responses that the student has just given.

A run asks for response 0, 1, 2, ... without end. Response ``r`` is sample ``r % n`` of the prompt at position
``r // n`` of the order that ``dataset.seed`` draws, and its random numbers are those of row ``r``. So nothing but the
number of responses a run has asked for must be saved for it to go on with the same prompts and random numbers.

``<run_dir>/rollouts/step_0000001.jsonl`` holds the responses of the first step, as ``zeda rollout`` writes them. Lines
are appended while they are generated, and a run that was killed uses what is there, if the weights that have sampled it
are those it has again (:mod:`.rollout_files`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from megatron_zeda.config import Config
from megatron_zeda.data import BatchBuilder, BatchOrder, GlobalBatch
from megatron_zeda.errors import InputError
from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.engine import Request, Response, RolloutEngine, Sampling
from megatron_zeda.rollout.files import Prompt, Rollout, read_prompts
from megatron_zeda.rollout.first_rank import from_first, on_first
from megatron_zeda.training.responses import Counts, to_batch, to_samples
from megatron_zeda.training.rollout_files import StepFile, steps_of, weights_version

# ---- prompts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a run, tokenised.

    Attributes:
        prompts: in the order of the files.
        ids: token ids of each.
        codec: what has made them, and makes texts of responses.
        vocab_size: of the model.
    """

    prompts: list[Prompt]
    ids: list[list[int]]
    codec: Codec
    vocab_size: int


def load_prompts(config: Config, hf_config: dict[str, Any]) -> PromptSet:
    """Read and tokenise ``rollout.prompts``.

    Raises:
        InputError: a bad file, a prompt that leaves no room for a response, a tokenizer of another model.
    """
    assert config.hf_dir is not None  # the rules of the configuration demand a model
    # The last token of a sequence is predicted and not read.
    codec = Codec(config.hf_dir, hf_config, tokenizer=config.tokenizer_path, context=config.model.seq_length + 1)
    prompts = [prompt for path in config.rollout.prompts for prompt in read_prompts(Path(path))]
    ids = [codec.encode(prompt) for prompt in prompts]
    for prompt, tokens in zip(prompts, ids, strict=True):
        if max(tokens) >= hf_config["vocab_size"]:
            raise InputError(
                "token id outside the vocabulary",
                where=prompt.where,
                value=max(tokens),
                rule=f"ids are 0 to {hf_config['vocab_size'] - 1}",
                fix="use the tokenizer that belongs to the model",
            )
    if not codec.eos_ids and config.rollout.stop_token_ids is None:
        raise InputError(
            "no token ends a response",
            where=config.hf_dir,
            rule="generation_config.json, config.json or the tokenizer names one",
            fix="set rollout.stop_token_ids",
        )
    return PromptSet(prompts, ids, codec, hf_config["vocab_size"])


@dataclass(frozen=True)
class Wanted:
    """One response that a run asks for: its row, the number of its prompt and which sample of it this is."""

    row: int
    prompt: int
    sample: int


class PromptOrder:
    """Which responses a run asks for; see the module's docstring."""

    def __init__(self, num_prompts: int, *, samples_per_prompt: int, seed: int) -> None:
        self._order, self._samples = BatchOrder(num_prompts, seed=seed), samples_per_prompt

    def rows(self, first: int, count: int) -> list[Wanted]:
        """Responses ``first`` to ``first + count - 1`` of the run."""
        rows = range(first, first + count)
        return [Wanted(row, self._order[row // self._samples], row % self._samples) for row in rows]


# ---- the rollouts of a run ------------------------------------------------------------------------------------------


class State(Protocol):
    """What a run saves and gets back for its rollouts to go on.

    Attributes:
        iteration: steps done.
        consumed_samples: responses asked for.
        weights: name of the student's weights.
        rollout_version: version of the weights that the latest responses were sampled with.
    """

    iteration: int
    consumed_samples: int
    weights: str
    rollout_version: str


class Interrupted(Exception):
    """A rank was asked to stop while responses were generated; raised on all ranks. What there is lies on disk."""


@dataclass
class _Collected:
    """The responses of one step while they come, by row."""

    wanted: list[Wanted]
    responses: dict[int, Response] = field(default_factory=dict)
    reused: int = 0
    seconds: float = 0.0


class Rollouts:
    """The responses of every step of a run; all ranks make the same calls."""

    def __init__(
        self,
        config: Config,
        prompts: PromptSet,
        builder: BatchBuilder,
        engine: RolloutEngine,
        *,
        train_iters: int,
        begin: Callable[[str], None] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Args:
        config: the configuration of the run.
        prompts: what is asked.
        builder: makes batches.
        engine: gives responses. ``collective`` (default True) says that all ranks call it; else the first one does.
        train_iters: steps of the whole run: nothing is generated for later ones.
        begin: called on all ranks before responses are generated, with the version of the student's weights.
        stopping: whether this rank wants to stop.
        """
        rollout = config.rollout
        self.config, self.prompts, self.builder, self.engine = config, prompts, builder, engine
        self._train_iters, self._begin, self._stopping = train_iters, begin, stopping
        self.order = PromptOrder(
            len(prompts.ids), samples_per_prompt=rollout.samples_per_prompt, seed=config.dataset.seed
        )
        self.sampling = Sampling(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            samples_per_prompt=rollout.samples_per_prompt,
            seed=config.train.seed,
            stop_token_ids=None if rollout.stop_token_ids is None else tuple(rollout.stop_token_ids),
        )
        self._ahead: dict[int, _Collected] = {}  # of steps to come
        self._first = dist.get_rank() == 0
        self._collective = getattr(engine, "collective", True)

    def step(self, state: State) -> tuple[GlobalBatch | None, Counts]:
        """The batch of the next step; a collective call.

        Returns:
            The batch, None where every response was dropped, and what became of the responses.

        Raises:
            Interrupted: some rank wants to stop.
            ZedaError: the engine cannot be used.
        """
        if state.iteration not in self._ahead:
            self._collect(state)
        collected = self._ahead.pop(state.iteration)
        pairs = [(self.prompts.ids[item.prompt], collected.responses[item.row]) for item in collected.wanted]
        samples, counts = to_samples(
            pairs,
            self.config,
            step=state.iteration,
            vocab_size=self.prompts.vocab_size,
            where=f"step {state.iteration + 1}",
        )
        counts.reused, counts.seconds = collected.reused, round(collected.seconds, 3)
        return to_batch(samples, self.builder), counts

    def _collect(self, state: State) -> None:
        """Get the responses of this step and of those to come that are generated with it."""
        together, size = self.config.rollout.steps_per_rollout, self.config.train.global_batch_size
        first = state.iteration
        last = min(first - first % together + together, self._train_iters)
        # A run that was stopped between two rollouts uses the rest of the older one.
        resumed = first % together != 0
        version = state.rollout_version if resumed else self._version(state)
        begun = False
        for step in range(first, last):
            collected = _Collected(self.order.rows(state.consumed_samples + (step - first) * size, size))
            file = StepFile(self.config.run_dir, step + 1) if self._first else None
            if not self._reuse(collected, file, version, as_it_is=resumed):
                if resumed:  # it is gone
                    resumed, version = False, self._version(state)
                    collected.responses.clear()
                    self._restart(collected, file)
                if not begun and self._begin is not None:
                    self._begin(version)
                begun = True
                self._generate(collected, file, version)
            self._ahead[step] = collected
        state.rollout_version = version

    def _version(self, state: State) -> str:
        """Of the weights that responses are sampled with now."""
        if not self._collective and self.config.rollout.reload is None:
            return weights_version(0, "first")  # a server that is never told
        return weights_version(state.iteration, state.weights)

    def _restart(self, collected: _Collected, file: StepFile | None) -> None:
        collected.reused = 0
        if file is not None:
            file.begin([])

    def _reuse(self, collected: _Collected, file: StepFile | None, version: str, *, as_it_is: bool) -> bool:
        """Take what an earlier start of the run has generated; whether nothing else is to come.

        Responses that could not be had are asked for again, unless a finished file is taken ``as_it_is``: the weights
        for the rest of it are gone.
        """
        found: tuple[dict[int, Rollout], bool] = ({}, False)
        if file is not None:
            expected = {item.row: self._record(item) for item in collected.wanted}
            ids = {item.row: self.prompts.ids[item.prompt] for item in collected.wanted}

            def fits(rollout: Rollout) -> bool:
                row = rollout.sampling.get("row")
                return (
                    isinstance(row, int)
                    and rollout.weights_version == version
                    and expected.get(row) == rollout.sampling
                    and rollout.prompt_ids == ids[row]
                    and rollout.logprobs is not None
                    and rollout.engine == self.engine.name
                )

            # Its routing is in no file: what is to be replayed is generated again.
            if not self.config.rollout.routing_replay:
                found = file.read(fits)
        rollouts, finished = from_first(found)
        for row, rollout in rollouts.items():
            collected.responses[row] = Response(
                ids=rollout.response_ids,
                logprobs=rollout.logprobs or [],
                finish_reason=rollout.finish_reason,
                weights_version=steps_of(version),
            )
        collected.reused = len(rollouts)
        complete = len(rollouts) == len(collected.wanted)
        if finished and rollouts and as_it_is and not complete:
            complete = True
            for item in collected.wanted:
                lost = Response(finish_reason="error", error="an earlier start of the run did not get it")
                collected.responses.setdefault(item.row, lost)
        if file is not None and not (complete and finished):
            file.begin(rollouts.values())
            if complete:
                file.finish()
        return complete

    def _generate(self, collected: _Collected, file: StepFile | None, version: str) -> None:
        """Ask the engine for what is not there yet, group by group."""
        started = time.perf_counter()
        missing = [item for item in collected.wanted if item.row not in collected.responses]
        group = self.config.rollout.batch_size * (self.builder.layout.data_parallel_size if self._collective else 1)
        for begin in range(0, len(missing), group):
            if _any_rank(self._stopping()):
                raise Interrupted
            items = missing[begin : begin + group]
            responses = self._answer([Request(self.prompts.ids[item.prompt], item.row) for item in items])
            for item, response in zip(items, responses, strict=True):
                if response.weights_version is None and response.finish_reason != "error":
                    response.weights_version = steps_of(version)
                collected.responses[item.row] = response
            if file is not None:
                file.append(self._lines(items, responses, version))
        if file is not None:
            file.finish()
        collected.seconds = time.perf_counter() - started

    def _answer(self, requests: list[Request]) -> list[Response]:
        if self._collective:
            return self.engine.generate(requests, self.sampling)
        return on_first(lambda: self.engine.generate(requests, self.sampling))

    def _lines(self, items: Sequence[Wanted], responses: Sequence[Response], version: str) -> list[Rollout]:
        """What is written of the responses that there are."""
        return [
            Rollout(
                id=self.prompts.prompts[item.prompt].id,
                messages=[
                    *self.prompts.prompts[item.prompt].messages,
                    {"role": "assistant", "content": self.prompts.codec.text(response)},
                ],
                prompt_ids=self.prompts.ids[item.prompt],
                response_ids=response.ids,
                logprobs=response.logprobs,
                finish_reason=response.finish_reason,
                sampling=self._record(item),
                engine=self.engine.name,
                weights_version=version if response.weights_version == steps_of(version) else _other(response),
                answer=self.prompts.prompts[item.prompt].answer,
                task=self.prompts.prompts[item.prompt].task,
            )
            for item, response in zip(items, responses, strict=True)
            if response.finish_reason != "error" and response.ids
        ]

    def _record(self, item: Wanted) -> dict[str, Any]:
        """The ``sampling`` field of a response."""
        record = asdict(self.sampling)
        stop = record.pop("stop_token_ids")
        if stop is not None:
            record["stop_token_ids"] = list(stop)
        return record | {"sample": item.sample, "row": item.row}


def _other(response: Response) -> str:
    """The version of weights that were not asked for: a server has not loaded the new ones yet."""
    return weights_version(response.weights_version or 0, "older")


def _any_rank(mine: bool) -> bool:
    if dist.get_world_size() == 1:
        return mine
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return any(everyone)
