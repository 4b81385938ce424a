"""Tables, pictures and one JSON file from the results of `make compare`."""

from __future__ import annotations

import io
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]

# Lines of the picture: name, labels in the order of the skip rate, colour.
FAMILIES = (
    ("ZEDA, stage 1, w = 1, 2.5, 4", ("zeda_w1.0", "zeda", "zeda_w4.0"), "#1f5fa8"),
    ("ZEDA, stages 1 + 2", ("zeda_2",), "#0b2e59"),
    ("the paper's: cross entropy, then sampled KL", ("ce_2_sampled",), "#c0392b"),
    ("NET, stage 1, K = 3, 2", ("net_0.25", "net"), "#d9731a"),
    ("NET, stages 1 + 2", ("net_2",), "#8a3f00"),
    ("AdaMoE, stage 1", ("adamoe",), "#2c8c4a"),
    ("AdaMoE, stages 1 + 2", ("adamoe_2",), "#145228"),
    ("identity experts, stage 1", ("copy",), "#9b59b6"),
    ("Dynamic Skipping, untrained", tuple(f"dynamic_skipping_{rate}" for rate in (0.15, 0.3, 0.45)), "#b03060"),
    ("fewer experts, untrained", ("topk_3_untrained", "topk_2_untrained", "topk_1_untrained"), "#777777"),
)  # fmt: skip
# What part of the KL at the start counts as less than it.
CLEARLY_BELOW = 0.95
ESTIMATORS = (("full vocabulary", "ce_2"), ("sampled", "ce_2_sampled"))


def write(results: Path, folder: Path) -> None:
    """Write `compare.json`, `compare.md` and the pictures from the results that are there."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    if "teacher" not in found:
        raise SystemExit(f"error: {results / 'teacher.json'} is missing: run compare.py first")
    built = build(found)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.json").write_text(json.dumps(built, indent=1) + "\n", encoding="utf-8")
    (folder / "compare.md").write_text(markdown(built), encoding="utf-8")
    (folder / "pareto.png").write_bytes(pareto(built))
    if built["curves"]:
        (folder / "estimators.png").write_bytes(estimators(built["curves"]))
    print(markdown(built))
    print(f"{folder / 'compare.json'}: {len(found)} runs")


def build(found: Mapping[str, Result]) -> dict[str, Any]:
    """Numbers per run, and per label their mean and range over the seeds."""
    topk = found["teacher"]["evaluation"]["model"]["num_experts_per_token"]
    rows = {name: numbers(result, topk) for name, result in found.items()}
    labels: dict[str, list[str]] = {}
    for name, result in found.items():
        labels.setdefault(result["run"]["label"], []).append(name)
    dial: dict[float, list[dict[str, Any]]] = {}
    for result in found.values():
        for point in result["dial"]:
            dial.setdefault(point["bias"], []).append(measured(point, topk))
    return {
        "labels": {label: spread([rows[name] for name in names]) for label, names in labels.items()},
        "dial": {str(bias): spread(points) for bias, points in sorted(dial.items())},
        "controller": [settled(result) for result in found.values() if result["run"]["label"] == "zeda_controlled"],
        "tokens_to_the_same_kl": tokens_ratios(found),
        "curves": curves(found),
        "runs": {name: {"run": result["run"], **rows[name], **course(result)} for name, result in found.items()},
        "versions": found["teacher"]["versions"],
    }


def numbers(result: Result, topk: int) -> dict[str, Any]:
    """What is compared, of one run."""
    return measured(result["evaluation"], topk)


def course(result: Result) -> dict[str, Any]:
    """The skip rate of every training step and what the held-out batches showed, of a run that trained."""
    training = result["training"] or {}
    rates = [None if rate is None else round(rate, 4) for rate in training.get("skip_rates", [])]
    kept = ("step", "sampled_tokens", "ce", "kl_forward", "skip_rate")
    points = [{key: point[key] for key in kept if key in point} for point in training.get("points", [])]
    return {"skip_rates": rates, "held_out_batches": points}


def measured(evaluation: Mapping[str, Any], topk: int) -> dict[str, Any]:
    """The numbers of one evaluation. `saved`: share of the teacher's K expert slots that were not computed."""
    used = evaluation["model"]["num_experts_per_token"] / topk
    response, prompt = (1 - (1 - evaluation[key]) * used for key in ("skip_rate", "skip_rate_prompt"))
    tokens = evaluation["response_tokens"], evaluation["prompt_tokens"]
    return {
        "accuracy": evaluation["accuracy"],
        "kl_to_teacher": evaluation["kl_to_teacher"],
        "perplexity": evaluation["perplexity"],
        "saved": response,
        "saved_prompt": prompt,
        "saved_all": (response * tokens[0] + prompt * tokens[1]) / sum(tokens),
    }


