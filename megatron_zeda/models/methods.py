"""The method a model was adapted with, as its ``config.json`` says it: zero experts (ZEDA) or one of the controls.

``zeda``              the ``zce_*`` keys
``adamoe``            and ``zeda_renormalize: true``: the weights are normalised over the selected real experts
``copy``              and ``zce_types: ["copy"]`` with ``zeda_expert_type: "copy"``: the Z experts return their input
``net``               a static model; ``num_experts_per_tok`` was lowered from ``zeda_teacher_num_experts_per_tok``
``dynamic_skipping``  a static model; ``zeda_dynamic_skipping_beta``: selections with less than beta times the token's
                      largest weight are dropped, and the weights normalised over the rest

Training, evaluation and the modelling files of exports read these keys and nothing else.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from megatron_zeda.errors import InputError
from megatron_zeda.models.hf_config import (
    BETA_KEY,
    EXPERT_TYPE_KEY,
    RENORMALIZE_KEY,
    TEACHER_TOPK_KEY,
    HfConfig,
    has_zero_expert_keys,
    need_int,
    where_of,
)

Method = Literal["zeda", "net", "adamoe", "dynamic_skipping", "copy"]
METHODS: tuple[Method, ...] = get_args(Method)
STATIC_METHODS: tuple[Method, ...] = ("net", "dynamic_skipping")
"""Those whose model has no zero experts."""


def method_of(hf_config: dict[str, Any]) -> Method | None:
    """The method of a configuration; None for the original model."""
    if skipping_beta(hf_config) is not None:
        return "dynamic_skipping"
    if TEACHER_TOPK_KEY in hf_config:
        return "net"
    if not has_zero_expert_keys(hf_config):
        return None
    if hf_config.get(EXPERT_TYPE_KEY) == "copy":
        return "copy"
    return "adamoe" if hf_config.get(RENORMALIZE_KEY) else "zeda"


def check_method_keys(hf_config: dict[str, Any]) -> None:
    """Refuse keys that are wrong, or that do not go together.

    Raises:
        InputError: naming the key.
    """
    where, dynamic = where_of(hf_config), has_zero_expert_keys(hf_config)
    renormalize, kind = hf_config.get(RENORMALIZE_KEY, False), hf_config.get(EXPERT_TYPE_KEY, "zero")
    if not isinstance(renormalize, bool):
        raise InputError(f"`{RENORMALIZE_KEY}` is wrong", where=where, value=renormalize, rule="true or false")
    if kind not in ("zero", "copy"):
        raise InputError(f"`{EXPERT_TYPE_KEY}` is wrong", where=where, value=kind, rule="zero or copy")
    for key, given in ((RENORMALIZE_KEY, renormalize), (EXPERT_TYPE_KEY, kind == "copy")):
        if given and not dynamic:
            raise InputError(f"`{key}` is there, and the model has no zero experts", where=where, fix=f"remove `{key}`")
    if renormalize and kind == "copy":
        raise InputError(
            f"`{RENORMALIZE_KEY}` and `{EXPERT_TYPE_KEY}` are both there",
            where=where,
            rule="weight that identity experts have is not given to the others",
            fix="keep one of the keys",
        )
    if renormalize and not hf_config.get("norm_topk_prob", True):
        raise InputError(
            f"`{RENORMALIZE_KEY}` is true and `norm_topk_prob` false",
            where=where,
            rule="weights are normalised over the real experts of a model that normalises them",
        )
    beta = skipping_beta(hf_config)
    if beta is not None and dynamic:
        raise InputError(
            f"`{BETA_KEY}` and zero experts are both there",
            where=where,
            rule="Dynamic Skipping is for the original model",
            fix="keep one of the two",
        )
    if TEACHER_TOPK_KEY in hf_config:
        topk, before = need_int(hf_config, "num_experts_per_tok"), need_int(hf_config, TEACHER_TOPK_KEY)
        if dynamic or beta is not None or topk > before:
            raise InputError(
                f"`{TEACHER_TOPK_KEY}` is wrong",
                where=where,
                value=before,
                rule="the larger K of the static model that this static model was made from",
                fix=f"remove `{TEACHER_TOPK_KEY}`",
            )


def skipping_beta(hf_config: dict[str, Any]) -> float | None:
    """beta of Dynamic Skipping; None for a model without it.

    Raises:
        InputError: it is no number from 0 to 1.
    """
    value = hf_config.get(BETA_KEY)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
        raise InputError(f"`{BETA_KEY}` is wrong", where=where_of(hf_config), value=value, rule="a number from 0 to 1")
    return float(value)


def teacher_topk(hf_config: dict[str, Any]) -> int:
    """K of the model this one was made from: what skipping, or a smaller K, is compared with."""
    return int(hf_config.get(TEACHER_TOPK_KEY, hf_config["num_experts_per_tok"]))


def method_fields(hf_config: dict[str, Any]) -> dict[str, Any]:
    """``TransformerConfig`` fields of the method, those that are not the default."""
    fields: dict[str, Any] = {}
    if hf_config.get(RENORMALIZE_KEY):
        fields["zero_expert_renormalize"] = True
    if hf_config.get(EXPERT_TYPE_KEY) == "copy":
        fields["zero_expert_type"] = "copy"
    if skipping_beta(hf_config) is not None:
        fields["dynamic_skipping_beta"] = skipping_beta(hf_config)
    if TEACHER_TOPK_KEY in hf_config:
        fields["teacher_router_topk"] = teacher_topk(hf_config)
    return fields


def with_method(hf_config: dict[str, Any], method: Method, *, target_skip_rate: float | None = None) -> HfConfig:
    """The configuration of a student that is trained with a method from a model that may have it already.

    Args:
        hf_config: of the original model (``net``, ``dynamic_skipping``), of an injected one (the others), or of a
            model of this very method.
        method: the method.
        target_skip_rate: ``net`` keeps ``K - round(target K)`` of K experts; default: half of them.

    Returns:
        A copy. ``dynamic_skipping`` begins with beta 0, which drops nothing, unless one is there.

    Raises:
        InputError: the model has another method, or cannot have this one.
    """
    where, found = where_of(hf_config), method_of(hf_config)
    possible: tuple[Method | None, ...] = (None,) if method in STATIC_METHODS else ("zeda",)
    if found != method and found not in possible:
        raise InputError(
            f"this model is one of method `{found}`" if found else "a static model without zero experts",
            where=where,
            value=method,
            rule="net and dynamic_skipping start from the original model, the others from an injected one",
            fix=f"set zero_experts.method={found}, or start from another checkpoint"
            if found
            else "run checkpoint_tools/inject_zero_experts.py and convert its output",
        )
    student = HfConfig(hf_config, where=where)
    if method == "adamoe":
        student[RENORMALIZE_KEY] = True
    elif method == "copy":
        student |= {EXPERT_TYPE_KEY: "copy", "zce_types": ["copy"]}
    elif method == "dynamic_skipping":
        student.setdefault(BETA_KEY, 0.0)
    elif method == "net":
        before = teacher_topk(hf_config)
        kept = before // 2 if target_skip_rate is None else round((1.0 - target_skip_rate) * before)
        if not 1 <= kept < before:
            raise InputError(
                f"NET would keep {kept} of {before} experts per token",
                where=where,
                rule="at least 1, and fewer than before",
                fix="choose another zero_experts.target_skip_rate",
            )
        student |= {"num_experts_per_tok": kept, TEACHER_TOPK_KEY: before}
        if kept == 1:
            _check_single_expert(student)
    check_method_keys(student)
    return student


def _check_single_expert(student: HfConfig) -> None:
    """Raise InputError where the weight of a single selected expert is always 1: no router learns from that."""
    from megatron_zeda.models.registry import family_for

    kwargs = family_for(student).transformer_config_kwargs(student)
    if kwargs["moe_router_score_function"] == "softmax" and not kwargs["moe_router_pre_softmax"]:
        raise InputError(
            "NET would keep 1 expert per token, whose normalised weight is always 1",
            where=where_of(student),
            value=1,
            rule="at least 2 for a model with norm_topk_prob and a softmax router (Megatron-Core refuses less)",
            fix="lower zero_experts.target_skip_rate",
        )
