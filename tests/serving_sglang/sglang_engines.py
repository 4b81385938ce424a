"""Runs SGLang on one folder after the other, in a process of its own: ``sglang_engines.py CASES.json RESULTS.json``.

A case is ``{"name", "folder", "arguments"}``; its result ``{"tokens", "logprobs", "prompt_logprobs"}`` or
``{"error"}``. ``stubs`` must be on ``PYTHONPATH``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(__file__).with_name("stubs")),
    "SGLANG_USE_CPU_ENGINE": "1",
}
ARGUMENTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_radix_cache": True,
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "context_length": 64,
    "max_total_tokens": 256,
    "max_running_requests": 4,
    "skip_server_warmup": True,
}
NEW_TOKENS = 8


def prompts(vocab_size: int) -> list[list[int]]:
    """Three prompts of different lengths."""
    return [[(7 * i + 11 * row) % vocab_size for i in range(length)] for row, length in enumerate((5, 9, 3))]


def generate(folder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities of :func:`prompts`."""
    import sglang

    config = json.loads((Path(folder) / "config.json").read_text())
    engine = sglang.Engine(model_path=folder, **ARGUMENTS | arguments)
    try:
        outputs = engine.generate(
            input_ids=prompts(config["vocab_size"]),
            sampling_params={"max_new_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            logprob_start_len=0,
        )
    finally:
        engine.shutdown()
    result: dict[str, Any] = {"tokens": [], "logprobs": [], "prompt_logprobs": []}
    for output in outputs:
        about = output["meta_info"]
        result["tokens"].append(output["output_ids"])
        result["logprobs"].append([entry[0] for entry in about["output_token_logprobs"]])
        result["prompt_logprobs"].append([entry[0] for entry in about["input_token_logprobs"][1:]])
    return result


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case. What SGLang logs goes to the standard error."""
    try:
        return generate(case["folder"], case.get("arguments", {}))
    except BaseException as error:  # SGLang ends the process of an engine that failed by SystemExit
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}


def main() -> None:
    """Run all cases of a file."""
    source, target = map(Path, sys.argv[1:])
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    target.write_text(json.dumps({case["name"]: run(case) for case in json.loads(source.read_text())}))


if __name__ == "__main__":
    main()
