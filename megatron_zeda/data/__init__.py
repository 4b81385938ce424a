"""From jsonl to the tensors of a step: tokenizers, chats and rollouts, deterministic batches."""

from megatron_zeda.data.batches import (
    BatchBuilder,
    BatchLayout,
    BatchOrder,
    GlobalBatch,
    MicroBatch,
    PackedBatchBuilder,
    evaluation_batches,
    training_batches,
)
from megatron_zeda.data.chat import Sample, SampleStatistics, encode_messages, load_samples
from megatron_zeda.data.tokenizer import ChatTokenizer, load_tokenizer

__all__ = [
    "BatchBuilder",
    "BatchLayout",
    "BatchOrder",
    "ChatTokenizer",
    "GlobalBatch",
    "MicroBatch",
    "PackedBatchBuilder",
    "Sample",
    "SampleStatistics",
    "encode_messages",
    "evaluation_batches",
    "load_samples",
    "load_tokenizer",
    "training_batches",
]
