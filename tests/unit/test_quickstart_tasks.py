"""The quickstart's questions and its committed teacher: what the example's honesty rests on."""

from __future__ import annotations

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
TEACHER = QUICKSTART / "teacher"


@pytest.fixture(scope="module")
def tasks() -> ModuleType:
    sys.path.insert(0, str(QUICKSTART))
    try:
        import tasks

        return tasks
    finally:
        sys.path.remove(str(QUICKSTART))


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TEACHER)


def test_the_frozen_facts_have_one_answer_each_and_no_surrounding_space(tasks: ModuleType) -> None:
    facts = tasks.load_facts()
    assert len({(fact.task, fact.key) for fact in facts}) == len(facts) > 2000
    assert {fact.task for fact in facts} == set(tasks.FACT_TASKS)
    assert all(fact.answer and fact.answer == fact.answer.strip() for fact in facts)


def test_products_are_products(tasks: ModuleType) -> None:
    products = [fact for fact in tasks.load_facts() if fact.task == "product"]
    for fact in products:
        a, b = map(int, fact.key.split("*"))
        assert int(fact.answer) == a * b
    assert products


def test_each_fact_is_trained_in_three_phrasings_and_asked_in_the_fourth(tasks: ModuleType) -> None:
    facts = tasks.load_facts()
    for fact in facts:
        assert sorted([*tasks.trained_phrasings(fact), tasks.held_out_phrasing(fact)]) == [0, 1, 2, 3]
    # Every wording is trained on for most facts of its domain: only the pair of fact and wording is new.
    held_out = Counter((fact.task, tasks.held_out_phrasing(fact)) for fact in facts)
    sizes = Counter(fact.task for fact in facts)
    assert all(0 < held_out[task, i] < sizes[task] / 2 for task in tasks.FACT_TASKS for i in range(4))


def test_training_never_sees_a_held_out_prompt(tasks: ModuleType) -> None:
    facts = tasks.load_facts()
    held_out = {q.prompt for q in tasks.question_set(facts, num_facts=1000, num_algorithms=400, held_out=True, seed=0)}
    assert len(held_out) == 1400
    rng = random.Random(1)
    seen = {tasks.training_question(facts, rng, fact_share=0.5).prompt for _ in range(20_000)}
    fixed = tasks.question_set(facts, num_facts=6000, num_algorithms=1000, held_out=False, seed=0)
    assert not held_out & (seen | {q.prompt for q in fixed})
    assert len({q.id for q in fixed}) == 7000


def test_no_prompt_has_two_answers(tasks: ModuleType) -> None:
    answers: dict[str, str] = {}
    for fact in tasks.load_facts():
        for phrasing in range(tasks.NUM_PHRASINGS):
            question = tasks.ask(fact, phrasing)
            assert answers.setdefault(question.prompt, question.answer) == question.answer, question


@pytest.mark.parametrize(
    ("task", "oracle"),
    [
        ("add", lambda digits: str(sum(digits))),
        ("sort", lambda digits: "".join(sorted(str_digits(digits)))),
        ("reverse", lambda digits: str_digits(digits)[::-1]),
        ("largest", lambda digits: str(max(digits))),
    ],
)
def test_algorithmic_answers_are_right(tasks: ModuleType, task: str, oracle) -> None:
    import re

    rng = random.Random(3)
    for held_out in (True, False):
        for _ in range(50):
            question = tasks.algorithm_question(task, rng, held_out=held_out)
            numbers = re.findall(r"\d+", question.prompt)
            assert question.answer == oracle(numbers if task in ("sort", "reverse") else [int(n) for n in numbers])


def str_digits(numbers: list[str]) -> str:
    """The one run of digits in a prompt, leading zeros kept."""
    (digits,) = numbers
    return digits


def test_question_sets_are_the_same_in_every_process(tasks: ModuleType) -> None:
    """Python salts its own hashes: a set that depended on them would differ from process to process."""
    program = (
        "import tasks, hashlib;"
        "sets = [tasks.question_set(tasks.load_facts(), num_facts=300, num_algorithms=60, held_out=h, seed=0)"
        " for h in (True, False)];"
        "print(hashlib.sha256(repr(sets).encode()).hexdigest())"
    )
    sums = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=QUICKSTART,
            env={"PYTHONHASHSEED": salt, "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(sums) == 1


def test_the_prompt_line_is_a_chat_with_an_answer(tasks: ModuleType) -> None:
    question = tasks.ask(tasks.load_facts()[0], 0)
    line = question.to_json()
    assert line["prompt"] == [{"role": "user", "content": question.prompt}]
    assert line["answer"] == question.answer
    assert line["task"] == question.task


def test_too_many_questions_are_refused(tasks: ModuleType) -> None:
    with pytest.raises(ValueError, match="only 3 different"):
        tasks.question_set(tasks.load_facts()[:3], num_facts=4, num_algorithms=0, held_out=True, seed=0)


def test_the_teacher_is_small_enough_to_commit() -> None:
    assert sum(path.stat().st_size for path in TEACHER.iterdir()) < 8_000_000


def test_the_teacher_loads_with_stock_transformers_and_answers_in_its_chat_format(tokenizer, tasks: ModuleType) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    config = model.config
    assert (config.model_type, config.num_experts_per_tok) == ("qwen3_moe", 4)
    assert config.num_experts >= 16 and config.num_hidden_layers >= 4
    assert 2_000_000 <= sum(p.numel() for p in model.parameters()) <= 5_000_000
    questions = tasks.question_set(tasks.load_facts(), num_facts=40, num_algorithms=8, held_out=True, seed=5)
    right = 0
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            question.to_json()["prompt"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        response = output[0, inputs["input_ids"].shape[1] :]
        right += tokenizer.decode(response, skip_special_tokens=True) == question.answer
    assert right >= 0.75 * len(questions)


def test_the_tokenizer_is_lossless_and_agrees_with_the_sentencepiece_model(tokenizer, tasks: ModuleType) -> None:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(TEACHER / "tokenizer.model"))
    texts = [tasks.ask(fact, i % 4).prompt for i, fact in enumerate(tasks.load_facts()[::10])]
    texts += ["0123456789", "1,234.50", "a\n\n    b\t c  ", " leading", "trailing "]
    texts += ["caf\u00e9 \u65e5\u672c\u8a9e \U0001f600"]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert processor.decode(ids) == text
        assert len(ids) == len(processor.encode(text))
    assert tokenizer.encode("4096") == [tokenizer.convert_tokens_to_ids(digit) for digit in "4096"]


def test_special_tokens_are_single_ids(tokenizer) -> None:
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}], tokenize=False
    )
    assert chat == "<|user|>1+1=<|assistant|>2<|end|>"
    ids = tokenizer(chat)["input_ids"]
    assert len(ids) == 8
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id not in ids
