"""A run from beginning to end, in reading order."""

from __future__ import annotations

import logging
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_zeda.config import Config, derived, num_train_iters
from megatron_zeda.config_io import to_yaml
from megatron_zeda.config_megatron import transformer_config
from megatron_zeda.conversion import megatron_io
from megatron_zeda.data import GlobalBatch, training_batches
from megatron_zeda.distillation import FrozenTeacher, TeacherStates, parity_gate, sanity_gate
from megatron_zeda.errors import InputError, ZedaError, disk_errors
from megatron_zeda.training import banner, checkpoint, methods, setup, validation
from megatron_zeda.training import teacher as teachers
from megatron_zeda.training.checkpoint import Progress
from megatron_zeda.training.engines import build_rollouts
from megatron_zeda.training.metrics import Metrics
from megatron_zeda.training.on_policy import Interrupted
from megatron_zeda.training.responses import Counts, check_engine, rollout_values
from megatron_zeda.training.rollout_files import first_weights, next_weights
from megatron_zeda.training.signals import StopRequest
from megatron_zeda.training.step import StepResult, no_step, train_step
from megatron_zeda.training.weight_control import control_weight, start_weight, weight_of
from megatron_zeda.zero_experts import RouterStatistics, router_statistics


def train(config: Config) -> int:
    """Run (or go on with) the training a configuration describes; called on every rank.

    Returns:
        The exit code: 0 when the run is finished, or was asked to stop and has saved.

    Raises:
        InputError: data, checkpoints or settings are wrong.
        ZedaError: the parity gate, a checkpoint or the disk failed, or the loss stayed infinite.
    """
    _quiet_upstream()
    with StopRequest(minutes=config.train.exit_duration_in_mins) as stop:
        created = setup.start_processes(config)
        first = torch.distributed.get_rank() == 0
        returned = complete = False
        try:
            complete = _run(config, stop)
            returned = True
        finally:
            # After an error the other ranks may be inside a collective: only the end of the process frees them.
            if returned or torch.distributed.get_world_size() == 1:
                setup.end_processes(created)
    # It may take longer than a collective waits, so nobody waits for it.
    if complete and config.checkpoint.export_hf and first:
        _export(config)
    return 0


