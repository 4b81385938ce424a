"""What compares the student with its frozen teacher: objectives, the teacher itself, and the gate between them."""

from megatron_zeda.distillation.estimators import SUM_NAMES, combine_sums
from megatron_zeda.distillation.forward import Scores, TeacherStates, num_bytes, ready_weight, score, whole_hidden
from megatron_zeda.distillation.kl import vocab_parallel_kl
from megatron_zeda.distillation.objective import Objective, linear_objective
from megatron_zeda.distillation.teacher import FrozenTeacher, check_sane, parity_gate, sanity_gate

__all__ = [
    "SUM_NAMES",
    "FrozenTeacher",
    "Objective",
    "Scores",
    "TeacherStates",
    "check_sane",
    "combine_sums",
    "linear_objective",
    "num_bytes",
    "parity_gate",
    "ready_weight",
    "sanity_gate",
    "score",
    "vocab_parallel_kl",
    "whole_hidden",
]
