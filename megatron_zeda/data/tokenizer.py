"""Tokenizers: a Hugging Face folder, or a plain sentencepiece ``.model`` file. Neither runs code from the folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_zeda.errors import InputError

# A folder with one of these has a tokenizer that AutoTokenizer can build.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class ChatTokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    eos_token_id: int | None

    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """Render ``messages`` with the chat template."""
        ...

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of (a part of) a rendered chat: special tokens that are written out, none that are not."""
        ...

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        """Render ``messages`` with the chat template and return token ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens included."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer folder read by ``AutoTokenizer`` (no remote code)."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            # Typed as Any: the stub of this auto class does not know the concrete tokenizer's methods.
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the tokenizer cannot be loaded: {reason}",
                where=folder,
                fix="copy a complete tokenizer into the folder",
            ) from error
        self.folder = folder
        self.eos_token_id: int | None = self.tokenizer.eos_token_id

    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        if not self.tokenizer.chat_template:
            raise _no_template(self.folder)
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def encode_rendered(self, text: str) -> list[int]:
        return self.encode(text)  # which knows special tokens where they are written out

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False))


class SentencePieceTokenizer:
    """A sentencepiece ``.model`` file; its chat template is ``chat_template.jinja`` beside it, if there is one."""

    def __init__(self, model_file: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor = SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError) as error:
            raise InputError(
                "not a sentencepiece model", where=model_file, fix="give the file that spm_train wrote"
            ) from error
        self.model_file = model_file
        template = model_file.parent / "chat_template.jinja"
        self.chat_template = template.read_text(encoding="utf-8") if template.exists() else None
        eos, bos = self.processor.eos_id(), self.processor.bos_id()
        self.eos_token_id: int | None = eos if eos >= 0 else None
        self.special = {
            "eos_token": self.processor.id_to_piece(eos) if eos >= 0 else "",
            "bos_token": self.processor.id_to_piece(bos) if bos >= 0 else "",
        }

    def render_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        if self.chat_template is None:
            raise _no_template(self.model_file)
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(
            conversations=[list(messages)],
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            **self.special,
        )
        return str(rendered[0])

    def encode_chat(self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool) -> list[int]:
        return self.encode_rendered(self.render_chat(messages, add_generation_prompt=add_generation_prompt))

    def encode_rendered(self, text: str) -> list[int]:
        """sentencepiece never produces its control pieces (bos, eos) from text: split the text at them ourselves."""
        for name, piece in self.special.items():
            if piece and piece in text:
                head, tail = text.split(piece, 1)
                own = self.processor.eos_id() if name == "eos_token" else self.processor.bos_id()
                return [*self.encode_rendered(head), own, *self.encode_rendered(tail)]
        return self.encode(text) if text else []

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self.processor.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.processor.decode(list(ids)))


def _no_template(where: Path) -> InputError:
    return InputError(
        "the tokenizer has no chat template, so `messages` cannot be rendered",
        where=where,
        fix="add chat_template.jinja beside it, or train on rollouts, whose token ids are used as they are",
    )


def load_tokenizer(path: Path) -> HuggingFaceTokenizer | SentencePieceTokenizer | None:
    """The tokenizer at ``path``: an HF folder or a ``.model`` file.

    Returns:
        ``None`` for a folder without tokenizer files, which is legal: rollouts with token ids need none.

    Raises:
        InputError: the path does not exist, or what is there cannot be loaded.
    """
    if not path.exists():
        raise InputError(
            "the tokenizer path does not exist", where=path, fix="give an HF folder or a sentencepiece .model file"
        )
    if path.is_file():
        return SentencePieceTokenizer(path)
    if any((path / name).exists() for name in _TOKENIZER_FILES):
        return HuggingFaceTokenizer(path)
    return None
