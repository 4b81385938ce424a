"""What an exported model is worth: accuracy, perplexity, KL to its teacher, skip rate, FLOPs, the report of a run."""

from megatron_zeda.evaluation.accuracy import (
    Accuracy,
    PairedDifference,
    measure_accuracy,
    paired_difference,
    wilson_interval,
)
from megatron_zeda.evaluation.evaluate import evaluate
from megatron_zeda.evaluation.flops import ModelShape, expert_flops_saved, model_speedup, theoretical_speedup
from megatron_zeda.evaluation.report import build_report, report, write_report
from megatron_zeda.evaluation.scoring import score_rollouts, score_text
from megatron_zeda.evaluation.skip_rate import RoutingRecorder

__all__ = [
    "Accuracy",
    "ModelShape",
    "PairedDifference",
    "RoutingRecorder",
    "build_report",
    "evaluate",
    "expert_flops_saved",
    "measure_accuracy",
    "model_speedup",
    "paired_difference",
    "report",
    "score_rollouts",
    "score_text",
    "theoretical_speedup",
    "wilson_interval",
    "write_report",
]