def _quiet_upstream() -> None:
    """Keep notices about kernels that are not there and APIs that will change out of the user's output."""
    for name in ("megatron.core", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for category in (UserWarning, FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"(megatron|torch)\.")


@dataclass
class _Student:
    """What a step changes."""

    chunks: list[Any]
    optimizer: Any
    scheduler: Any
    progress: Progress


def _run(config: Config, stop: StopRequest) -> bool:
    """Everything that needs all ranks.

    Returns:
        Whether the last step is done.
    """
    hf_config = methods.student_hf_config(config)
    data = setup.load_data(config, hf_config)
    train_iters = num_train_iters(config, data.num_samples)
    assert train_iters is not None  # the rules of the configuration demand train_iters or train_epochs
    held_out = validation.held_out(config, data.validation) if data.validation else None
    resumed_from = checkpoint.resume_folder(config)
    if resumed_from is None:
        _need_no_metrics(config)

    # The teacher comes first. Unless it is in the objective, only its hidden states on the held-out batches stay.
    fixture = _fixture(data, held_out)
    teacher = teachers.build(config, hf_config)
    teacher_bytes = teacher.fingerprint() if teacher is not None else ""
    fixture_states = _run_teacher(config, teacher, held_out, fixture)
    about_teacher = banner.teacher_lines(config, teacher, held_out, fixture_states)
    if teacher is not None and not config.distils:
        teachers.check_unchanged(teacher, teacher_bytes, config)
        teacher = None
    if config.zero_experts.method == "dynamic_skipping":  # there is nothing to train
        lines = methods.calibrate(config, hf_config, data, held_out)
        if torch.distributed.get_rank() == 0:
            print("\n".join([*about_teacher, *lines]), flush=True)
        return True

    student = _build_student(config, hf_config, train_iters, from_scratch=resumed_from is None)
    restored_rng, changes = True, list[str]()
    if resumed_from is not None:
        changes = checkpoint.changed_settings(config, resumed_from)
        student.progress, restored_rng = checkpoint.resume(
            config, resumed_from, student.chunks, student.optimizer, student.scheduler
        )
    first = torch.distributed.get_rank() == 0
    if first:
        with disk_errors(config.run_dir):
            config.run_dir.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(config.run_dir / "config.yaml", to_yaml(config))
    metrics = Metrics(
        config.run_dir,
        enabled=first,
        tensorboard=config.logger.tensorboard,
        start_step=student.progress.iteration,
        last_step=train_iters,
        log_interval=config.logger.log_interval,
    )
    try:
        facts = derived(config, torch.distributed.get_world_size(), hf_config) | {"train_iters": train_iters}
        for line in [*banner.lines(config, facts, data, student.chunks), *about_teacher]:
            metrics.say(line)
        if resumed_from is not None:
            note = "" if restored_rng else " (at another layout: random states start anew)"
            metrics.say(f"resuming at step {student.progress.iteration} from {resumed_from}{note}")
            for line in changes:
                metrics.say(line)
        elif fixture is not None and fixture_states is not None:
            metrics.say(_gate(config, student, fixture_states, fixture))
        del fixture_states
        _loop(config, student, teacher, data, held_out, train_iters, metrics, stop)
        if teacher is not None:
            teachers.check_unchanged(teacher, teacher_bytes, config)
            metrics.say(f"the teacher is what it was before: SHA-256 {teacher_bytes[:16]}... on this rank")
    finally:
        metrics.close()
        setup.release(student.chunks)
    return student.progress.iteration >= train_iters


def _need_no_metrics(config: Config) -> None:
    """Refuse to begin in the folder of another run, whose configuration and metrics would be lost.

    A run of the very same configuration is this one: it was killed before its first checkpoint, and begins anew.
    """
    path, settings = config.run_dir / "metrics.jsonl", config.run_dir / "config.yaml"
    same_run = settings.is_file() and settings.read_text(encoding="utf-8") == to_yaml(config)
    if path.is_file() and path.stat().st_size and not same_run:
        raise InputError(
            "the metrics of a run, but no checkpoint to go on from",
            where=path,
            rule="a new run needs a folder without metrics.jsonl",
            fix="choose another logger.run_dir, or remove the file if the run in it may be forgotten",
        )


def _build_student(config: Config, hf_config: dict[str, Any], train_iters: int, *, from_scratch: bool) -> _Student:
    assert config.model.checkpoint is not None and config.hf_dir is not None
    chunks = setup.build_chunks(hf_config, transformer_config(config, hf_config, where=config.hf_dir))
    if from_scratch:
        checkpoint.load_weights(chunks, Path(config.model.checkpoint))
    methods.freeze(config, chunks)
    wrapped = setup.wrap_for_training(config, chunks)
    optimizer, scheduler = setup.build_optimizer(config, wrapped, train_iters=train_iters)
    for chunk in wrapped:
        chunk.train()
    return _Student(wrapped, optimizer, scheduler, Progress())


def _fixture(data: setup.Data, held_out: validation.HeldOut | None) -> GlobalBatch | None:
    """What the teacher is checked on before the first step; None where the first responses come first."""
    if held_out:
        return held_out.batches[0]
    return next(training_batches(data.train, seed=0, consumed_samples=0)) if data.train.samples else None


def _gate(config: Config, student: _Student, states: TeacherStates, fixture: GlobalBatch) -> str:
    """Refuse a teacher that is not the student's (law 8), and say what was measured.

    A student that was trained before is another model than its teacher: of that teacher it is only asked that it
    predicts responses.
    """
    source = megatron_io.latest_checkpoint_dir(Path(str(config.model.checkpoint)))
    trained = config.train.stage == 2 and "layout" in megatron_io.read_manifest(source)
    with setup.whole_parameters(student.chunks):
        if trained:
            return banner.sane_line(sanity_gate(student.chunks, states, fixture))
        return banner.gate_line(parity_gate(student.chunks, states, fixture, exact=not config.model.bf16))


def _run_teacher(
    config: Config, teacher: FrozenTeacher | None, held_out: validation.HeldOut | None, fixture: GlobalBatch | None
) -> TeacherStates | None:
    """The teacher's states on the fixture, in the student's precision; those on the held-out batches go there."""
    if teacher is None or fixture is None:
        return None
    if held_out:
        held_out.teacher = [teacher.states(batch) for batch in held_out.batches]
    student_fp8 = config.model.fp8 is not None
    if held_out and held_out.teacher and teacher.fp8 == student_fp8:
        return held_out.teacher[0]
    return teacher.states(fixture, fp8=student_fp8)


def _loop(
    config: Config,
    student: _Student,
    teacher: FrozenTeacher | None,
    data: setup.Data,
    held_out: validation.HeldOut | None,
    train_iters: int,
    metrics: Metrics,
    stop: StopRequest,
) -> None:
    progress = student.progress
    if progress.iteration >= train_iters:
        metrics.say(f"nothing left to do: step {progress.iteration} of {train_iters} is reached")
        return
    start_weight(config, student.chunks, progress)
    if progress.iteration == 0 and held_out is not None:
        metrics.say(banner.validation_line(0, _validate(student, held_out)))
    objective = setup.build_objective(config)
    next_batch = _batches(config, student, data, train_iters, stop)
    saved = progress.iteration
    # Without a fixture the first responses are one, of whichever step. A student with updates was checked before them.
    gated = held_out is not None or data.prompts is None or progress.skipped_steps < progress.iteration
    empty_in_a_row = 0
    while progress.iteration < train_iters:
        started = time.perf_counter()
        try:
            batch, counts = next_batch()
        except Interrupted:
            if progress.iteration > saved:  # else the checkpoint, or the beginning, is what there is to go on from
                metrics.say(f"step {progress.iteration}: saved {_save(config, student)}")
            metrics.say(_stopping_line(progress, stop))
            return
        learning_rate = float(student.optimizer.param_groups[0]["lr"])
        if batch is None:
            result = no_step(stop=stop.requested())
        else:
            states = None if teacher is None else teacher.states(batch)
            if teacher is not None and states is not None and not gated:
                metrics.say(_gate(config, student, _in_student_precision(config, teacher, batch, states), batch))
                gated = True
            result = train_step(
                student.chunks,
                student.optimizer,
                student.scheduler,
                batch,
                objective=objective,
                teacher_states=states,
                stop=stop.requested(),
                balance_tokens=config.zero_experts.balance_tokens,
            )
        statistics = router_statistics(student.chunks)
        seconds = time.perf_counter() - started

        progress.iteration += 1
        progress.consumed_samples += config.train.global_batch_size
        progress.skipped_steps += not result.updated
        weight = weight_of(student.chunks, progress)
        if result.updated:
            control_weight(config, student.chunks, progress, statistics.skip_rate)
        progress.skipped_in_a_row = 0 if result.updated else progress.skipped_in_a_row + 1
        empty_in_a_row = 0 if result.updated else empty_in_a_row + (batch is None)

        tokens = 0 if batch is None else batch.tokens
        values = _step_values(config, progress, result, statistics, learning_rate, tokens / seconds)
        values["zero_expert_weight"] = weight
        if counts is not None:
            values["rollout"] = rollout_values(counts, result.sums, progress.rollout_version)
            progress.weights = next_weights(config, progress.weights, result.loss, result.grad_norm)
        if held_out is not None and (
            progress.iteration % config.validation.eval_interval == 0 or progress.iteration == train_iters
        ):
            outcome = _validate(student, held_out)
            values["validation"] = asdict(outcome)
            metrics.say(banner.validation_line(progress.iteration, outcome))
        metrics.step(values)
        if batch is None and counts is not None:
            metrics.say(f"step {progress.iteration}: nothing to train on: {counts.summary()}")
        if counts is not None:
            check_engine(config, values["rollout"], progress.iteration)

        if progress.skipped_in_a_row >= config.train.max_skipped_steps:
            raise _without_updates(progress, empty_in_a_row, counts)
        ending = result.stop or progress.iteration == train_iters
        if ending or progress.iteration % config.checkpoint.save_interval == 0:
            folder = _save(config, student)
            metrics.say(f"step {progress.iteration}: saved {folder}")
            saved = progress.iteration
        if result.stop:
            metrics.say(_stopping_line(progress, stop))
            return


def _in_student_precision(
    config: Config, teacher: FrozenTeacher, batch: GlobalBatch, states: TeacherStates
) -> TeacherStates:
    """The teacher's states for the gate, which would take the noise of FP8 on one side for a difference."""
    student_fp8 = config.model.fp8 is not None
    return states if teacher.fp8 == student_fp8 else teacher.states(batch, fp8=student_fp8)


def _without_updates(progress: Progress, empty: int, counts: Counts | None) -> ZedaError:
    """Why a run gives up: ``empty`` of the last steps had nothing to train on, the others were not finite."""
    what, fixes = [], []
    if empty < progress.skipped_in_a_row:
        what.append(f"{progress.skipped_in_a_row - empty} without a finite loss and gradient")
        fixes.append("lower optimizer.lr, and look at the data of these steps")
    if empty and counts is not None:
        what.append(f"{empty} with nothing to train on (the latest responses: {counts.summary()})")
        fixes.append(counts.remedy())
    return ZedaError(
        f"{progress.skipped_in_a_row} steps in a row changed nothing: {', '.join(what)}",
        where=f"step {progress.iteration}",
        fix=f"{'; '.join(fixes)}; the last checkpoint is intact",
    )


def _stopping_line(progress: Progress, stop: StopRequest) -> str:
    reason = stop.reason or "another process was asked to stop"
    return f"stopping after step {progress.iteration}: {reason}; the same command goes on from here"


def _batches(
    config: Config, student: _Student, data: setup.Data, train_iters: int, stop: StopRequest
) -> Callable[[], tuple[GlobalBatch | None, Counts | None]]:
    """What gives the batch of the next step: in stage 1 the data, in stage 2 the student's own responses."""
    progress = student.progress
    if data.prompts is None:
        batches = training_batches(data.train, seed=config.dataset.seed, consumed_samples=progress.consumed_samples)
        return lambda: (next(batches), None)
    rollouts = build_rollouts(config, data.prompts, data.train, student.chunks, train_iters, stopping=stop.requested)
    progress.weights = progress.weights or first_weights(config)

    def step() -> tuple[GlobalBatch | None, Counts]:
        with setup.whole_parameters(student.chunks):
            return rollouts.step(progress)

    return step


def _validate(student: _Student, held_out: validation.HeldOut) -> validation.ValidationResult:
    with setup.whole_parameters(student.chunks):
        return validation.validate(student.chunks, held_out)


def _save(config: Config, student: _Student) -> Path:
    with setup.whole_parameters(student.chunks):
        return checkpoint.save_checkpoint(
            config, student.chunks, student.optimizer, student.scheduler, student.progress
        )


def _step_values(
    config: Config,
    progress: Progress,
    result: StepResult,
    statistics: RouterStatistics,
    learning_rate: float,
    tokens_per_second: float,
) -> dict[str, Any]:
    """One line of ``metrics.jsonl``. ``loss`` is the objective; ``balance_loss`` a mean over layers, without alpha."""
    balance = config.zero_experts.balance_coeff * sum(statistics.balance_loss_per_layer)
    return {
        "step": progress.iteration,
        "loss": result.loss + balance,
        "ce": result.ce,
        "kl_forward": result.kl_forward,
        "kl_reverse": result.kl_reverse,
        "balance_loss": statistics.balance_loss,
        "balance_loss_per_layer": list(statistics.balance_loss_per_layer),
        "skip_rate": statistics.skip_rate,
        "skip_rate_per_layer": statistics.skip_rate_per_layer,
        "grad_norm": result.grad_norm,
        "lr": learning_rate,
        "tokens_per_second": tokens_per_second,
        "skipped_steps": progress.skipped_steps,
    }


def _export(config: Config) -> None:
    """Write the student as a Hugging Face folder, replacing the one of an earlier end of this run; on one rank."""
    from megatron_zeda.conversion import megatron_to_hf

    target, fresh = config.run_dir / "hf", config.run_dir / ".hf.new"
    try:
        with disk_errors(fresh):
            if fresh.exists():  # an export was killed
                shutil.rmtree(fresh)
            fresh.mkdir()
            source, options = methods.export_source(config)
            megatron_to_hf(source, fresh / "hf", **options)
            if target.exists():
                shutil.rmtree(target)
            os.replace(fresh / "hf", target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    print(f"exported {target}", flush=True)
