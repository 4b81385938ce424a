"""Prompts, a tokenizer and a stage-2 configuration for the runs of :mod:`training_runs`."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from training_runs import VOCABULARY, make_config
from transformers import PreTrainedTokenizerFast

from megatron_zeda.config import Config

NUM_PROMPTS = 10


def add_prompts(root: Path, *, seed: int = 0) -> None:
    """Ten prompts of 2 to 12 tokens in ``root/prompts.jsonl``; the student's tokenizer reads ``t7`` as token 7."""
    tokenizer = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t1")
    fast.save_pretrained(root / "student" / "hf")
    numbers = random.Random(seed)
    lines = []
    for index in range(NUM_PROMPTS):
        words = [f"t{numbers.randrange(VOCABULARY)}" for _ in range(numbers.randrange(2, 13))]
        lines.append(json.dumps({"id": f"p{index}", "prompt": " ".join(words), "task": "words"}))
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n")


def make_stage_2(root: Path, name: str) -> Config:
    """Four fp32 steps of eight responses (two to a prompt) of at most 8 tokens in ``root/name``."""
    config = make_config(root, name)
    config.dataset.train, config.dataset.validation = [], []
    config.train.stage, config.train.train_iters = 2, 4
    config.scheduler.lr_decay_style, config.scheduler.lr_warmup_fraction = "constant", 0.0
    config.rollout.prompts = [str(root / "prompts.jsonl")]
    config.rollout.max_new_tokens, config.rollout.batch_size = 8, 4
    config.rollout.stop_token_ids = [1, 2, 3, 4, 5]
    return config
