"""Where responses come from: prompts in, responses with their token ids and log-probabilities out."""

from megatron_zeda.rollout.decode import Response, Sampling
from megatron_zeda.rollout.files import Prompt, Rollout, read_prompts, read_rollouts
from megatron_zeda.rollout.transformers_engine import TransformersEngine, rollout

__all__ = [
    "Prompt",
    "Response",
    "Rollout",
    "Sampling",
    "TransformersEngine",
    "read_prompts",
    "read_rollouts",
    "rollout",
]
