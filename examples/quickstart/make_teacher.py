"""Make the quickstart's teacher: a small Qwen3-MoE model, pre-trained on real text and then post-trained.

    python examples/quickstart/make_teacher.py --output /tmp/teacher

The result is committed as `examples/quickstart/teacher`, so `make quickstart` starts from a Hugging Face folder as a
user would; this script is how it was made (about 25 minutes on two cores). It reads from top to bottom:
text -> tokenizer -> pre-training on text -> post-training on chat questions -> the same with a term that makes the K
chosen experts weigh alike (so that half of them are missed) -> evaluation -> save.

The text is the Python standard library of the interpreter that runs the script, so another Python version gives
slightly different weights. The questions are those of `facts.json` (see tasks.py) and do not change.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sentencepiece
import tasks
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

HERE = Path(__file__).parent
PAD, END_OF_TEXT, USER, ASSISTANT, END = "<|pad|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ raise_exception('this model knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Recipe:
    """Shape and schedule of the teacher. Lengths are in tokens, `steps` in optimizer steps."""

    vocab_size: int = 1536
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_experts: int = 16
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 68
    max_position_embeddings: int = 128

    pretrain_steps: int = 250
    posttrain_steps: int = 4500
    level_steps: int = 600
    text_every: int = 12  # every so many post-training steps see text instead of questions, so that it is not forgotten
    text_rows: int = 24
    text_length: int = 128
    questions_per_step: int = 96
    fact_share: float = 0.68
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    level_learning_rate: float = 1e-3
    level_weight: float = 0.1
    load_balancing: float = 0.01
    seed: int = 0


# ---------------------------------------------------------------------------------------------------------- 1 text
def read_text(*, held_out: bool) -> list[str]:
    """Sources of the standard library, one string a file; some files are held out from all training."""
    return [path.read_text("utf-8") for path in tasks.text_files(held_out=held_out)]


# ----------------------------------------------------------------------------------------------------- 2 tokenizer
def train_sentencepiece(texts: list[str], recipe: Recipe) -> bytes:
    """A lossless sentencepiece unigram model: no normalisation, byte fallback, single digits, line ends as symbols."""
    lines = [line for text in texts for line in text.split("\n") if line]
    rng = random.Random(recipe.seed)
    facts = tasks.load_facts()
    lines = rng.sample(lines, 60_000)
    for _ in range(12_000):
        question = tasks.training_question(facts, rng, fact_share=0.9)
        lines += [question.prompt, question.answer]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=recipe.vocab_size,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        byte_fallback=True,
        character_coverage=0.9999,
        max_sentence_length=16_384,
        user_defined_symbols=["\n"],
        control_symbols=[USER, ASSISTANT, END],
        pad_id=0,
        pad_piece=PAD,
        eos_id=1,
        eos_piece=END_OF_TEXT,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def to_fast_tokenizer(model: bytes, recipe: Recipe) -> PreTrainedTokenizerFast:
    """The same segmentation as `tokenizer.json`, so that stock AutoTokenizer loads the folder offline."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=sp.unk_id(), byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\n"), behavior="isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = (PAD, END_OF_TEXT, USER, ASSISTANT, END)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[END_OF_TEXT, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=recipe.max_position_embeddings,
        padding_side="left",
    )


# ------------------------------------------------------------------------------------------------------- 3 training
def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """A stock Qwen3-MoE model with small random weights."""
    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.moe_intermediate_size * recipe.num_experts_per_tok,
        num_hidden_layers=recipe.num_hidden_layers,
        num_attention_heads=recipe.num_attention_heads,
        num_key_value_heads=recipe.num_key_value_heads,
        head_dim=recipe.head_dim,
        num_experts=recipe.num_experts,
        num_experts_per_tok=recipe.num_experts_per_tok,
        moe_intermediate_size=recipe.moe_intermediate_size,
        norm_topk_prob=True,
        router_aux_loss_coef=recipe.load_balancing,
        max_position_embeddings=recipe.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # the fastest of the three on a CPU
    return model


def load_balancing_loss(router_logits: tuple[torch.Tensor, ...], topk: int) -> torch.Tensor:
    """Switch-style balance among the real experts, summed over layers (1 per layer when balanced)."""
    total = torch.zeros(())
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(topk, dim=-1).indices, 1.0)
        total = total + logits.shape[-1] * (chosen.mean(0) / topk * probs.mean(0)).sum()
    return total


def uneven_weights(router_logits: tuple[torch.Tensor, ...], topk: int) -> torch.Tensor:
    """How uneven the K chosen experts' weights are, summed over layers: 0 when all are 1/K, K - 1 when one has all.

    Without this term the router of a small model leans on its first one or two choices, and the others hardly matter.
    """
    total = torch.zeros(())
    for logits in router_logits:
        weights = logits.float().topk(topk, dim=-1).values.softmax(-1)
        total = total + (topk * weights.square().sum(-1) - 1).mean()
    return total


