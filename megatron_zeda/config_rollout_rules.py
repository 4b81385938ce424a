"""What stage 2 asks of a configuration: prompts, an engine that can answer them, sampling that fits the objective."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from megatron_zeda.config import Config, RolloutSettings
from megatron_zeda.config_refusals import Problem


def rollout_problems(config: Config) -> Iterator[Problem]:
    """Yield the broken rules about ``rollout`` and stage 2."""
    if config.train.stage == 1:
        yield from _stage_1(config)
        return
    yield from _prompts(config)
    yield from _engine(config)
    yield from _sampling(config)
    yield from _age(config)


def _stage_1(config: Config) -> Iterator[Problem]:
    default = RolloutSettings()
    given = [f.name for f in fields(default) if getattr(config.rollout, f.name) != getattr(default, f.name)]
    if given:
        yield Problem(
            "rollout_stage",
            (*(f"rollout.{name}" for name in given), "train.stage"),
            "has no effect in stage 1, which trains on dataset.train",
            "remove it, or set train.stage=2",
        )


def _prompts(config: Config) -> Iterator[Problem]:
    rollout, train = config.rollout, config.train
    if not rollout.prompts:
        yield Problem(
            "prompts", ("rollout.prompts",), "stage 2 has no prompts to answer", "name one or more jsonl files"
        )
    if config.dataset.train:
        yield Problem(
            "stage_2_data",
            ("dataset.train", "train.stage"),
            "has no effect in stage 2, which trains on the student's own responses to rollout.prompts",
            "use []",
        )
    if train.global_batch_size % rollout.samples_per_prompt:
        yield Problem(
            "samples_per_prompt",
            ("rollout.samples_per_prompt", "train.global_batch_size"),
            f"{rollout.samples_per_prompt} does not divide global_batch_size {train.global_batch_size}, the responses "
            "of a step",
            "use a divisor",
        )


def _engine(config: Config) -> Iterator[Problem]:
    rollout, model = config.rollout, config.model
    if rollout.engine != "megatron":
        if rollout.url is None:
            yield Problem(
                "server",
                ("rollout.url", "rollout.engine"),
                f"not given, and rollout.engine is {rollout.engine}, a server",
                "use http://host:port/v1",
            )
        if rollout.routing_replay:
            yield Problem(
                "routing_replay",
                ("rollout.routing_replay", "rollout.engine"),
                f"true with rollout.engine {rollout.engine}, which does not tell how it routed",
                "use rollout.engine=megatron",
            )
        return
    default = RolloutSettings()
    for name in ("url", "served_model", "reload", "export_format", "timeout_minutes", "max_retries"):
        if getattr(rollout, name) != getattr(default, name):
            yield Problem(
                "server",
                (f"rollout.{name}", "rollout.engine"),
                "has no effect with rollout.engine megatron, which is no server",
                "remove it, or use another engine",
            )
    if model.context_parallel_size > 1:
        yield Problem(
            "megatron_engine",
            ("model.context_parallel_size", "rollout.engine"),
            f"{model.context_parallel_size} with rollout.engine megatron: a new token cannot be split",
            "use 1, or a server",
        )
    if rollout.routing_replay and rollout.steps_per_rollout > 1:
        yield Problem(
            "routing_replay",
            ("rollout.routing_replay", "rollout.steps_per_rollout"),
            f"true with steps_per_rollout {rollout.steps_per_rollout}: no file keeps the routing, so that a run killed "
            "between these steps would generate the rest with newer weights",
            "use rollout.steps_per_rollout=1, or turn it off",
        )


def _sampling(config: Config) -> Iterator[Problem]:
    rollout = config.rollout
    if rollout.top_p == 0:
        yield Problem("top_p", ("rollout.top_p",), "0 leaves no token to draw", "use a share above 0")
    if rollout.temperature == 0 and rollout.samples_per_prompt > 1:
        yield Problem(
            "greedy_samples",
            ("rollout.temperature", "rollout.samples_per_prompt"),
            f"0 is greedy, and {rollout.samples_per_prompt} greedy responses to a prompt are the same",
            "raise it, or set rollout.samples_per_prompt=1",
        )
    sampled = config.distillation.estimator == "sampled" and config.reverse_kl > 0
    if sampled and (rollout.temperature != 1 or rollout.top_p not in (0, 1)):
        yield Problem(
            "sampled_distribution",
            ("rollout.temperature", "rollout.top_p", "distillation.estimator"),
            f"temperature {rollout.temperature:g} and top_p {rollout.top_p:g} with estimator sampled, which estimates "
            "the KL from tokens of the student's own distribution",
            "set both to 1, or use distillation.estimator=full",
        )


def _age(config: Config) -> Iterator[Problem]:
    rollout, train = config.rollout, config.train
    if rollout.steps_per_rollout - 1 > rollout.max_staleness:
        yield Problem(
            "rollout_age",
            ("rollout.max_staleness", "rollout.steps_per_rollout"),
            f"{rollout.max_staleness} with steps_per_rollout {rollout.steps_per_rollout}: the last of these steps "
            f"would use no response, because weights have seen {rollout.steps_per_rollout - 1} steps since",
            f"use {rollout.steps_per_rollout - 1}",
        )
    never_told = rollout.engine != "megatron" and rollout.reload is None
    if never_told and train.train_iters is not None and train.train_iters - 1 > rollout.max_staleness:
        yield Problem(
            "server_weights",
            ("rollout.reload", "rollout.max_staleness"),
            f"null, so that the server keeps the weights it has, and after {rollout.max_staleness + 1} of "
            f"{train.train_iters} steps its responses are too old",
            "use vllm or sglang, as the server is",
        )
