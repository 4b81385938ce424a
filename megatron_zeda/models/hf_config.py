"""Reading a Hugging Face ``config.json``: one clear error for every key that is missing or wrong."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

from megatron_zeda.errors import InputError

ZERO_EXPERT_KEYS = ("zce_nums", "zce_types", "use_zce_mask")
RENORMALIZE_KEY = "zeda_renormalize"
EXPERT_TYPE_KEY = "zeda_expert_type"
BETA_KEY = "zeda_dynamic_skipping_beta"
TEACHER_TOPK_KEY = "zeda_teacher_num_experts_per_tok"
METHOD_KEYS = (RENORMALIZE_KEY, EXPERT_TYPE_KEY, BETA_KEY, TEACHER_TOPK_KEY)
"""What :mod:`megatron_zeda.models.methods` reads."""


class HfConfig(dict[str, Any]):
    """A ``config.json`` that remembers where it came from, for error messages."""

    def __init__(self, values: dict[str, Any], *, where: str | Path) -> None:
        super().__init__(values)
        self.where = str(where)


def where_of(hf_config: dict[str, Any]) -> str:
    """The place to name in an error message about this configuration."""
    return getattr(hf_config, "where", "config.json")


def load_hf_config(folder: str | Path) -> HfConfig:
    """Read ``<folder>/config.json``.

    Raises:
        InputError: if the folder or the file is not there, or it is not a JSON object.
    """
    path = Path(folder) / "config.json"
    if not os.path.isdir(folder):  # False too for a name that no folder can have
        hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(folder))
        raise InputError(
            "no such folder",
            where=folder,
            rule="a Hugging Face checkpoint folder with config.json",
            fix=f"if it is an id of the hub, run `hf download {folder} --local-dir FOLDER` first" if hub_id else "",
        )
    return HfConfig(read_json_object(path), where=path)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except FileNotFoundError:
        raise InputError("no such file", where=path, fix="give the folder that holds it") from None
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", where=path) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"not valid JSON: {error}", where=path) from None
    if not isinstance(values, dict):
        raise InputError("not a JSON object", where=path, value=type(values).__name__)
    return values


def _special_float(values: dict[str, Any]) -> Any:
    # transformers 5 writes infinities as {"__float__": "-Infinity"}: JSON has none.
    return float(values["__float__"]) if set(values) == {"__float__"} else values


def need_int(hf_config: dict[str, Any], key: str, *, minimum: int = 1) -> int:
    """A required integer of at least ``minimum``."""
    value = _need(hf_config, key)
    if type(value) is not int or value < minimum:
        raise InputError(f"`{key}` is wrong", where=where_of(hf_config), value=value, rule=f"an integer >= {minimum}")
    return value


def need_float(hf_config: dict[str, Any], key: str) -> float:
    """A required positive number."""
    value = _need(hf_config, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise InputError(f"`{key}` is wrong", where=where_of(hf_config), value=value, rule="a positive number")
    return float(value)


def need_bool(hf_config: dict[str, Any], key: str) -> bool:
    """A required true or false."""
    value = _need(hf_config, key)
    if not isinstance(value, bool):
        raise InputError(f"`{key}` is wrong", where=where_of(hf_config), value=value, rule="true or false")
    return value


def head_dim(hf_config: dict[str, Any]) -> int:
    """Size of an attention head: ``head_dim``, or the share of the hidden size where that is missing."""
    if hf_config.get("head_dim") is not None:
        return need_int(hf_config, "head_dim")
    return int(hf_config["hidden_size"] // hf_config["num_attention_heads"])


def refuse_unless(hf_config: dict[str, Any], key: str, allowed: tuple[Any, ...], why: str) -> None:
    """Refuse a key that is there with a value other than the allowed ones."""
    if key in hf_config and hf_config[key] not in allowed:
        raise InputError(
            f"`{key}` is not supported with this value", where=where_of(hf_config), value=hf_config[key], rule=why
        )


def rope_theta(hf_config: dict[str, Any], *, rotary_factor: float = 1.0) -> float:
    """The rotary base, from ``rope_theta`` or transformers 5's ``rope_parameters``; scaled variants are refused.

    Args:
        hf_config: the configuration.
        rotary_factor: the part of a head that rotates; parameters that name another are refused too.
    """
    where = where_of(hf_config)
    values = []
    for key in ("rope_parameters", "rope_scaling"):
        parameters = hf_config.get(key)
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise InputError(f"`{key}` is wrong", where=where, value=parameters, rule="an object or null")
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if parameters.get("partial_rotary_factor", rotary_factor) != rotary_factor:
            raise InputError(
                f"`partial_rotary_factor` in `{key}` is wrong",
                where=where,
                value=parameters["partial_rotary_factor"],
                rule=f"{rotary_factor:g}, the part of a head that rotates in this model",
            )
        if kind != "default":
            raise InputError(
                f"`{key}` asks for scaled rotary embeddings",
                where=where,
                value=parameters,
                rule="only rope_type 'default' is supported",
                fix="use the checkpoint's native context length",
            )
        if "rope_theta" in parameters:
            values.append(need_float(HfConfig(parameters, where=f"{where}: {key}"), "rope_theta"))
    if hf_config.get("rope_theta") is not None:
        values.append(need_float(hf_config, "rope_theta"))
    if not values:
        raise InputError("`rope_theta` is missing", where=where, rule="rope_theta or rope_parameters.rope_theta")
    if len(set(values)) > 1:
        raise InputError("two different rotary bases", where=where, value=values, fix="keep one of the keys")
    return values[0]


def has_zero_expert_keys(hf_config: dict[str, Any]) -> bool:
    """Whether any ``zce_*`` key is there."""
    return any(key in ZERO_EXPERT_KEYS or key.startswith("zce_") for key in hf_config)


def check_zero_expert_keys(hf_config: dict[str, Any]) -> int:
    """Z of a dynamic configuration.

    All three keys must be there and right: readers of this format elsewhere default to identity experts behind a
    mask, so a forgotten key is silently another model.
    """
    where = where_of(hf_config)
    for key in ZERO_EXPERT_KEYS:
        if key not in hf_config:
            raise InputError(
                f"`{key}` is missing",
                where=where,
                rule=f"a dynamic checkpoint has all of {', '.join(ZERO_EXPERT_KEYS)}; where one is missing, other "
                "readers of this format take identity experts behind a mask, which is another model",
                fix='add what it was made with: "zce_nums": [Z], "zce_types": ["zero"], "use_zce_mask": false',
            )
    nums = hf_config["zce_nums"]
    if not isinstance(nums, list) or len(nums) != 1 or type(nums[0]) is not int or nums[0] < 1:
        raise InputError("`zce_nums` is wrong", where=where, value=nums, rule="a list of one positive integer")
    kind = hf_config.get(EXPERT_TYPE_KEY, "zero")
    if hf_config["zce_types"] != [kind]:
        raise InputError(
            "`zce_types` is wrong",
            where=where,
            value=hf_config["zce_types"],
            rule=f'["{kind}"]'
            + (": only zero-output experts" if kind == "zero" else f", which is what `{EXPERT_TYPE_KEY}` says"),
            fix=f'a model that was trained with identity experts has `{EXPERT_TYPE_KEY}`: "copy" too',
        )
    if hf_config["use_zce_mask"] is not False:
        raise InputError("`use_zce_mask` is wrong", where=where, value=hf_config["use_zce_mask"], rule="false")
    return nums[0]


def zero_logit_bias(hf_config: dict[str, Any]) -> float:
    """The dial ``zeda_zero_logit_bias``: a number below infinity, default 0."""
    value = hf_config.get("zeda_zero_logit_bias", 0.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value == math.inf:
        raise InputError(
            "`zeda_zero_logit_bias` is wrong", where=where_of(hf_config), value=value, rule="a number below infinity"
        )
    return float(value)


def _need(hf_config: dict[str, Any], key: str) -> Any:
    if key not in hf_config:
        raise InputError(f"`{key}` is missing", where=where_of(hf_config))
    return hf_config[key]
