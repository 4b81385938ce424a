"""Generation with ``transformers``, from a Hugging Face folder, static or dynamic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_zeda.platform import device as platform_device
from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.decode import decode
from megatron_zeda.rollout.engine import Request, Response, Sampling
from megatron_zeda.rollout.hf_folder import load_model, read_config, resolve_dtype


class TransformersEngine:
    """A model and its tokenizer, ready to answer prompts."""

    collective = False

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str = "auto",
        device: torch.device | None = None,
        batch_size: int = 128,
        trust_remote_code: bool = False,
        num_experts_per_token: int | None = None,
    ) -> None:
        """Load a folder; see :func:`megatron_zeda.rollout.hf_folder.load_model` for the arguments and errors."""
        import transformers

        self.folder, self.batch_size = folder, batch_size
        self.device = device or platform_device()
        self.config = read_config(folder)
        self.codec = Codec(folder, self.config)
        self.context, self.eos_ids = self.codec.context, self.codec.eos_ids
        self.model = load_model(
            folder,
            device=self.device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            num_experts_per_token=num_experts_per_token,
        )
        compute = str(resolve_dtype(dtype, self.config, self.device)).removeprefix("torch.")
        self.name = f"transformers {transformers.__version__}, {compute}, {self.device.type}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Answer requests; see :class:`~megatron_zeda.rollout.engine.RolloutEngine`."""
        # Longest first: running out of memory happens at once or never.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids), reverse=True)
        responses: dict[int, Response] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            done = decode(
                self.model,
                [requests[i].prompt_ids for i in batch],
                sampling=sampling,
                rows=[requests[i].row for i in batch],
                eos_ids=self.eos_ids,
                context=self.context,
            )
            responses.update(zip(batch, done, strict=True))
        return [responses[i] for i in range(len(requests))]
