"""The teacher of a run: built at the student's layout, checked to be the student's, kept as long as it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_zeda.config import Config
from megatron_zeda.config_megatron import teacher_transformer_config
from megatron_zeda.conversion import megatron_io
from megatron_zeda.conversion.megatron_io import HF_FOLDER
from megatron_zeda.distillation import FrozenTeacher
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.models import family_for, load_hf_config, teacher_topk
from megatron_zeda.training import checkpoint, setup


def build(config: Config, hf_config: dict[str, Any]) -> FrozenTeacher | None:
    """Load ``teacher.checkpoint`` at the layout of the run; None where none is named. A collective call.

    Args:
        config: the configuration of the run.
        hf_config: the student's ``config.json``.

    Raises:
        InputError: teacher and student do not belong together.
        ZedaError: its checkpoint cannot be loaded.
    """
    if config.teacher.checkpoint is None:
        return None
    folder = Path(config.teacher.checkpoint)
    teacher_config = load_hf_config(folder / HF_FOLDER)
    check_pair(hf_config, teacher_config, folder)
    model_config = teacher_transformer_config(config, teacher_config, where=folder)
    chunks = setup.build_chunks(teacher_config, model_config)
    checkpoint.load_weights(chunks, folder)
    return FrozenTeacher(chunks, placement=config.teacher.placement, fp8=config.teacher_fp8[0] is not None)


def check_pair(student: dict[str, Any], teacher: dict[str, Any], folder: Path) -> None:
    """Refuse a teacher that the student cannot have been made from.

    Args:
        student, teacher: their ``config.json``.
        folder: the teacher's checkpoint.

    Raises:
        InputError: saying what differs.
    """
    family = family_for(teacher, where=folder)
    if family.num_zero_experts(teacher):
        raise InputError(
            "the teacher has zero experts",
            where=folder,
            rule="the teacher is the static model the student was made from, not the student",
            fix="name the checkpoint that checkpoint_tools/hf_to_megatron.py wrote from the original model",
        )
    if "layout" in megatron_io.read_manifest(megatron_io.latest_checkpoint_dir(folder)):
        raise InputError(
            "the teacher is a checkpoint that training has written",
            where=folder,
            rule="the teacher is the original model, which nothing has trained since its import",
            fix="name the checkpoint that checkpoint_tools/hf_to_megatron.py wrote from the original model",
        )
    differing = [f"family ({family_for(student).name} and {family.name})"]
    if family.name == family_for(student).name:
        of_student, of_teacher = _without_zero_experts(student), _without_zero_experts(teacher)
        differing = sorted(
            f"{name} ({of_student[name]} and {of_teacher.get(name)})"
            for name in of_student
            if of_student[name] != of_teacher.get(name)
        )
    if differing:
        raise InputError(
            f"teacher and student do not belong together: {', '.join(differing)}",
            where=folder,
            rule="they differ in their routers only",
            fix="name the checkpoint the student was injected from",
        )


def _without_zero_experts(hf_config: dict[str, Any]) -> dict[str, Any]:
    """What Megatron-Core builds a model from, as far as teacher and student share it."""
    family = family_for(hf_config)
    values = {**family.transformer_config_kwargs(hf_config), **family.gpt_model_kwargs(hf_config)}
    values["moe_router_topk"] = teacher_topk(hf_config)  # before NET lowered it
    own = (
        "num_zero_experts",
        "zero_expert_logit_bias",
        "init_method_std",
        "zero_expert_renormalize",
        "zero_expert_type",
        "dynamic_skipping_beta",
        "teacher_router_topk",
    )
    return {name: value for name, value in values.items() if name not in own}


def check_unchanged(teacher: FrozenTeacher, before: str, config: Config) -> None:
    """Law 8: the bytes of this rank's teacher are those of :meth:`FrozenTeacher.fingerprint` ``before``.

    Raises:
        ZedaError: they are not.
    """
    if teacher.fingerprint() != before:
        raise ZedaError(
            "the teacher's weights changed while the student was trained",
            where=config.teacher.checkpoint,
            rule="nothing writes them",
            fix="check the memory of this machine; what was trained since the last start is not to be trusted",
        )
