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
    plain.tokenizer.chat_template = None  # type: ignore[union-attr]
    with pytest.raises(InputError, match="no chat template"):
        encode_messages(MESSAGES, plain, where="f:1")
    (tmp_path / "bare.model").write_bytes((sentencepiece_folder / "tokenizer.model").read_bytes())
    bare = load_tokenizer(tmp_path / "bare.model")
    assert bare is not None
    with pytest.raises(InputError, match="no chat template"):
        encode_messages(MESSAGES, bare, where="f:1")
