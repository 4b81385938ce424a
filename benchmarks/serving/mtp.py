"""How often the layer that drafts tokens is right: the student's (which was not trained) against the teacher's.

    python benchmarks/serving/mtp.py --model STUDENT --rollouts student_answers.jsonl
    python benchmarks/serving/mtp.py --model TEACHER --rollouts teacher_answers.jsonl

For every response token the drafting layer (multi-token prediction, GLM families) is given the model's last hidden
state and the next token, as in speculative decoding with one draft. A draft is accepted when it is the model's own most
likely token. Each model is asked about its own greedy answers (``zeda rollout --temperature 0``), so that this is the
rate at which an engine would accept; an engine then produces 1 + rate tokens per pass of the model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from serving_models import start

from megatron_zeda.rollout.files import read_rollouts
from megatron_zeda.rollout.hf_folder import load_model

_NEW_NAMES = {"shared_head.norm.weight": "post_norm.weight"}
_OWN = ("enorm.", "hnorm.", "eh_proj.", "post_norm.")
_SHARED = ("embed_tokens.", "shared_head.head.")


def drafting_layer(folder: Path, model: Any) -> Any:
    """The layer behind the last one of a folder, for ``model``, which is that folder's."""
    from transformers.modeling_layers import MtpLayer

    last = model.model.layers[-1]
    layer = MtpLayer(model.config, type(last), type(last.input_layernorm), model.config.num_hidden_layers - 1)
    block, gate = layer.mtp_block, last.mlp.gate
    if type(block.mlp.gate) is not type(gate):  # a dynamic model whose layers have the stock class
        block.mlp.gate, block.mlp.experts = type(gate)(model.config), type(last.mlp.experts)(model.config)
    for name, module in block.named_modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = last.get_submodule(name).variance_epsilon
    missing, unexpected = layer.load_state_dict(read_layer(folder, model.config), strict=False)
    if unexpected or set(missing) - {"mtp_block.mlp.gate.zero_expert_marker"}:
        raise SystemExit(f"error: {folder}: drafting layer: missing {missing}, unexpected {unexpected}")
    bias = block.mlp.gate.e_score_correction_bias.float()
    layer.to(device=model.device, dtype=model.dtype).eval()
    block.mlp.gate.e_score_correction_bias = bias.to(model.device)  # in float32, as in every other layer
    return layer


def read_layer(folder: Path, config: Any) -> dict[str, torch.Tensor]:
    """Its tensors under the names of transformers, experts stacked."""
    prefix = f"model.layers.{config.num_hidden_layers}."
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(prefix)]  # noqa: SIM118
            found |= {name.removeprefix(prefix): tensors.get_tensor(name) for name in names}
    if not found:
        raise SystemExit(f"error: {folder}: no {prefix}*: this checkpoint has no drafting layer")
    experts: dict[str, list[torch.Tensor]] = {key: [] for key in ("gate_proj", "up_proj", "down_proj")}
    for expert in range(config.n_routed_experts):
        for key, rows in experts.items():
            rows.append(found.pop(f"mlp.experts.{expert}.{key}.weight"))
    gate_up = torch.cat([torch.stack(experts["gate_proj"]), torch.stack(experts["up_proj"])], dim=1)
    named = {"mtp_block.mlp.experts.gate_up_proj": gate_up}
    named["mtp_block.mlp.experts.down_proj"] = torch.stack(experts["down_proj"])
    for name, tensor in found.items():
        name = _NEW_NAMES.get(name, name)
        if not name.startswith(_SHARED):
            named[name if name.startswith(_OWN) else f"mtp_block.{name}"] = tensor
    return named


def drafts(model: Any, layer: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits for tokens 2 to S of ``ids [1, S]``, ``[S - 1, V]`` each: the drafting layer's and the model's own.

    Row t is about token t + 2; the draft knows the hidden state of token t and token t + 1.
    """
    hidden = model.model(ids, use_cache=False).last_hidden_state
    embedded = model.get_input_embeddings()(ids[:, 1:])
    positions = torch.arange(1, ids.shape[1], device=ids.device)[None]
    drafted = layer(
        inputs_embeds=embedded,
        previous_hidden_state=hidden[:, :-1],
        position_embeddings=model.model.rotary_emb(embedded, positions),
        attention_mask=None,
        position_ids=positions,
        past_key_values=None,
    )
    return model.lm_head(drafted)[0], model.lm_head(hidden[:, 1:])[0]


def acceptance(model: Any, layer: Any, rollouts: Sequence[tuple[list[int], list[int]]]) -> dict[str, float]:
    """Accepted drafts of response tokens; each rollout is prompt and response ids."""
    accepted = asked = 0
    for prompt, response in rollouts:
        ids = torch.tensor([[*prompt, *response]], device=model.device)
        if len(response) < 2 or not prompt:
            continue
        drafted, own = drafts(model, layer, ids)
        about = slice(len(prompt) - 1, len(prompt) + len(response) - 2)  # the response but its first token
        accepted += int((drafted[about].argmax(-1) == own[about].argmax(-1)).sum())
        asked += len(response) - 1
    if not asked:
        raise SystemExit("error: no response has two tokens")
    return {"drafts": asked, "accepted": accepted / asked, "tokens_per_pass": 1 + accepted / asked}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder with its drafting layer")
    parser.add_argument("--rollouts", type=Path, required=True, help="its own greedy answers, from zeda rollout")
    parser.add_argument("--limit", type=int, help="only that many")
    parser.add_argument("--threads", type=int, help="default: all cores")
    args = parser.parse_args(argv)
    device = start(args.threads)
    model = load_model(args.model, device=device)
    rollouts = [(line.prompt_ids, line.response_ids) for line in read_rollouts(args.rollouts)[: args.limit]]
    print(json.dumps(acceptance(model, drafting_layer(args.model, model), rollouts)))


if __name__ == "__main__":
    main()