def settled(result: Result) -> dict[str, Any]:
    """How a run with the controller of w keeps its target: the training batches' skip rate in the last third.

    `mean` of all of its steps, `low` and `high` of the means of ten steps that follow each other.
    """
    rates = result["training"]["skip_rates"]
    last = rates[len(rates) * 2 // 3 :]
    tens = [statistics.fmean(last[at : at + 10]) for at in range(0, len(last) - 9, 10)]
    target = next(word.split("=")[1] for word in result["run"]["settings"] if "target_skip_rate" in word)
    return {
        "seed": result["run"]["seed"],
        "target": float(target),
        "mean": statistics.fmean(last),
        "low": min(tens),
        "high": max(tens),
        "evaluated": result["evaluation"]["skip_rate"],
    }


def spread(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Mean, lowest, highest and standard deviation over seeds (null for one)."""
    return {"seeds": len(rows)} | {
        key: {
            "mean": statistics.fmean(row[key] for row in rows),
            "low": min(row[key] for row in rows),
            "high": max(row[key] for row in rows),
            "sd": statistics.stdev(row[key] for row in rows) if len(rows) > 1 else None,
        }
        for key in rows[0]
    }


# ------------------------------------------------------------------------------------------ tokens to the same KL
def curves(found: Mapping[str, Result]) -> dict[str, list[list[list[float]]]]:
    """`{estimator: [one list of [sampled tokens, KL] per seed]}`, from the end of stage 1 on."""
    made: dict[str, list[list[list[float]]]] = {}
    for name, label in ESTIMATORS:
        for result in found.values():
            if result["run"]["label"] == label:
                made.setdefault(name, []).append(curve_of(result, found))
    return made


def curve_of(result: Result, found: Mapping[str, Result]) -> list[list[float]]:
    """KL to the teacher on the held-out batches, by sampled tokens; the first point is the student of stage 1."""
    start = found[f"{result['run']['start']}.seed{result['run']['seed']}"]["training"]["points"][-1]
    points = result["training"]["points"]
    return [[0, start["kl_forward"]], *([point["sampled_tokens"], point["kl_forward"]] for point in points)]


def tokens_to(points: Sequence[Sequence[float]], level: float) -> float | None:
    """Sampled tokens at which the curve first comes down to `level` (interpolated); None if it never does."""
    for (tokens, kl), (next_tokens, next_kl) in itertools.pairwise(points):
        if next_kl <= level < kl:
            return tokens + (kl - level) / (kl - next_kl) * (next_tokens - tokens)
    return 0.0 if points and points[0][1] <= level else None


def tokens_ratios(found: Mapping[str, Result]) -> dict[str, Any]:
    """How many times as many student tokens another estimator needs as the full KL, for the best KL that both reach."""
    ratios: dict[str, Any] = {}
    for name, label in ESTIMATORS[1:]:
        per_seed = []
        for result in found.values():
            full = found.get(f"{ESTIMATORS[0][1]}.seed{result['run']['seed']}")
            if result["run"]["label"] == label and full is not None:
                ours, others = curve_of(full, found), curve_of(result, found)
                level = max(min(kl for _, kl in ours), min(kl for _, kl in others))
                mine, theirs = tokens_to(ours, level), tokens_to(others, level)
                # The curves are rugged: a level that is not clearly below the start is reached by chance.
                comparable = level < CLEARLY_BELOW * ours[0][1]
                per_seed.append(
                    {
                        "seed": result["run"]["seed"],
                        "kl": level,
                        "tokens_full": mine,
                        "tokens": theirs,
                        "ratio": theirs / mine if comparable and mine and theirs else None,
                        "best_full": min(kl for _, kl in ours),
                        "best": min(kl for _, kl in others),
                    }
                )
        known = [row["ratio"] for row in per_seed if row["ratio"] is not None]
        mean = math.exp(statistics.fmean(map(math.log, known))) if known else None
        ratios[name] = {"geometric_mean": mean, "per_seed": per_seed}
    return ratios


# ------------------------------------------------------------------------------------------------- text and pictures
def markdown(built: Mapping[str, Any]) -> str:
    """The tables: mean and, with more than one seed, the range."""
    head = "| | seeds | accuracy, % | KL to the teacher | perplexity, text | slots saved, responses, % | prompts, % |"
    lines = [head, "|---|---:|---:|---:|---:|---:|---:|"]
    for label, row in built["labels"].items():
        lines.append(f"| {label} | {row['seeds']} | {cells(row)} |")
    if built["dial"]:
        lines += ["", head.replace("| |", "| dial |", 1), lines[1]]
        lines += [f"| {float(bias):+g} | {row['seeds']} | {cells(row)} |" for bias, row in built["dial"].items()]
    if built["controller"]:
        lines += [
            "",
            "| controller, seed | target, % | last third of the steps, % | means of ten steps, % | held out, % |",
        ]
        lines.append("|---:|---:|---:|---:|---:|")
        for row in built["controller"]:
            target, mean, low, high, held_out = (
                f"{100 * row[key]:.1f}" for key in ("target", "mean", "low", "high", "evaluated")
            )
            lines.append(f"| {row['seed']} | {target} | {mean} | {low} to {high} | {held_out} |")
    for name, ratio in built["tokens_to_the_same_kl"].items():
        if ratio["per_seed"]:
            each = ", ".join("-" if row["ratio"] is None else f"{row['ratio']:.2f}" for row in ratio["per_seed"])
            lines += ["", f"Student tokens of `{name}` over those of the full KL, to the same KL, per seed: {each}"]
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any]) -> str:
    """One line's numbers."""
    forms = (
        ("accuracy", 100, 1),
        ("kl_to_teacher", 1, 4),
        ("perplexity", 1, 1),
        ("saved", 100, 1),
        ("saved_prompt", 100, 1),
    )
    return " | ".join(cell(row[key], scale, digits) for key, scale, digits in forms)


def cell(value: Mapping[str, float], scale: float, digits: int) -> str:
    """`mean (low to high)`."""
    mean, low, high = (f"{scale * value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low} to {high})"


def draw_families(axes: Any, built: Mapping[str, Any]) -> None:
    """Every family's line, the seeds as small dots, the dial and the teacher."""
    runs = built["runs"].values()
    for name, labels, colour in FAMILIES:
        means = [built["labels"][label] for label in labels if label in built["labels"]]
        if not means:
            continue
        x, y = ([100 * row[key]["mean"] for row in means] for key in ("saved", "accuracy"))
        axes.plot(x, y, "o-", color=colour, markersize=6, linewidth=1.4, label=name)
        seeds = [run for run in runs if run["run"]["label"] in labels and run["run"]["seed"]]
        x, y = ([100 * run[key] for run in seeds] for key in ("saved", "accuracy"))
        axes.plot(x, y, ".", color=colour, markersize=4, alpha=0.5)
    if built["dial"]:
        x, y = ([100 * row[key]["mean"] for row in built["dial"].values()] for key in ("saved", "accuracy"))
        axes.plot(x, y, "x--", color="#5aa0e0", linewidth=1.2, label="ZEDA, stage 1, the dial")
    teacher = built["labels"]["teacher"]["accuracy"]["mean"]
    axes.axhline(100 * teacher, color="#444444", linestyle=":", linewidth=1.2, label="teacher")
    axes.set_xlabel("expert slots of response tokens that are not computed, %")


def pareto(built: Mapping[str, Any]) -> bytes:
    """Accuracy against the share of expert slots saved: dots are seeds, lines go through their means."""
    figure, (whole, close) = new_figure(11.0, 5.4, panels=2)
    for axes in (whole, close):
        draw_families(axes, built)
    whole.set_ylabel("accuracy on held-out questions, %")
    close.set_xlim(20, 62)
    close.set_ylim(84, 96)
    figure.suptitle("The quickstart's model: accuracy against skip rate (right: the upper part)")
    handles, names = whole.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return png(figure)


def estimators(found: Mapping[str, Sequence[Sequence[Sequence[float]]]]) -> bytes:
    """KL to the teacher against the tokens that the student sampled, one line per seed."""
    figure, axes = new_figure(6.4, 4.2)
    for (name, seeds), colour in zip(found.items(), ("#1f5fa8", "#2c8c4a", "#d9731a"), strict=False):
        for number, points in enumerate(seeds):
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=colour, linewidth=1.4, label=None if number else name)
    axes.set_xlabel("response tokens sampled by the student")
    axes.set_ylabel("KL to the teacher, held out, nats per token")
    axes.set_title("Stage 2 by estimator of the reverse KL")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return png(figure)


def new_figure(width: float, height: float, panels: int = 1) -> tuple[Any, Any]:
    """A figure on no screen, and its axes, one or an array of those beside each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(1, panels)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="#dddddd", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def png(figure: Any) -> bytes:
    """The file's bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
