"""What the methods beside ZEDA change in a run: the student's configuration, what is trained, and Dynamic Skipping."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron_zeda import platform
from megatron_zeda.config import Config
from megatron_zeda.config_megatron import transformer_config
from megatron_zeda.conversion.megatron_io import HF_FOLDER
from megatron_zeda.data import evaluation_batches
from megatron_zeda.distillation.forward import forward_hidden
from megatron_zeda.errors import InputError, disk_errors
from megatron_zeda.models import load_hf_config, with_method
from megatron_zeda.models.hf_config import BETA_KEY
from megatron_zeda.training import checkpoint, setup, validation
from megatron_zeda.zero_experts import DynamicSkippingRouter, WeightRatios, router_statistics, zero_expert_routers


def student_hf_config(config: Config) -> dict[str, Any]:
    """The student's ``config.json``: that of the model the run starts from, with the method's keys.

    Raises:
        InputError: no configuration beside the checkpoint, a model that the method cannot start from, or a run that
            has another method.
    """
    assert config.hf_dir is not None and config.model.checkpoint is not None  # the rules of the configuration demand it
    beside = Path(config.model.checkpoint) / HF_FOLDER
    if not (beside / "config.json").is_file():
        raise InputError(
            "no config.json beside the checkpoint",
            where=beside,
            rule="every checkpoint of the run, and its export, get their configuration and tokenizer from there",
            fix="make the folder with checkpoint_tools/hf_to_megatron.py",
        )
    zero, resumed = config.zero_experts, checkpoint.resume_folder(config)
    if resumed is not None and (resumed / HF_FOLDER / "config.json").is_file():
        # A run goes on with the method it has; otherwise its first save would notice.
        with_method(load_hf_config(resumed / HF_FOLDER), zero.method, target_skip_rate=zero.target_skip_rate)
    return with_method(load_hf_config(config.hf_dir), zero.method, target_skip_rate=zero.target_skip_rate)


def freeze(config: Config, chunks: list[Any]) -> None:
    """With ``train.trainable=router``, let gradients reach nothing but the routers; before DDP wraps the chunks."""
    if config.train.trainable == "all":
        return
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(".mlp.router." in name)
        embedding = getattr(setup.unwrap(chunk), "embedding", None)
        if embedding is not None:
            # Recomputation, and the schedules of pipelines, ask the first hidden states whether there is a gradient.
            embedding.register_forward_hook(_require_gradient)


def _require_gradient(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() and not output.requires_grad else output


# ---- Dynamic Skipping -----------------------------------------------------------------------------------------------

CALIBRATION_FILE = "calibration.json"


def calibrate(
    config: Config, hf_config: dict[str, Any], data: setup.Data, held_out: validation.HeldOut | None
) -> list[str]:
    """Find the beta of Dynamic Skipping on the first ``train.train_iters`` global batches; a collective call.

    Nothing is trained. ``<run_dir>/checkpoints/hf`` gets the configuration with the beta, and
    ``<run_dir>/calibration.json`` what was measured.

    Args:
        config: the configuration of the run, with a ``target_skip_rate``.
        hf_config: the student's.
        data: its training files are what beta is found on, at the tokens that ``balance_tokens`` names.
        held_out: adds the distance to the teacher at that beta.

    Returns:
        What to tell the user, a line each.
    """
    assert config.model.checkpoint is not None and config.hf_dir is not None
    target = config.zero_experts.target_skip_rate
    assert target is not None  # a rule of the configuration
    chunks = setup.build_chunks(hf_config, transformer_config(config, hf_config, where=config.hf_dir))
    checkpoint.load_weights(chunks, Path(config.model.checkpoint))
    for chunk in chunks:
        chunk.eval()
    routers = [router for router in zero_expert_routers(chunks) if isinstance(router, DynamicSkippingRouter)]
    batches = list(islice(evaluation_batches(data.train), config.train.train_iters))
    beta = _find_beta(config, chunks, routers, batches, target)
    for router in routers:
        router.beta = beta
    router_statistics(chunks)
    _run(config, chunks, batches)
    statistics = router_statistics(chunks)
    outcome = validation.validate(chunks, held_out) if held_out is not None else None
    found = {
        "beta": beta,
        "target_skip_rate": target,
        "skip_rate": statistics.skip_rate,
        "skip_rate_per_layer": statistics.skip_rate_per_layer,
        "tokens": statistics.num_selections[0] // hf_config["num_experts_per_tok"],
    }
    if torch.distributed.get_rank() == 0:
        _write(config, hf_config, found)
    lines = [f"Dynamic Skipping: beta {beta:.5f}, skip rate {100 * statistics.skip_rate:.1f} % (nothing is trained)"]
    if abs(statistics.skip_rate - target) > 0.01:
        lines.append(f"no beta skips {100 * target:.1f} %: the largest weight of a token is never dropped")
    if outcome is not None:
        distance = "" if outcome.kl_forward is None else f", KL to the teacher {outcome.kl_forward:.4f}"
        lines.append(f"held out: ce {outcome.ce:.4f}{distance}, skip rate {100 * outcome.skip_rate:.1f} %")
    return lines


def _run(config: Config, chunks: list[Any], batches: list[Any]) -> None:
    counted = validation.not_predicting_a_response if config.zero_experts.balance_tokens == "response" else None
    for batch in batches:
        forward_hidden(chunks, batch, lambda *_: None, counted=counted)


def _find_beta(
    config: Config, chunks: list[Any], routers: list[DynamicSkippingRouter], batches: list[Any], target: float
) -> float:
    ratios = WeightRatios(platform.device())
    for router in routers:
        router.ratios = ratios
    _run(config, chunks, batches)
    for router in routers:
        router.ratios = None
    # Every rank has counted its own tokens in its own layers; context- and tensor-parallel ranks have parts of them.
    torch.distributed.all_reduce(ratios.counts)
    return ratios.beta_for(target)


def _write(config: Config, hf_config: dict[str, Any], found: dict[str, Any]) -> None:
    source, target = Path(str(config.model.checkpoint)) / HF_FOLDER, config.save_dir / HF_FOLDER
    with disk_errors(config.run_dir):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(".hf.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        values = {**hf_config, BETA_KEY: found["beta"]}
        (partial / "config.json").write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        checkpoint.write_atomically(config.run_dir / CALIBRATION_FILE, json.dumps(found, indent=2) + "\n")


def export_source(config: Config) -> tuple[Path, dict[str, Any]]:
    """What ``megatron_to_hf`` exports at the end of a run: the folder, and further arguments."""
    if config.zero_experts.method == "dynamic_skipping":
        assert config.model.checkpoint is not None  # the rules of the configuration demand it
        return Path(config.model.checkpoint), {"hf_config": config.save_dir / HF_FOLDER}
    return config.save_dir, {}