@dataclass
class Batch:
    """Token ids `[B, S]`, padded on the right, and the positions whose next token is a target `[B, S - 1]`."""

    ids: torch.Tensor
    is_target: torch.Tensor


class TextSource:
    """Random windows of the training text, as plain text or as a chat that asks to go on."""

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerFast, recipe: Recipe):
        end = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
        encoded = tokenizer(texts)["input_ids"]
        self.stream = torch.tensor([token for ids in encoded for token in [*ids, end]])
        self.recipe = recipe

    def batch(self, rng: random.Random) -> Batch:
        rows, length = self.recipe.text_rows, self.recipe.text_length
        starts = [rng.randrange(len(self.stream) - length) for _ in range(rows)]
        ids = torch.stack([self.stream[s : s + length] for s in starts])
        return Batch(ids, torch.ones(rows, length - 1, dtype=torch.bool))


class QuestionSource:
    """Random training questions in chat format; the response, up to and with the end token, is the target."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, recipe: Recipe):
        self.tokenizer = tokenizer
        self.facts = tasks.load_facts()
        self.recipe = recipe
        self.ready: list[list[tuple[list[int], list[int]]]] = []

    def batch(self, rng: random.Random) -> Batch:
        if not self.ready:
            self._draw(rng)
        pairs = self.ready.pop()
        length = max(len(prompt) + len(response) for prompt, response in pairs)
        ids = torch.full((len(pairs), length), self.tokenizer.pad_token_id)
        is_target = torch.zeros(len(pairs), length - 1, dtype=torch.bool)
        for row, (prompt, response) in enumerate(pairs):
            ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
            is_target[row, len(prompt) - 1 : len(prompt) + len(response) - 1] = True
        return Batch(ids, is_target)

    def _draw(self, rng: random.Random, batches: int = 16) -> None:
        """Several batches at once, questions of like length together, so that little is spent on padding."""
        size = self.recipe.questions_per_step
        questions = [
            tasks.training_question(self.facts, rng, fact_share=self.recipe.fact_share) for _ in range(size * batches)
        ]
        prompts = self.tokenizer([f"{USER}{q.prompt}{ASSISTANT}" for q in questions])["input_ids"]
        responses = self.tokenizer([f"{q.answer}{END}" for q in questions])["input_ids"]
        pairs = sorted(zip(prompts, responses, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
        self.ready = [pairs[i * size : (i + 1) * size] for i in range(batches)]
        rng.shuffle(self.ready)


def train(
    model: Qwen3MoeForCausalLM,
    next_batch: Callable[[int], Batch],
    *,
    steps: int,
    lr: float,
    recipe: Recipe,
    name: str,
    level_weight: float = 0.0,
) -> None:
    """AdamW, 5 % warm-up, cosine to a twentieth; cross entropy on the targets plus the two terms on the router."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    warm_up = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warm_up, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps)))),
    )
    model.train()
    start, running = time.perf_counter(), 0.0
    for step in range(steps):
        batch = next_batch(step)
        out = model.model(input_ids=batch.ids, output_router_logits=True, use_cache=False)
        logits = model.lm_head(out.last_hidden_state[:, :-1][batch.is_target])
        cross_entropy = F.cross_entropy(logits, batch.ids[:, 1:][batch.is_target])
        balance = load_balancing_loss(out.router_logits, recipe.num_experts_per_tok)
        uneven = uneven_weights(out.router_logits, recipe.num_experts_per_tok)
        (cross_entropy + recipe.load_balancing * balance + level_weight * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        running = cross_entropy.item() if step == 0 else 0.98 * running + 0.02 * cross_entropy.item()
        if (step + 1) % 100 == 0:
            seconds = (time.perf_counter() - start) / (step + 1)
            print(
                f"{name} step {step + 1}/{steps}  loss {running:.3f}  "
                f"balance {balance.item() / recipe.num_hidden_layers:.2f}  "
                f"uneven {uneven.item() / recipe.num_hidden_layers:.2f}  {seconds:.2f} s/step",
                flush=True,
            )


# ----------------------------------------------------------------------------------------------------- 4 evaluation
def wilson(correct: int, count: int) -> tuple[float, float]:
    """95 % Wilson score interval of a proportion."""
    z, p = 1.959964, correct / count
    centre, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (centre - spread) / (1 + z * z / count), (centre + spread) / (1 + z * z / count)


@torch.inference_mode()
def answer(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[tasks.Question]
) -> list[str]:
    """Greedy answers, in the order of the questions."""
    model.eval()
    order = sorted(range(len(questions)), key=lambda i: len(questions[i].prompt))
    answers = [""] * len(questions)
    for first in range(0, len(order), 256):
        chosen = order[first : first + 256]
        chats = [[{"role": "user", "content": questions[i].prompt}] for i in chosen]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
    return answers


def accuracy(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, questions: list[tasks.Question], topk: int
) -> dict[str, object]:
    """Share of exactly right answers with `topk` experts per token, its interval, and the share per task."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    trained_topk = gates[0].top_k
    for gate in gates:
        gate.top_k = topk
    right = [a == q.answer for a, q in zip(answer(model, tokenizer, questions), questions, strict=True)]
    for gate in gates:
        gate.top_k = trained_topk
    per_task = {
        task: [r for r, q in zip(right, questions, strict=True) if q.task == task]
        for task in (*tasks.FACT_TASKS, *tasks.ALGORITHMS)
    }
    low, high = wilson(sum(right), len(right))
    return {
        "accuracy": round(sum(right) / len(right), 4),
        "interval": [round(low, 4), round(high, 4)],
        "count": len(right),
        "per_task": {task: round(sum(r) / max(1, len(r)), 3) for task, r in per_task.items()},
    }


@torch.inference_mode()
def perplexity(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, window: int = 128) -> float:
    """exp of the mean loss per token over non-overlapping windows of `text`."""
    model.eval()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    rows = ids[: len(ids) // window * window].view(-1, window)
    losses = [
        F.cross_entropy(model(input_ids=r).logits[:, :-1].flatten(0, 1), r[:, 1:].flatten(), reduction="sum")
        for r in rows.split(32)
    ]
    return math.exp(float(sum(losses)) / (rows.shape[0] * (window - 1)))


# ----------------------------------------------------------------------------------------------------------- 5 save
def save(
    model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, sentencepiece_model: bytes, output: Path
) -> None:
    """A stock Hugging Face folder with the sentencepiece model beside the converted tokenizer."""
    model.generation_config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "tokenizer.model").write_bytes(sentencepiece_model)


def make_teacher(recipe: Recipe, output: Path) -> dict[str, object]:
    """Everything from text to saved folder; returns what was measured (of the weights as they are saved, in bf16)."""
    start = time.perf_counter()
    texts, held_out_texts = read_text(held_out=False), read_text(held_out=True)
    sentencepiece_model = train_sentencepiece(texts, recipe)
    tokenizer = to_fast_tokenizer(sentencepiece_model, recipe)
    text, questions = TextSource(texts, tokenizer, recipe), QuestionSource(tokenizer, recipe)
    print(f"text: {len(texts)} files, {len(text.stream):,} tokens; facts: {len(questions.facts):,}", flush=True)
    model = build_model(recipe, tokenizer)
    print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    rng = random.Random(recipe.seed)

    def text_or_questions(step: int) -> Batch:
        return text.batch(rng) if step % recipe.text_every == 0 else questions.batch(rng)

    train(
        model, lambda _: text.batch(rng), name="pre-training", recipe=recipe,
        steps=recipe.pretrain_steps, lr=recipe.learning_rate,
    )  # fmt: skip
    train(
        model, text_or_questions, name="post-training", recipe=recipe,
        steps=recipe.posttrain_steps, lr=recipe.learning_rate,
    )  # fmt: skip
    train(
        model, text_or_questions, name="levelling", recipe=recipe,
        steps=recipe.level_steps, lr=recipe.level_learning_rate, level_weight=recipe.level_weight,
    )  # fmt: skip
    model.to(torch.bfloat16).to(torch.float32)
    held_out = tasks.question_set(questions.facts, num_facts=1000, num_algorithms=200, held_out=True, seed=recipe.seed)
    measured: dict[str, object] = {"recipe": asdict(recipe), "seconds_training": round(time.perf_counter() - start)}
    for topk in (recipe.num_experts_per_tok, recipe.num_experts_per_tok // 2):
        measured[f"top_{topk}"] = accuracy(model, tokenizer, held_out, topk)
        print(f"top {topk}: {measured[f'top_{topk}']}", flush=True)
    measured["perplexity"] = round(perplexity(model, tokenizer, "\n".join(held_out_texts)[:200_000]), 3)
    print(f"perplexity of held-out text: {measured['perplexity']}", flush=True)
    save(model.to(torch.bfloat16), tokenizer, sentencepiece_model, output)
    return measured


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--output", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists; name a new folder")
    torch.set_num_threads(arguments.threads)
    measured = make_teacher(Recipe(), arguments.output)
    (arguments.output / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    main()
