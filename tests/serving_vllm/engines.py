"""Runs vLLM on one folder after the other, in a process of its own: ``python engines.py CASES.json RESULTS.json``.

A case is ``{"name", "folder", "arguments"}``; its result ``{"tokens", "logprobs", "prompt_logprobs"}``,
or ``{"error", "traceback"}``. Starting vLLM once for many engines saves most of the time of each.
"""

from __future__ import annotations

import gc
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
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
NEW_TOKENS = 12
CASE_LINE = "=== case: "


def prompts(vocab_size: int) -> list[list[int]]:
    """Three prompts of different lengths."""
    return [[(7 * i + 11 * row) % vocab_size for i in range(length)] for row, length in enumerate((5, 9, 3))]


def generate(folder: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and all log-probabilities of :func:`prompts`."""
    from vllm import LLM, SamplingParams

    config = json.loads((Path(folder) / "config.json").read_text())
    asked = prompts(config["vocab_size"])
    settings = {"enforce_eager": True, "dtype": "float32", "max_model_len": 64, "max_num_seqs": 4} | arguments
    llm = LLM(folder, skip_tokenizer_init=True, logprobs_mode="raw_logprobs", generation_config="vllm", **settings)
    sampling = SamplingParams(
        max_tokens=NEW_TOKENS, temperature=0.0, logprobs=0, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked], sampling, use_tqdm=False)
    result: dict[str, Any] = {"tokens": [], "logprobs": [], "prompt_logprobs": []}
    for ids, output in zip(asked, outputs, strict=True):
        tokens = [int(token) for token in output.outputs[0].token_ids]
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        result["tokens"].append(tokens)
        result["logprobs"].append([step[token].logprob for token, step in steps])
        steps = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        result["prompt_logprobs"].append([step[token].logprob for token, step in steps])
        if output.outputs[0].routed_experts is not None:
            result.setdefault("routed", []).append(output.outputs[0].routed_experts.tolist())
    return result


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case. What vLLM logs about it stands on the standard output after a line with its name."""
    print(f"{CASE_LINE}{case['name']}", flush=True)
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        return generate(case["folder"], case.get("arguments", {}))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()


def main() -> None:
    """Run all cases of a file."""
    source, target = map(Path, sys.argv[1:])
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    results: dict[str, Any] = {}
    for case in json.loads(source.read_text()):
        results[case["name"]] = run(case)
        target.write_text(json.dumps(results))  # after every case: an engine that crashes leaves what came before it


if __name__ == "__main__":
    main()
