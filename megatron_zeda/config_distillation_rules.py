"""The rules of :mod:`.config_rules` about the objective and the teacher."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_zeda.config import Config
from megatron_zeda.config_refusals import Problem


def distillation_problems(config: Config) -> Iterator[Problem]:
    """Terms that need what is not there, and settings of terms that are not in the objective."""
    yield from _terms(config)
    yield from _without_effect(config)
    yield from _teacher_fp8(config)


def _terms(config: Config) -> Iterator[Problem]:
    settings, stage = config.distillation, config.train.stage
    if config.distils and config.teacher.checkpoint is None:
        name, weight = (
            ("forward_kl", settings.forward_kl) if settings.forward_kl > 0 else ("reverse_kl", config.reverse_kl)
        )
        yield Problem(
            "teacher_needed",
            ("teacher.checkpoint", f"distillation.{name}"),
            f"not given, and distillation.{name} is {weight:g}",
            "name the Megatron folder of the original model",
        )
    if config.distils and config.model.overrides.get("defer_embedding_wgrad_compute"):
        yield Problem(
            "deferred_output_gradient",
            ("model.overrides.defer_embedding_wgrad_compute", "distillation.forward_kl", "distillation.reverse_kl"),
            "true with a KL in the objective, which makes the output layer's gradient and leaves nothing to defer",
            "remove it",
        )
    if stage == 2 and not config.distils and config.cross_entropy > 0:
        yield Problem(
            "stage_2_objective",
            ("distillation.reverse_kl", "distillation.forward_kl", "train.stage"),
            "0 in stage 2, whose responses are the student's own: without a KL nothing of the teacher is in them",
            "use 1.0",
        )
    if settings.estimator != "sampled" or config.reverse_kl == 0:
        return
    if stage == 1:
        yield Problem(
            "sampled",
            ("distillation.estimator", "train.stage"),
            "sampled in stage 1, whose tokens the student did not sample",
            "use full",
        )
    if settings.temperature != 1.0:
        yield Problem(
            "sampled",
            ("distillation.temperature", "distillation.estimator"),
            f"{settings.temperature:g} with estimator sampled, whose tokens come from the models as they are",
            "use 1.0, or estimator full",
        )


def _without_effect(config: Config) -> Iterator[Problem]:
    settings = config.distillation
    default, reverse = type(settings)(), config.reverse_kl > 0
    needs = [
        ("temperature", config.distils, "a KL in the objective"),
        ("chunk_size", config.distils, "a KL in the objective"),
        ("estimator", reverse, "a reverse KL in the objective"),
        ("topk", reverse and settings.estimator == "topk", "a reverse KL with estimator topk"),
        ("clip_ratio_low", reverse and settings.estimator == "sampled", "a reverse KL with estimator sampled"),
        ("clip_ratio_high", reverse and settings.estimator == "sampled", "a reverse KL with estimator sampled"),
        ("importance_cap", config.train.stage == 2, "responses that the student sampled (train.stage=2)"),
    ]
    for name, used, needed in needs:
        value = getattr(settings, name)
        if not used and value != getattr(default, name):
            keys = (f"distillation.{name}", "distillation.reverse_kl", "distillation.estimator")
            yield Problem("term_settings", keys, f"{value} has no effect without {needed}", "remove it")


def _teacher_fp8(config: Config) -> Iterator[Problem]:
    teacher, keys = config.teacher, ("teacher.fp8_recipe", "teacher.fp8")
    if teacher.fp8 in ("model", "none"):
        if teacher.fp8_recipe is not None:
            message = f"{teacher.fp8_recipe} has no effect with teacher.fp8 {teacher.fp8}"
            yield Problem("teacher_fp8", keys, message, "set teacher.fp8=hybrid, or use null")
    elif not config.model.bf16:
        message = f"{teacher.fp8} with model.bf16 false: what is not in FP8 computes in bf16"
        yield Problem("teacher_fp8", ("teacher.fp8", "model.bf16"), message, "set model.bf16=true, or use none")
    elif config.model.fp8 is not None and config.teacher_fp8[1] != config.model.fp8_recipe:
        message = f"{teacher.fp8_recipe}, and model.fp8_recipe is {config.model.fp8_recipe}"
        yield Problem("teacher_fp8", (*keys, "model.fp8_recipe"), message, "use null")
