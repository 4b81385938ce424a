"""A tiny teacher, the student injected from it, data, a configuration: what the training tests start from."""

import json
import random
from pathlib import Path
from typing import Any

from megatron_zeda.config import Config

VOCABULARY = 96


def write_rollouts(path: Path, count: int, *, seed: int, teacher: Path | None = None) -> None:
    """Random prompts of 3 to 19 tokens with responses of 2 to 11: the teacher's most probable ones, if there is one."""
    numbers = random.Random(seed)
    rows = []
    for _ in range(count):
        prompt = [numbers.randrange(VOCABULARY) for _ in range(numbers.randrange(3, 20))]
        rows.append((prompt, [(7 * token + 3) % VOCABULARY for token in prompt][: numbers.randrange(2, 12)]))
    if teacher is not None:
        rows = _answered(rows, teacher)
    lines = []
    for index, (prompt, response) in enumerate(rows):
        line = {"id": str(index), "prompt_ids": prompt, "response_ids": response, "finish_reason": "stop"}
        lines.append(json.dumps(line))
    path.write_text("\n".join(lines) + "\n")


def _answered(rows: list[tuple[list[int], list[int]]], folder: Path) -> list[tuple[list[int], list[int]]]:
    """The same prompts with the model's greedy responses, of the same lengths."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    answered: list[tuple[list[int], list[int]]] = [(prompt, []) for prompt, _ in rows]
    lengths = [len(response) for _, response in rows]
    for _ in range(max(lengths)):
        sequences = [[*prompt, *response] for prompt, response in answered]
        longest = max(map(len, sequences))
        tokens = torch.tensor([[*row, *[0] * (longest - len(row))] for row in sequences])
        with torch.no_grad():  # attention is causal, so that padding behind a row does not matter to it
            best = model(tokens, attention_mask=torch.ones_like(tokens)).logits.argmax(-1)
        for (_, response), sequence, row, length in zip(answered, sequences, best, lengths, strict=True):
            if len(response) < length:
                response.append(int(row[len(sequence) - 1]))
    return answered


def make_run(root: Path, *, num_layers: int = 2, **changes: float) -> None:
    """Fill ``root`` with ``teacher_hf``, ``teacher``, ``student_hf``, ``student`` and the two jsonl files.

    ``changes`` are settings of the teacher, by the names of ``Qwen3MoeConfig``.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
    }
    config = Qwen3MoeConfig(**settings | changes)
    Qwen3MoeForCausalLM(config).save_pretrained(root / "teacher_hf")
    _from_teacher(root)


def make_glm_run(
    root: Path, *, num_layers: int = 3, family: str = "glm4_moe_lite", scale: float = 1.0, **changes: Any
) -> None:
    """As :func:`make_run` for a GLM: layer 0 is dense, and a layer that drafts tokens lies beside the model.

    ``scale`` multiplies every matrix; those of wide models are large otherwise.
    """
    from checkpoints import make_hf
    from safetensors.torch import load_file, save_file

    sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "num_hidden_layers": num_layers, "n_routed_experts": 8}
    sizes |= {"max_position_embeddings": 128, **changes}
    make_hf(root / "teacher_hf", family=family, mtp=True, **sizes)
    file = root / "teacher_hf" / "model.safetensors"
    tensors = {name: tensor * scale if tensor.dim() > 1 else tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    _from_teacher(root)


def _from_teacher(root: Path) -> None:
    from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts

    inject_zero_experts(root / "teacher_hf", root / "student_hf")
    hf_to_megatron(root / "teacher_hf", root / "teacher")
    hf_to_megatron(root / "student_hf", root / "student")
    write_rollouts(root / "train.jsonl", 40, seed=0, teacher=root / "teacher_hf")
    write_rollouts(root / "validation.jsonl", 11, seed=1, teacher=root / "teacher_hf")


def run_training(config: Config) -> None:
    """Train to the end, also as one of several runs of the same processes."""
    import torch
    from spawn import end_megatron

    from megatron_zeda.training import train

    assert train(config) == 0
    if torch.distributed.is_initialized():  # not by the run: by whoever started the processes
        end_megatron()


def make_config(root: Path, name: str) -> Config:
    """Six fp32 steps of eight sequences in ``root/name``."""
    config = Config()
    config.model.checkpoint = str(root / "student")
    config.model.seq_length = 64
    config.model.bf16 = False
    config.teacher.checkpoint = str(root / "teacher")
    config.dataset.train = [str(root / "train.jsonl")]
    config.dataset.validation = [str(root / "validation.jsonl")]
    config.train.train_iters = 6
    config.train.micro_batch_size = 4
    config.train.global_batch_size = 8
    config.optimizer.lr = 1e-2
    config.checkpoint.save_interval = 100
    config.checkpoint.export_hf = False
    config.validation.eval_interval = 100
    config.validation.eval_iters = 2
    config.logger.run_dir = str(root / name)
    config.logger.tensorboard = False
    return config
