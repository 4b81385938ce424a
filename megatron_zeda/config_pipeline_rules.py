"""The rules of :mod:`.config_rules` about pipeline stages: how they exchange messages, and which layers they get."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_zeda.config import Config, ModelSettings
from megatron_zeda.config_megatron import VIRTUAL_PIPELINE, pipeline_layout, pipeline_split
from megatron_zeda.config_refusals import Problem

_PIPELINE = "model.pipeline_model_parallel_size"
_VIRTUAL = "model.virtual_pipeline_model_parallel_size"


def pipeline_problems(config: Config) -> Iterator[Problem]:
    """What is wrong with the pipeline of any model."""
    yield from _messages(config)
    yield from _split(config)


def _messages(config: Config) -> Iterator[Problem]:
    """How virtual stages exchange messages, and in which order they work."""
    model = config.model
    stages, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    keys = ("model.virtual_pipeline_model_parallel_size", "model.pipeline_model_parallel_size")
    if virtual is not None and stages == 1:
        yield Problem(
            "virtual_stages", keys, f"{virtual} virtual stages need pipeline_model_parallel_size above 1", "use null"
        )
    elif virtual == 1:
        yield Problem("virtual_stages", keys, "one virtual stage a process is the pipeline as it is", "use null")
    exchange = VIRTUAL_PIPELINE | model.overrides if virtual is not None else model.overrides
    overlap, batch = (f"model.overrides.{name}" for name in VIRTUAL_PIPELINE)
    if virtual is None:
        if stages > 1 and exchange.get("overlap_p2p_comm"):
            yield Problem("overlap_p2p", (overlap, *keys), "true needs virtual pipeline stages", "remove it")
        return
    if exchange["batch_p2p_comm"]:
        if stages == 2:
            reason = "virtual pipeline stages of two processes would receive each other's messages in the wrong order"
            yield Problem("batch_p2p", (batch, *keys), reason, "remove it")
        elif exchange["overlap_p2p_comm"]:
            reason = f"true needs {overlap}=false: Megatron-Core cannot overlap batches of messages with computation"
            yield Problem("batch_p2p", (batch, overlap, *keys), reason, "remove it")
    group = model.overrides.get("microbatch_group_size_per_vp_stage")
    if group is not None and not (type(group) is int and group >= stages):
        yield Problem(
            "micro_batch_group",
            ("model.overrides.microbatch_group_size_per_vp_stage", keys[1]),
            f"{group!r}, but virtual stages work on pipeline_model_parallel_size {stages} or more batches in turn",
            "raise it, or remove it",
        )


def _split(config: Config) -> Iterator[Problem]:
    """Ways to deal out layers that exclude each other."""
    model, split = config.model, pipeline_split(config)
    keys = tuple(f"model.{name}" for name in split)
    if not split:
        return
    if model.pipeline_model_parallel_size == 1:
        yield Problem("pipeline_split", (*keys, _PIPELINE), "has no effect in one pipeline stage", "remove it")
        return
    ways = {name.split("_")[0] for name in split}  # account, num, pipeline: shares, sizes of the ends, all written out
    if len(ways) > 1:
        message = f"not together with {keys[-1]}: each deals out all layers"
        yield Problem("pipeline_split", keys, message, "keep one of them")
        return
    ends = (model.num_layers_in_first_pipeline_stage, model.num_layers_in_last_pipeline_stage)
    virtual = model.virtual_pipeline_model_parallel_size
    if model.pipeline_model_parallel_size == 2 and virtual is not None and None not in ends:
        reason = "with two pipeline stages and virtual ones Megatron-Core cannot place the layers where both are given"
        yield Problem("pipeline_split", (*keys, _PIPELINE), reason, "give one of the two; the other follows")


def layer_problems(config: Config, num_layers: int) -> Iterator[Problem]:
    """What keeps a model's layers from being dealt out.

    Args:
        config: the configuration.
        num_layers: layers of the model.
    """
    model = config.model
    if model.pipeline_model_parallel_size == 1 or any(_split(config)):
        return  # reported as such
    if model.pipeline_model_parallel_layout is not None:
        yield from _layout_problems(model, num_layers)
    elif model.num_layers_in_first_pipeline_stage is None and model.num_layers_in_last_pipeline_stage is None:
        yield from _equal_problems(model, num_layers)
    else:
        yield from _end_problems(model, num_layers)


def _equal_problems(model: ModelSettings, num_layers: int) -> Iterator[Problem]:
    """Layers, and what counts as one, in equal numbers."""
    stages, virtual = model.pipeline_model_parallel_size, model.virtual_pipeline_model_parallel_size
    parts = stages * (virtual or 1)
    embedding, loss = model.account_for_embedding_in_pipeline_split, model.account_for_loss_in_pipeline_split
    if (num_layers + embedding + loss) % parts == 0:
        return
    counted = f"{num_layers} layers" + " and embedding" * embedding + " and loss" * loss
    ways = []
    if not (embedding or loss):
        if (num_layers + 1) % parts == 0:
            ways.append("set model.account_for_loss_in_pipeline_split=true")
        elif (num_layers + 2) % parts == 0:
            ways.append("count embedding and loss as layers (model.account_for_*_in_pipeline_split=true)")
        each = -(-num_layers // stages)
        if virtual is None and num_layers > each * (stages - 1):
            ways.append(f"set model.num_layers_in_first_pipeline_stage={num_layers - each * (stages - 1)}")
    ways.append("write out model.pipeline_model_parallel_layout")
    yield Problem(
        "layers",
        (_PIPELINE, _VIRTUAL),
        f"{stages}" + (f" x {virtual} virtual stages" if virtual else "") + f" does not divide the model's {counted}",
        "use a divisor of that number, or " + ", or ".join(ways),
    )


def _end_problems(model: ModelSettings, num_layers: int) -> Iterator[Problem]:
    """Numbers for the first and last stage, and the rest in equal numbers between them."""
    virtual = model.virtual_pipeline_model_parallel_size
    ends = {
        f"model.num_layers_in_{end}_pipeline_stage": count
        for end in ("first", "last")
        if (count := getattr(model, f"num_layers_in_{end}_pipeline_stage")) is not None
    }
    keys = (*ends, _PIPELINE, _VIRTUAL)
    for key, count in ends.items():
        if count % (virtual or 1):
            message = f"{count} layers are not the same number in each of {virtual} virtual stages"
            yield Problem("layers", (key, _VIRTUAL), message, "use a multiple")
            return
    rest, middle = num_layers - sum(ends.values()), model.pipeline_model_parallel_size - len(ends)
    if middle == 0 and rest:
        message = f"{' + '.join(map(str, ends.values()))} layers are not the model's {num_layers}"
        yield Problem("layers", keys, message, "give one of the two; the other follows")
    elif middle and (rest <= 0 or rest % (middle * (virtual or 1))):
        parts = f"{middle} other pipeline stages" + (f" x {virtual} virtual ones" if virtual else "")
        message = f"of the model's {num_layers} layers it leaves {rest}, which {parts} cannot share equally"
        yield Problem("layers", keys, message, "use another number, or write out model.pipeline_model_parallel_layout")


def _layout_problems(model: ModelSettings, num_layers: int) -> Iterator[Problem]:
    """Stages that are written out, judged by Megatron-Core."""
    text, stages = model.pipeline_model_parallel_layout, model.pipeline_model_parallel_size
    assert text is not None
    virtual = model.virtual_pipeline_model_parallel_size or 1
    keys = ("model.pipeline_model_parallel_layout", _PIPELINE, _VIRTUAL)
    try:
        layout = pipeline_layout(text, stages)
        parts = layout.virtual_pipeline_model_parallel_size
        if parts != virtual:
            raise ValueError(
                f"{stages * parts} parts, and {stages} stages x {virtual} virtual ones have {stages * virtual}"
            )
        layout.validate_layer_layout(num_layers=num_layers, mtp_num_layers=None)
    except (ValueError, AssertionError, IndexError) as error:  # IndexError: parts without anything in them
        yield Problem("layers", keys, f"{text!r}: {error}", "correct it: as many parts between | as there are stages")
