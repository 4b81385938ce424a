"""Between texts and token ids: prompts in, responses out, with one folder's tokenizer and special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_zeda.data.tokenizer import ChatTokenizer, load_tokenizer
from megatron_zeda.errors import InputError
from megatron_zeda.rollout.engine import Response
from megatron_zeda.rollout.files import Prompt


def eos_ids(folder: Path, config: Mapping[str, Any], tokenizer: ChatTokenizer | None) -> list[int]:
    """The tokens that end a response of a model.

    Args:
        folder: Hugging Face folder, whose ``generation_config.json`` is asked first.
        config: its ``config.json``, asked next.
        tokenizer: asked last.
    """
    path = folder / "generation_config.json"
    generation: Any = {}
    if path.is_file():
        try:
            generation = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError("not JSON", where=path, fix="copy the model's file, or remove it") from error
    from_generation = generation.get("eos_token_id") if isinstance(generation, dict) else None
    for found in (from_generation, config.get("eos_token_id"), tokenizer.eos_token_id if tokenizer else None):
        if found is not None:
            return [int(i) for i in found] if isinstance(found, list) else [int(found)]
    return []


class Codec:
    """What stands between prompts as people write them and the ids that a model reads.

    Attributes:
        context: most tokens of prompt and response together.
        eos_ids: the tokens that end a response, from ``generation_config.json``, ``config.json`` or the tokenizer.
    """

    def __init__(
        self,
        folder: Path,
        config: Mapping[str, Any],
        *,
        tokenizer: Path | None = None,
        context: int | None = None,
    ) -> None:
        """Read the tokenizer.

        Args:
            folder: the model's Hugging Face folder.
            config: its ``config.json``.
            tokenizer: another folder or file with the tokenizer.
            context: a smaller context than the model's own.

        Raises:
            InputError: a tokenizer that cannot be read.
        """
        self.folder = folder
        self._tokenizer: ChatTokenizer | None = load_tokenizer(folder if tokenizer is None else tokenizer)
        self.context = int(config["max_position_embeddings"])
        if context is not None:
            self.context = min(self.context, context)
        self.eos_ids = eos_ids(folder, config, self._tokenizer)

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The folder's tokenizer.

        Raises:
            InputError: the folder has none, which is legal until a text has to be read or written.
        """
        if self._tokenizer is None:
            raise InputError(
                "the folder has no tokenizer",
                where=self.folder,
                rule="prompts and texts need one",
                fix="copy the model's tokenizer files into it",
            )
        return self._tokenizer

    @property
    def vocabulary(self) -> dict[str, int] | None:
        """Token to id, where the folder has a tokenizer that tells."""
        known = getattr(self._tokenizer, "tokenizer", None)
        return None if known is None else known.get_vocab()

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt, ending where the response begins.

        Raises:
            InputError: the prompt has no tokens or leaves no room for a response in the context.
        """
        if isinstance(prompt.content, str):
            ids = self.tokenizer.encode(prompt.content)
        else:
            ids = self.tokenizer.encode_chat(prompt.content, add_generation_prompt=True)
        if not ids:
            raise InputError(
                "the prompt has no tokens", where=prompt.where, value=prompt.content, fix="delete the line"
            )
        if len(ids) >= self.context:
            raise InputError(
                f"the prompt has {len(ids)} tokens",
                where=prompt.where,
                rule=f"fewer than {self.context}, the context (the model's or the server's), so that a response fits",
                fix="shorten or delete the prompt",
            )
        return ids

    def text(self, response: Response) -> str:
        """Return the text of a response, without the token that ended it."""
        ids = response.ids[:-1] if response.finish_reason == "stop" else response.ids
        return self.tokenizer.decode(ids)
