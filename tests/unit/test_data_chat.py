"""Chat lines and rollouts to token ids and response masks, against hand-worked examples; and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_zeda.data import Sample, encode_messages, load_samples
from megatron_zeda.data.chat import SampleStatistics
from megatron_zeda.errors import InputError

EOS = 2


class WordTokenizer:
    """One id per word, in the order of first use; templates as a list of words per message."""

    eos_token_id: int | None = EOS

    def __init__(self, *, forget_history: bool = False, greet: bool = False) -> None:
        self.ids: dict[str, int] = {"<eos>": EOS}
        self.forget_history, self.greet = forget_history, greet

    def encode(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, 10 + len(self.ids)) for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        words = {number: word for word, number in self.ids.items()}
        return " ".join(words[i] for i in ids)

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        return self.encode(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        words = []
        for index, message in enumerate(messages):
            content = message["content"]
            if self.forget_history and message["role"] == "assistant" and index < len(messages) - 1:
                content = content.removeprefix("thinking ")
            words.append(f"<{message['role']}> {content} <eos> \\n")
        if add_generation_prompt:
            words.append("<assistant> hello" if self.greet else "<assistant>")
        return " ".join(words)


def chat(*turns: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def responses(tokenizer: WordTokenizer, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([i for i, flag in zip(ids, mask, strict=True) if flag])


def test_mask_of_a_hand_worked_conversation() -> None:
    tokenizer = WordTokenizer()
    [(ids, mask)] = encode_messages(chat("two plus two", "four", "and three", "seven !"), tokenizer, where="f:1")
    assert tokenizer.decode(ids) == (
        "<user> two plus two <eos> \\n <assistant> four <eos> \\n <user> and three <eos> \\n <assistant> seven ! <eos>"
    )
    assert [int(flag) for flag in mask] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert responses(tokenizer, ids, mask) == "four <eos> seven ! <eos>"


def test_a_template_that_rewrites_history_gives_one_sample_per_turn() -> None:
    tokenizer = WordTokenizer(forget_history=True)
    first, second = encode_messages(chat("a", "thinking b", "c", "thinking d"), tokenizer, where="f:1")
    assert responses(tokenizer, *first) == "thinking b <eos>"
    assert responses(tokenizer, *second) == "thinking d <eos>"
    assert tokenizer.decode(second[0]).startswith("<user> a <eos> \\n <assistant> b <eos>")


def test_messages_after_the_last_answer_are_dropped() -> None:
    tokenizer = WordTokenizer()
    [(ids, _)] = encode_messages(chat("a", "b", "unanswered"), tokenizer, where="f:1")
    assert "unanswered" not in tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("text", "`messages` must be a list"),
        ([], "`messages` must be a list"),
        ([{"content": "a"}], "message 0 has no `role`"),
        ([{"role": "user", "content": None}], "message 0 has no text"),
        (chat("a"), "no assistant turn"),
        (chat("a", ""), "the assistant turn is empty"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(InputError, match=rf"^f:1: {message}"):
        encode_messages(messages, WordTokenizer(), where="f:1")


def test_a_template_whose_prompt_is_not_a_prefix_is_refused() -> None:
    with pytest.raises(InputError, match="generation prompt is not the beginning"):
        encode_messages(chat("a", "b"), WordTokenizer(greet=True), where="f:1")


# ---- files ----------------------------------------------------------------------------------------------------------


def write(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def load(path: Path, *, seq_length: int = 16, vocab_size: int = 100, tokenizer: Any = None) -> list[Sample]:
    return load_samples(path, seq_length=seq_length, vocab_size=vocab_size, tokenizer=tokenizer)


def test_ids_of_rollouts_are_used_as_they_are(tmp_path: Path) -> None:
    class Unusable:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError("a rollout must not be tokenised again")

    line = {"messages": chat("a", "b"), "prompt_ids": [5, 6, 7], "response_ids": [8, EOS], "finish_reason": "stop"}
    [sample] = load(write(tmp_path / "r.jsonl", line), tokenizer=Unusable())
    assert sample.tokens.tolist() == [5, 6, 7, 8, EOS]
    assert sample.is_response.tolist() == [False, False, False, True, True]
    assert (sample.num_inputs, sample.num_loss_tokens) == (4, 2)


def test_chats_and_rollouts_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {"messages": chat("a", "b")}, {"prompt_ids": [1], "response_ids": [2]})
    assert [sample.where for sample in load(path, tokenizer=WordTokenizer())] == [f"{path}:1", f"{path}:2"]


def test_long_responses_are_cut_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "r.jsonl",
        {"prompt_ids": [1, 2], "response_ids": [3, 4, 5], "finish_reason": "length"},
        {"prompt_ids": [1, 2], "response_ids": [3, 4, 5, 6]},
    )
    samples = load(path, seq_length=4)
    assert [sample.tokens.tolist() for sample in samples] == [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    assert SampleStatistics.of(samples) == SampleStatistics(2, 8, 6, 4, cut_to_sequence=1, stopped_at_limit=1)


GOOD = {"prompt_ids": [1], "response_ids": [2]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "empty line"),
        ("  ", "empty line"),
        ('{"prompt_ids": [1', "malformed JSON"),
        ("[1, 2]", "not a JSON object"),
        ({"text": "a"}, "no `messages` and no `prompt_ids`"),
        ({"prompt_ids": [1]}, "`response_ids` must be a list of token ids, found nothing"),
        ({"response_ids": [1]}, "`prompt_ids` must be a list of token ids, found nothing"),
        ({"prompt_ids": [1], "response_ids": ["a"]}, "`response_ids` must be a list of token ids"),
        ({"prompt_ids": [True], "response_ids": [1]}, "`prompt_ids` must be a list of token ids"),
        ({"prompt_ids": [1], "response_ids": []}, "`response_ids` is empty"),
        ({"prompt_ids": [], "response_ids": [1]}, "`prompt_ids` is empty"),
        ({"prompt_ids": [1], "response_ids": [100]}, "token id outside the vocabulary"),
        ({"prompt_ids": [-1], "response_ids": [1]}, "token id outside the vocabulary"),
        ({"prompt_ids": [1] * 17, "response_ids": [1]}, "the prompt has 17 tokens and model.seq_length is 16"),
        ({"messages": chat("a", "b")}, "`messages` need a tokenizer"),
    ],
)
def test_bad_lines_name_file_and_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", GOOD, GOOD, line, GOOD)
    with pytest.raises(InputError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_a_prompt_that_just_fits(tmp_path: Path) -> None:
    [sample] = load(write(tmp_path / "r.jsonl", {"prompt_ids": [1] * 16, "response_ids": [2, 3]}))
    assert (sample.num_inputs, sample.num_loss_tokens) == (16, 1)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="the file is empty"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        load(tmp_path / "binary.jsonl")
