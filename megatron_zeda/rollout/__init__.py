"""Where responses come from: prompts in, responses with their token ids and log-probabilities out."""

from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.engine import Request, Response, RolloutEngine, Sampling
from megatron_zeda.rollout.files import Prompt, Rollout, read_prompts, read_rollouts
from megatron_zeda.rollout.run import Source, rollout
from megatron_zeda.rollout.transformers_engine import TransformersEngine

__all__ = [
    "Codec",
    "Prompt",
    "Request",
    "Response",
    "Rollout",
    "RolloutEngine",
    "Sampling",
    "Source",
    "TransformersEngine",
    "read_prompts",
    "read_rollouts",
    "rollout",
]
