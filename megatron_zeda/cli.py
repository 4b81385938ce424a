"""``zeda check | train | rollout | eval | report``. Exit 0 done, 1 failed, 2 wrong input.

The commands' own modules are imported only when they run, torch and Megatron-Core only to judge ``model.overrides`` and
the settings of a model whose ``config.json`` is there: without both a typing error is answered in half a second.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_zeda import __version__
from megatron_zeda.errors import InputError, ZedaError
from megatron_zeda.launch import Ranks, ranks_from_environment

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # exported, but the stub does not say so

# Commands that define their own flags: a module with add_arguments(parser) and run(args) -> exit code, and the help.
DELEGATED = {
    "rollout": ("megatron_zeda.rollout.cli", "sample responses of a model to prompts"),
    "eval": ("megatron_zeda.evaluation.cli", "accuracy, KL to the teacher, perplexity and skip rate of a model"),
    "report": ("megatron_zeda.evaluation.report_cli", "write the report and the pictures of a run"),
}

# How long ranks that stop with an error wait for each other's, to say a shared one once.
_PATIENCE = timedelta(seconds=5)
_ERROR_KEY = "zeda_input_error"

_OVERRIDES_HELP = "settings as section.key=<YAML value>, applied in order over the file's"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: the arguments; None: those of this process.
    """
    _quieten()
    try:
        args = _parse(list(sys.argv[1:] if argv is None else argv))
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except ZedaError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    command = next((word for word in arguments if not word.startswith("-")), None)
    takes_overrides = command in ("check", "train")
    if takes_overrides:
        # `--section.key=value` is tolerated; argparse would take it for an unknown flag.
        arguments = [re.sub(r"^--(?=\w+\.)", "", word) for word in arguments]
    parser = _parser(command)
    args, rest = parser.parse_known_args(arguments)
    # argparse takes the positional arguments in one piece; the overrides behind a flag are left over.
    if rest and (not takes_overrides or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _quieten() -> None:
    """Drop what Megatron-Core and torch say about optional libraries at import, unless Python was told to warn."""
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)


