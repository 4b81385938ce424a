"""What compares the student with its frozen teacher: the divergence, the teacher itself, and the gate between them."""

from megatron_zeda.distillation.forward import Scores, TeacherStates, num_bytes, score
from megatron_zeda.distillation.kl import vocab_parallel_kl
from megatron_zeda.distillation.teacher import FrozenTeacher, parity_gate

__all__ = ["FrozenTeacher", "Scores", "TeacherStates", "num_bytes", "parity_gate", "score", "vocab_parallel_kl"]
