"""``README.md`` of an export: the model card that Hugging Face shows, made from facts only.

A card says what was measured, by whom it is told: ``--card-metrics`` takes the ``report.json`` of ``zeda report``, or a
JSON object of one's own::

    {"base_model": "Qwen/Qwen3-30B-A3B", "weight": 2.0, "skip_rate": 0.512, "scores": {"GSM8K": 0.951, "IFEval": 0.86}}

Every key may be missing. What is not given is reported as not measured, never guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_zeda.conversion.formats import SAVES, ZEDA_OVERRIDES_FILE, ExportFormat, stock_notes
from megatron_zeda.conversion.fp8 import is_fp8_layout
from megatron_zeda.errors import InputError
from megatron_zeda.models import Family, method_of, teacher_topk
from megatron_zeda.models.hf_config import read_json_object
from megatron_zeda.models.methods import skipping_beta

CARD_FILE = "README.md"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_OWN_KEYS = ("base_model", "weight", "skip_rate", "scores")


@dataclass(frozen=True)
class CardMetrics:
    """What is known about a model besides its weights.

    Attributes:
        base_model: hub id or name of the static model it was made from.
        weight: w, the weight of the zero experts in the group balancing loss.
        skip_rate: measured share of the K slots that went to zero experts, 0 to 1.
        scores: name -> value, as measured; of the base model too where known.
        base_scores: the base model's.
        source: the file they come from.
    """

    base_model: str | None = None
    weight: float | None = None
    skip_rate: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    base_scores: Mapping[str, float] = field(default_factory=dict)
    source: str | None = None

    def complete(self, base_model: str | None, weight: float | None) -> CardMetrics:
        """This, with what it does not say itself."""
        return replace(
            self,
            base_model=self.base_model or base_model,
            weight=weight if self.weight is None else self.weight,
        )


def read_card_metrics(path: str | Path) -> CardMetrics:
    """Read ``--card-metrics``: the ``report.json`` of a run, or a JSON object with the keys of this module's docstring.

    Raises:
        InputError: for a file that is neither, an unknown key, and numbers that cannot be right.
    """
    path = Path(path)
    values = read_json_object(path)
    if "student" in values:
        student, teacher = values["student"] or {}, values.get("teacher") or {}
        if not isinstance(student, dict) or not isinstance(teacher, dict):
            raise InputError("`student` is not an object", where=path, rule="the report.json of zeda report")
        return CardMetrics(
            skip_rate=_number(student.get("skip_rate"), path, "student.skip_rate", low=0.0, high=1.0),
            scores=_report_scores(student, path),
            base_scores=_report_scores(teacher, path),
            source=path.name,
        )
    unknown = sorted(set(values) - set(_OWN_KEYS))
    if unknown or not values:
        raise InputError(
            f"`{unknown[0]}` is not a key of card metrics" if unknown else "no metrics",
            where=path,
            rule=f"{', '.join(_OWN_KEYS)}; or the report.json of zeda report",
        )
    base_model, scores = values.get("base_model"), values.get("scores") or {}
    if base_model is not None and (not isinstance(base_model, str) or not base_model.strip()):
        raise InputError("`base_model` is wrong", where=path, value=base_model, rule="a hub id or a name")
    if not isinstance(scores, dict):
        raise InputError("`scores` is wrong", where=path, value=scores, rule="an object of numbers")
    return CardMetrics(
        base_model=base_model,
        weight=_number(values.get("weight"), path, "weight", low=0.0),
        skip_rate=_number(values.get("skip_rate"), path, "skip_rate", low=0.0, high=1.0),
        scores={name: _required(value, path, f"scores.{name}") for name, value in scores.items()},
        source=path.name,
    )


def model_card(
    family: Family,
    config: dict[str, Any],
    format: ExportFormat,
    *,
    num_experts: int,
    num_zero_experts: int,
    num_bytes: int,
    metrics: CardMetrics | None = None,
    num_carried: int = 0,
) -> str:
    """Text of the card.

    Args:
        family: the model's.
        config: ``config.json`` of the export.
        format: in which form it is.
        num_experts: N.
        num_zero_experts: Z; 0 for a static model.
        num_bytes: size of the weights.
        metrics: what was measured.
        num_carried: tensors that lie beside the model, unchanged.
    """
    metrics = metrics or CardMetrics()
    kind = "dynamic mixture of experts" if num_zero_experts else "mixture of experts"
    base = metrics.base_model or "not recorded"
    parts = [
        _front_matter(metrics.base_model, dynamic=num_zero_experts > 0),
        f"# {_text(base.rsplit('/', 1)[-1]) if metrics.base_model else family.name}: {kind}\n",
    ]
    method = method_of(config)
    if method in _METHODS:
        parts.append(f"{_METHODS[method]}\n")
    elif num_zero_experts:
        parts.append(
            "Each token chooses its experts among the real ones and a group of zero experts that output nothing; what "
            "goes to a zero expert is not computed. The router decides how much work a token gets.\n"
        )
    dial = config.get("zeda_zero_logit_bias")
    rows = [
        ("base model", _text(base)),
        ("real experts N per layer", num_experts),
        *([("zero experts N_Z per layer", num_zero_experts)] if num_zero_experts else []),
        ("experts per token K", config["num_experts_per_tok"]),
        *([("experts per token of the base model", teacher_topk(config))] if method == "net" else []),
        *([("beta", f"{skipping_beta(config):g}")] if method == "dynamic_skipping" else []),
        *_trained(metrics, num_zero_experts),
        *([("dial `zeda_zero_logit_bias`", dial)] if dial else []),
        ("format", f"`{format}`"),
        *([("precision", _FP8_PRECISION)] if is_fp8_layout(config) else []),
        ("weights", f"{num_bytes:,} bytes"),
        *([("tensors beside the model (not trained)", num_carried)] if num_carried else []),
    ]
    parts.append("\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]) + "\n")
    parts.append(_scores(metrics))
    parts.append(_serving(format if num_zero_experts else None) if method != "dynamic_skipping" else _SKIPPING)
    parts += [_FP8] if is_fp8_layout(config) else []
    parts += [f"Not exactly this model everywhere: {note}.\n" for note in stock_notes(family, config, format)]
    parts.append("The licence is that of the base model; its licence files, where it has any, lie beside this card.\n")
    return "\n".join(parts)


_METHODS: dict[str | None, str] = {
    "adamoe": "A control (AdaMoE): each token chooses among the real experts and a group of null experts that output "
    "nothing, and the routing weights are normalised over the real ones among its choice.",
    "copy": "A control (copy experts): each token chooses among the real experts and a group of identity experts that "
    "return their input.",
    "net": "A control (NET): the base model with fewer experts per token, distilled.",
    "dynamic_skipping": "A control (Dynamic Skipping), not trained: of its K experts a token skips those whose weight "
    "is below beta times its largest.",
}


def _trained(metrics: CardMetrics, num_zero_experts: int) -> list[tuple[str, str]]:
    if not num_zero_experts:
        return []
    weight = "not recorded" if metrics.weight is None else f"{metrics.weight:g}"
    rate = "not measured" if metrics.skip_rate is None else f"{100 * metrics.skip_rate:.1f} %"
    return [("weight w of the zero group in training", weight), ("skip rate", rate)]


def _front_matter(base_model: str | None, *, dynamic: bool) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base_model and _HUB_ID.match(base_model):
        lines += [f"base_model: {json.dumps(base_model)}", "base_model_relation: finetune"]
    lines += ["tags:", "- mixture-of-experts", *(["- zero-experts", "- zeda"] if dynamic else []), "---", ""]
    return "\n".join(lines)


def _scores(metrics: CardMetrics) -> str:
    if not metrics.scores:
        return "## Scores\n\nNone were given for this export.\n"
    base = bool(metrics.base_scores)
    lines = ["## Scores", "", "| | this model | base model |" if base else "| | this model |"]
    lines.append("|---|---|---|" if base else "|---|---|")
    for name, value in metrics.scores.items():
        other = metrics.base_scores.get(name)
        extra = f" {'not measured' if other is None else f'{other:g}'} |" if base else ""
        lines.append(f"| {_text(name)} | {value:g} |{extra}")
    return "\n".join(lines) + f"\n\nAs given in `{_text(metrics.source or '')}`.\n"


_TRANSFORMERS = """With transformers 5:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="auto"{code})
```
"""
_STATIC = """
vLLM and SGLang serve it as the base model: `vllm serve FOLDER`,
`python -m sglang.launch_server --model-path FOLDER`.
"""
_ZEDA = """
`trust_remote_code` runs the `modeling_zeda_*.py` files beside this card. vLLM and SGLang run them with
`--trust-remote-code`, through their transformers backends: the same answers, no saving. Without this code engines
refuse the folder, because its routers have more rows than the stock model has experts.
"""
_DENSE = """
A stock model for every engine: `vllm serve FOLDER`, `python -m sglang.launch_server --model-path FOLDER`. Some of its
experts are all-zero matrices. Leave them out when quantising (their scale would be zero), and do not train from this
form.
"""
_MONE = f"""With vLLM 0.33 or newer, without a plugin: `vllm serve FOLDER`.

In bf16, tensor and pipeline parallel only: for substituted experts vLLM refuses expert and data parallelism,
quantisation and LoRA on experts. Other engines cannot load this form. The keys in `{ZEDA_OVERRIDES_FILE}`
(`--hf-overrides`) make the same weights a `zeda` checkpoint.
"""
_HOW: dict[ExportFormat | None, str] = {
    None: _TRANSFORMERS.replace("{code}", "") + _STATIC,
    "zeda": _TRANSFORMERS.replace("{code}", ", trust_remote_code=True") + _ZEDA,
    "dense-zeros": _TRANSFORMERS.replace("{code}", "") + _DENSE,
    "vllm-mone": _MONE,
}


_FP8_PRECISION = "experts and attention in FP8 (E4M3) with a scale for every 128 x 128 values, the rest as it was"
_FP8 = """In FP8: vLLM and SGLang read the precision from `config.json`. transformers wants the package accelerate;
without a GPU it turns the weights back into bfloat16, with one it computes skipped slots, too. How they are served in
FP8 is unverified: the tool that wrote them was tried without a GPU.
"""
_SKIPPING = f"""## How to serve it

{_TRANSFORMERS.replace("{code}", ", trust_remote_code=True")}
`trust_remote_code` runs the `modeling_zeda_*.py` files beside this card. Without them transformers runs the base
model, which these weights are, and skips nothing.
"""


def _serving(format: ExportFormat | None) -> str:
    saves = f"\nWhat it saves: {SAVES[format]}.\n" if format else ""
    return f"## How to serve it\n\n{_HOW[format]}{saves}"


def _report_scores(model: dict[str, Any], path: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for key in ("accuracy", "perplexity", "kl_to_teacher"):
        value = _number(model.get(key), path, key, low=0.0)
        if value is not None:
            found[key.replace("_", " ")] = value
    tasks = model.get("accuracy_by_task") or {}
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise InputError("`accuracy_by_task` is wrong", where=path, value=tasks, rule="the report.json of zeda report")
    for name, task in tasks.items():
        number = _number(task.get("accuracy"), path, f"accuracy_by_task.{name}", low=0.0)
        if number is not None:
            found[f"accuracy, {name}"] = number
    return found


def _number(value: Any, path: Path, key: str, *, low: float = -math.inf, high: float = math.inf) -> float | None:
    return None if value is None else _required(value, path, key, low=low, high=high)


def _required(value: Any, path: Path, key: str, *, low: float = -math.inf, high: float = math.inf) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high:
        rule = "a number" + (f" from {low:g} to {high:g}" if math.isfinite(high) else "")
        raise InputError(f"`{key}` is wrong", where=path, value=value, rule=rule)
    return float(value)


def _text(value: str) -> str:
    """For a table cell: one line, no column breaks, no markup of its own."""
    return re.sub(r"([|\[\]<>`*_\\])", r"\\\1", " ".join(value.split()))