def _parser(command: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zeda", description="Turn a post-trained mixture-of-experts model into a dynamic one."
    )
    parser.add_argument("--version", action="version", version=f"zeda {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="check a configuration, print it complete, with what follows from it")
    _add_config(check)
    check.add_argument("--world-size", type=_positive, help="number of processes (default: the smallest possible)")
    check.add_argument(
        "--require-files", action="store_true", help="files that do not exist are errors, as they are for training"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.set_defaults(run=_check)

    train = commands.add_parser("train", help="train; under torchrun or srun, on all their processes")
    _add_config(train)
    train.set_defaults(run=_train)

    for name, (module, text) in DELEGATED.items():
        sub = commands.add_parser(name, help=text)
        if name == command:
            room = import_module(module)
            room.add_arguments(sub)
            sub.set_defaults(run=room.run)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=_OVERRIDES_HELP)


def _check(args: argparse.Namespace) -> int:
    from megatron_zeda.config_io import ConfigErrors

    try:
        return _check_or_raise(args)
    except ConfigErrors as error:
        if args.json:
            print(json.dumps({"problems": error.problems}, indent=2))
        raise


def _check_or_raise(args: argparse.Namespace) -> int:
    from megatron_zeda.config import derived, smallest_world_size
    from megatron_zeda.config_io import ConfigErrors, hf_config_file, load_config, missing_inputs, to_yaml

    world_size = args.world_size
    if world_size is None and "WORLD_SIZE" in os.environ:
        world_size = ranks_from_environment().world_size
    config = load_config(args.config, args.overrides, world_size=world_size)
    absent, wrong = missing_inputs(config)
    if wrong or (absent and args.require_files):
        raise ConfigErrors([*absent, *wrong])
    notes = [f"{line}: to be provided before training" for line in absent]
    shape = hf_config_file(config, args.config)
    hf_config = None
    if shape is None:
        notes.append("the model's config.json is not there yet: what depends on its shape was not checked")
    else:
        from megatron_zeda.config_machine import check_with_megatron, unavailable_here
        from megatron_zeda.models import load_hf_config

        hf_config = load_hf_config(shape.parent)
        check_with_megatron(config, hf_config)
        notes += unavailable_here(config)
        if shape.parent != config.hf_dir:
            notes.append(f"the model's shape was taken from {shape}")
    facts = derived(config, world_size or smallest_world_size(config), hf_config)
    _print_check(args.json, asdict(config), to_yaml(config), facts, notes)
    return 0


def _print_check(
    as_json: bool, config: dict[str, Any], yaml_text: str, facts: dict[str, Any], notes: list[str]
) -> None:
    if as_json:
        print(json.dumps({"config": config, "derived": facts, "notes": notes}, indent=2))
        return
    print(yaml_text, end="")
    print("# What follows from it:")
    for key, value in facts.items():
        print(f"#   {key}: {value:.4g}" if isinstance(value, float) else f"#   {key}: {value}")
    for note in notes:
        print(f"# note: {note}")


def _train(args: argparse.Namespace) -> int:
    from megatron_zeda.config_io import ConfigErrors, load_config, missing_inputs

    ranks = ranks_from_environment()
    try:
        config = load_config(args.config, args.overrides, world_size=ranks.world_size)
        from megatron_zeda.config_machine import unavailable_here

        absent, wrong = missing_inputs(config)
        problems = [*absent, *wrong, *unavailable_here(config)]
        if problems:
            raise ConfigErrors(problems)
    except ConfigErrors as error:
        # All ranks read the same files: one of them says so.
        if ranks.rank == 0:
            raise
        return error.exit_code
    from megatron_zeda.training import train

    try:
        return train(config)
    except InputError as error:
        # Wrong data and settings are wrong for all ranks alike; what only another rank has, it says itself.
        if ranks.rank and _said_by_rank_0(str(error), ranks):
            return error.exit_code
        _print_error(error)
        if ranks.rank == 0:
            _tell_other_ranks(str(error), ranks)
        return error.exit_code


def _store_of_ranks(ranks: Ranks) -> Store | None:
    """Where the processes met; None where there is one process, or before they have met."""
    import torch.distributed as dist

    if ranks.world_size == 1 or not dist.is_initialized():
        return None
    return dist.distributed_c10d._get_default_store()


def _tell_other_ranks(message: str, ranks: Ranks) -> None:
    """Leave the error for the others, and stay until they have read it: the store may end with this process."""
    store = _store_of_ranks(ranks)
    if store is not None:
        with suppress(RuntimeError):  # others may be well, and inside a collective
            store.set(_ERROR_KEY, message)
            store.wait([f"{_ERROR_KEY}/{rank}" for rank in range(1, ranks.world_size)], _PATIENCE)


def _said_by_rank_0(message: str, ranks: Ranks) -> bool:
    """Whether rank 0 stops with the same words; False when it does not say so in time."""
    store = _store_of_ranks(ranks)
    if store is None:
        return False
    try:
        store.wait([_ERROR_KEY], _PATIENCE)
        same = store.get(_ERROR_KEY).decode() == message
        store.set(f"{_ERROR_KEY}/{ranks.rank}", "read")
    except RuntimeError:
        return False
    return same


def _print_error(error: ZedaError) -> None:
    """One ``error: `` line per problem, with the rank where there are several."""
    prefix = ""
    ranks = _ranks_or_none()
    if ranks is not None and ranks.world_size > 1:
        prefix = f"[rank {ranks.rank}] "
    for line in getattr(error, "problems", None) or [str(error)]:
        print(f"{prefix}error: {line}", file=sys.stderr)


def _ranks_or_none() -> Ranks | None:
    try:
        return ranks_from_environment()
    except ZedaError:
        return None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
