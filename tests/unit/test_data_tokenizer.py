"""Tokenizers: a Hugging Face folder, a sentencepiece model, none; and templates through both."""

import io
from pathlib import Path

import pytest
import sentencepiece

from megatron_zeda.data import encode_messages, load_tokenizer
from megatron_zeda.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from megatron_zeda.errors import InputError

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sp")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 20),
        model_writer=model,
        vocab_size=60,
        model_type="bpe",
        user_defined_symbols=["<|user|>", "<|assistant|>"],
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf")
    words = ["<unk>", "</s>", "<|user|>", "<|assistant|>", *TEXT.split()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder


MESSAGES = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]


def test_sentencepiece_model(sentencepiece_folder: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder / "tokenizer.model")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    [(ids, mask)] = encode_messages(MESSAGES, tokenizer, where="f:1")
    assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 2
    response = [i for i, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(response[:-1]).strip() == "three four"
    assert tokenizer.encode("<|assistant|>")[-1] in ids[: mask.index(True)]


def test_hugging_face_folder(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    [(ids, mask)] = encode_messages(MESSAGES, tokenizer, where="f:1")
    response = [i for i, flag in zip(ids, mask, strict=True) if flag]
    assert tokenizer.decode(response) == "three four </s>"
    assert len(ids) == 8 and mask == [False] * 5 + [True] * 3
    assert tokenizer.encode("one two") == [4, 5]


@pytest.fixture
def newlines(tmp_path: Path) -> HuggingFaceTokenizer:
    """As Qwen's: a run of newlines is one token. Adds a bos when it is allowed to add special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "<|im_start|>", "<|im_end|>", "user", "assistant", "hi", "hello"]
    words += ["\n" * n for n in range(1, 5)]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<s>", "<|im_start|>"]})
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(tmp_path)
    return HuggingFaceTokenizer(tmp_path)


def test_an_answer_that_begins_with_what_the_prompt_ends_with(newlines: HuggingFaceTokenizer) -> None:
    start, end, user, assistant, hi, hello, one, two, three = 2, 3, 4, 5, 6, 7, 8, 9, 10
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "\n\nhello"}]
    assert three in newlines.encode_chat(chat, add_generation_prompt=False)  # the merge across the boundary
    question = [start, user, one, hi, end, one]
    prompt, answer = [*question, start, assistant, one], [two, hello, end]
    assert newlines.encode_chat(chat[:1], add_generation_prompt=True) == prompt  # what generation starts from
    [(ids, mask)] = encode_messages(chat, newlines, where="f:1")
    assert ids == [*prompt, *answer]
    assert mask == [False] * len(prompt) + [True] * len(answer)
    # In a later turn's prompt the first answer is read as one text, so each turn is what generation saw.
    first, second = encode_messages([*chat, *MESSAGES_HI], newlines, where="f:1")
    assert first == (ids, mask)
    assert second[0] == [*question, start, assistant, three, hello, end, one, *prompt, hello, end]
    assert second[1].index(True) == len(second[0]) - 2


MESSAGES_HI = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def test_no_tokenizer_is_legal(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_refused(tmp_path: Path, hf_folder: Path, sentencepiece_folder: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "text.model").write_text("not a model")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "text.model")
    plain = load_tokenizer(hf_folder)
    assert plain is not None
    plain.tokenizer.chat_template = "{{ raise_exception('only user and assistant') }}"  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"f:1: the chat template refuses these messages: only user and assistant"):
        encode_messages(MESSAGES, plain, where="f:1")
    plain.tokenizer.chat_template = None  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no chat template"):
        encode_messages(MESSAGES, plain, where="f:1")
    (tmp_path / "bare.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    bare = load_tokenizer(tmp_path / "bare.model")
    assert bare is not None
    with pytest.raises(InputError, match="no chat template"):
        encode_messages(MESSAGES, bare, where="f:1")
