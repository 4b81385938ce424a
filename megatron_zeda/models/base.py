"""What a model family is: a reader of its configuration, and one table of weight names.

A new family is one more file beside ``qwen3_moe.py`` and one more line in ``registry.py``. Conversion, injection,
export and verification read the table only; they do not know any family.

Dimension names: L layers, E real experts, Z zero experts, H hidden, F expert feed-forward, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from megatron_zeda.errors import InputError
from megatron_zeda.models.hf_config import (
    BETA_KEY,
    EXPERT_TYPE_KEY,
    HfConfig,
    check_zero_expert_keys,
    has_zero_expert_keys,
    where_of,
    zero_logit_bias,
)

ExpertLayout = Literal["per_expert", "fused"]
"""How experts lie on disk: one tensor per expert and projection, or transformers 5's stacked tensors per layer."""

Grow = Callable[..., torch.Tensor]
"""``grow(tensor, Z, seed=, name=, init=)``: the Z rows (or entries) that injection appends along axis 0."""


@dataclass(frozen=True)
class Packing:
    """How the pieces of one Megatron tensor lie in it along axis 0.

    The tensor is ``groups`` equal blocks, each holding the next 1/groups of every piece. One group is plain
    concatenation, one piece in one group is identity.
    """

    groups: int = 1

    def pack(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Hugging Face pieces -> the Megatron tensor."""
        if len(pieces) == 1:
            return pieces[0]
        blocks = [piece.reshape(self.groups, -1, *piece.shape[1:]) for piece in pieces]
        return torch.cat(blocks, dim=1).flatten(0, 1)

    def unpack(self, packed: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """The Megatron tensor -> its pieces of these shapes."""
        if len(shapes) == 1:
            return [packed]
        blocks = packed.reshape(self.groups, -1, *packed.shape[1:])
        parts = blocks.split([shape[0] // self.groups for shape in shapes], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class HfPiece:
    """One Hugging Face tensor, or one slot on the leading axis of a stacked one."""

    name: str
    shape: tuple[int, ...]
    slot: int | None = None
    num_slots: int = 0

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor on disk."""
        return self.shape if self.slot is None else (self.num_slots, *self.shape)

    def __str__(self) -> str:
        return self.name if self.slot is None else f"{self.name}[{self.slot}]"


@dataclass(frozen=True)
class WeightRow:
    """One row of the table: one block of a global Megatron tensor and the Hugging Face pieces it is made of.

    Attributes:
        key: key in Megatron's distributed checkpoint, as Transformer Engine models write it.
        index: position on the leading (stacked) axes, for instance ``(layer, expert)``; ``()`` if there are none.
        extent: sizes of those axes, for instance ``(L, E)``.
        pieces: the Hugging Face tensors.
        packing: how they lie in the block.
        grow: set for tensors that injection widens.
        padded: Megatron may have more rows than the model (vocabulary padding); the surplus is dropped on export.
        optional: of carried rows: this tensor may be missing where its siblings are not.
    """

    key: str
    pieces: tuple[HfPiece, ...]
    index: tuple[int, ...] = ()
    extent: tuple[int, ...] = ()
    packing: Packing = Packing()
    grow: Grow | None = None
    padded: bool = False
    optional: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the block, without the stacked axes."""
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    @property
    def numel(self) -> int:
        """Number of elements of the block."""
        return math.prod(self.shape)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole Megatron tensor."""
        return (*self.extent, *self.shape)

    @property
    def global_offset(self) -> tuple[int, ...]:
        """Where the block starts in it."""
        return (*self.index, *(0 for _ in self.shape))

    def __str__(self) -> str:
        return f"{self.key}[{', '.join(map(str, self.index))}]" if self.index else self.key


class Family(ABC):
    """One model family. Every method takes a configuration that :func:`family_for` has accepted."""

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    """``model_type`` values of this family; the first is the one we write."""
    static_architecture: ClassVar[str]
    dynamic_architecture: ClassVar[str]
    num_experts_keys: ClassVar[tuple[str, ...]]
    """Configuration keys of E; the first is the one we write."""
    modeling_files: ClassVar[tuple[str, ...]]
    """Files in ``megatron_zeda/serving`` that are bundled with dynamic exports; the first defines the classes."""
    auto_map: ClassVar[dict[str, str]]

    def num_experts(self, hf_config: dict[str, Any]) -> int:
        """E, from whichever of the known keys is there; two that disagree are refused."""
        found = {key: hf_config[key] for key in self.num_experts_keys if key in hf_config}
        where = where_of(hf_config)
        if not found:
            raise InputError(f"`{self.num_experts_keys[0]}` is missing", where=where, fix="add the number of experts")
        if len(set(found.values())) > 1:
            raise InputError("two numbers of experts", where=where, value=found, fix="keep one of the keys")
        key, value = next(iter(found.items()))
        if type(value) is not int or value < 2:
            raise InputError(
                f"`{key}` is not a number of experts", where=where, value=value, rule="an integer of at least 2"
            )
        return value

    def is_dynamic(self, hf_config: dict[str, Any]) -> bool:
        """Whether the configuration speaks of zero experts in any way, right or wrong."""
        architectures = hf_config.get("architectures") or []
        return (
            has_zero_expert_keys(hf_config)
            or self.dynamic_architecture in architectures
            or str(hf_config.get("model_type")).endswith("_plus_plus")
        )

    def num_zero_experts(self, hf_config: dict[str, Any]) -> int:
        """Z; 0 for a static checkpoint.

        Raises:
            InputError: if the configuration is dynamic but its keys are not complete and right.
        """
        if hf_config.get(BETA_KEY) is not None and not has_zero_expert_keys(hf_config):
            return 0  # Dynamic Skipping: a static model, in the modelling code of dynamic ones
        return check_zero_expert_keys(hf_config) if self.is_dynamic(hf_config) else 0

    def needs_modeling_code(self, hf_config: dict[str, Any]) -> bool:
        """Whether the stock architecture computes another model than this configuration says."""
        return self.num_zero_experts(hf_config) > 0 or hf_config.get(BETA_KEY) is not None

    def make_dynamic(self, hf_config: dict[str, Any], num_zero_experts: int) -> HfConfig:
        """This configuration with Z zero experts, every key written out: nothing is left to a reader's defaults."""
        dynamic = HfConfig(hf_config, where=where_of(hf_config))
        for key in self.num_experts_keys[1:]:
            dynamic.pop(key, None)
        dynamic[self.num_experts_keys[0]] = self.num_experts(hf_config)
        dynamic.update(
            architectures=[self.dynamic_architecture],
            model_type=self.model_types[0],
            zce_nums=[num_zero_experts],
            zce_types=[hf_config.get(EXPERT_TYPE_KEY, "zero")],
            use_zce_mask=False,
            zeda_zero_logit_bias=zero_logit_bias(hf_config),
            auto_map=dict(self.auto_map),
        )
        return dynamic

    def make_skipping(self, hf_config: dict[str, Any]) -> HfConfig:
        """The configuration of a model of Dynamic Skipping, every key that its readers need written out."""
        skipping = HfConfig(hf_config, where=where_of(hf_config))
        for key in self.num_experts_keys[1:]:
            skipping.pop(key, None)
        skipping[self.num_experts_keys[0]] = self.num_experts(hf_config)
        skipping.update(
            architectures=[self.dynamic_architecture],
            model_type=self.model_types[0],
            auto_map=dict(self.auto_map),
        )
        return skipping

    @abstractmethod
    def validate(self, hf_config: dict[str, Any]) -> None:
        """Raise :class:`InputError` for anything this family's code would get wrong."""

    @abstractmethod
    def transformer_config_class(self) -> type:
        """The configuration class, imported when it is asked for."""

    @abstractmethod
    def transformer_config_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``TransformerConfig`` fields, ``num_zero_experts`` included."""

    @abstractmethod
    def gpt_model_kwargs(self, hf_config: dict[str, Any]) -> dict[str, Any]:
        """``GPTModel`` arguments that do not come from the ``TransformerConfig``."""

    @abstractmethod
    def weight_table(self, hf_config: dict[str, Any], layout: ExpertLayout = "per_expert") -> list[WeightRow]:
        """Every weight of the model exactly once, layer by layer."""

    @abstractmethod
    def fused_tensor_names(self, hf_config: dict[str, Any]) -> frozenset[str]:
        """Tensor names that exist in the fused layout only, to recognise it."""

    def carried_rows(self, hf_config: dict[str, Any], layout: ExpertLayout = "per_expert") -> list[WeightRow]:
        """Tensors that a checkpoint of this family may have beside the model, for instance a layer that only drafts.

        They travel through every conversion unchanged and are no part of the Megatron model. Each row holds one piece
        under its own name as key. ``grow`` is set where a dynamic configuration demands wider tensors. They are there
        all together or not at all, except the rows marked ``optional``.
        """
        return []

    def adapt_stock_model(self, model: Any, hf_config: dict[str, Any]) -> None:  # noqa: B027
        """Make a ``transformers`` model compute what Megatron-Core does from the same configuration, where its code
        has a constant of its own. Most families need nothing.

        Args:
            model: of ``static_architecture`` or ``dynamic_architecture``; changed in place.
            hf_config: what it was built from.
        """

    def stock_differences(self, hf_config: dict[str, Any]) -> dict[str, str]:
        """What implementations of the stock architecture compute otherwise than this configuration says.

        Returns:
            ``"transformers"`` or ``"vLLM"`` -> a clause about it. Whoever computes the same is not in it.
        """
        return {}
