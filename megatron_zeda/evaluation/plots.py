"""The pictures of a report, as PNG bytes. Drawn with matplotlib's Agg canvas; no window, no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#666666"


def plot_skip_rate_per_layer(response: Sequence[float], prompt: Sequence[float] | None = None) -> bytes:
    """Draw the skip rate of every layer.

    Args:
        response: per layer, on response tokens.
        prompt: per layer, on prompt tokens.
    """
    figure, axes = _figure(width=max(6.4, min(16.0, 2.5 + 0.3 * len(response))), height=3.8)
    layers = range(len(response))
    mean = sum(response) / len(response)
    handles = [axes.bar(layers, [100 * rate for rate in response], width=0.7, color=_BLUE, label="response tokens")]
    if prompt:
        rates = [100 * rate for rate in prompt]
        handles += axes.plot(
            layers, rates, "D", markersize=6, color=_ORANGE, markeredgecolor="white", label="prompt tokens"
        )
    label = f"mean of responses, {100 * mean:.1f} %"
    handles.append(axes.axhline(100 * mean, color=_GREY, linestyle="--", linewidth=1.2, label=label))
    axes.set_xlabel("layer")
    axes.set_ylabel("skip rate, %")
    axes.set_title("Expert slots that went to zero experts, held-out data")
    axes.set_xlim(-0.6, len(response) - 0.4)
    axes.set_ylim(0, min(105.0, 1.12 * 100 * max([*response, *(prompt or [])], default=1.0) + 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    # Below the axes: wherever the bars end, nothing is covered.
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return _png(figure)


def plot_training(metrics: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw loss and skip rate over the steps, one above the other.

    Args:
        metrics: objects with ``step``, and ``loss`` and ``skip_rate`` where they were measured; at least two.
    """
    figure, (above, below) = _figure(width=6.4, height=5.4, rows=2)
    for axes, key, scale, label, colour in (
        (above, "loss", 1, "loss, nats per token", _BLUE),
        (below, "skip_rate", 100, "skip rate, %", _ORANGE),
    ):
        points = [(line["step"], scale * line[key]) for line in metrics if isinstance(line.get(key), (int, float))]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.4)
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.grid(color="#dddddd", linewidth=0.8)
        axes.set_axisbelow(True)
    above.set_title("Training")
    below.set_xlabel("step")
    return _png(figure)


def _figure(*, width: float, height: float, rows: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True)
    for each in figure.axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
