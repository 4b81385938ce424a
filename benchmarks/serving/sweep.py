"""Concurrency sweep against a running server (vLLM or SGLang), and the curve of two models' sweeps.

    python benchmarks/serving/sweep.py run --label static --url http://127.0.0.1:8000 --tokenizer FOLDER \\
        --prompts prompts.jsonl --folder sweep
    python benchmarks/serving/sweep.py draw --static static --ours zeda --folder sweep

Requests are sent and timed by ``vllm bench serve``, which talks to any server with OpenAI's completions endpoint; it
comes with vLLM. engine.md beside this file says how to start the servers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PREFILL = "prefill"
_FIGURES = {
    "request_throughput": True,
    "output_throughput": True,
    "total_token_throughput": True,
    "mean_ttft_ms": False,
    "mean_tpot_ms": False,
}
"""Figures of ``vllm bench serve`` that are compared, and whether more is better."""


def write_prompts(source: Path, target: Path) -> int:
    """Write this project's prompt file as vLLM's custom dataset; of messages, the last one. Returns the number."""
    prompts = []
    for text in source.read_text(encoding="utf-8").splitlines():
        if text.strip():
            prompt = json.loads(text)["prompt"]
            prompts.append(prompt if isinstance(prompt, str) else prompt[-1]["content"])
    if not prompts:
        raise SystemExit(f"error: {source}: no prompts")
    target.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts), encoding="utf-8")
    return len(prompts)


def command(args: argparse.Namespace, dataset: Path, concurrency: int, output_tokens: int, file: str) -> list[str]:
    """The ``vllm bench serve`` of one point."""
    words = [args.client, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions"]
    words += ["--base-url", args.url, "--tokenizer", str(args.tokenizer), "--label", args.label]
    words += ["--model", args.model or str(args.tokenizer), "--dataset-name", "custom", "--dataset-path", str(dataset)]
    words += ["--custom-output-len", str(output_tokens), "--ignore-eos", "--temperature", "0", "--seed", "0"]
    words += ["--max-concurrency", str(concurrency), "--num-warmups", str(concurrency)]
    words += ["--num-prompts", str(max(args.least_prompts, args.prompts_per_client * concurrency))]
    words += ["--save-result", "--result-dir", str(args.folder), "--result-filename", file]
    return words + (["--skip-chat-template"] if args.skip_chat_template else [])


def run(args: argparse.Namespace) -> None:
    """Measure one server: every concurrency, and prompts alone (one token each) at the largest."""
    args.folder.mkdir(parents=True, exist_ok=True)
    dataset = args.folder / "prompts.jsonl"
    count = write_prompts(args.prompts, dataset)
    points = [(str(clients), clients, args.output_tokens) for clients in args.concurrency]
    points.append((PREFILL, max(args.concurrency), 1))
    wanted = max(args.least_prompts, args.prompts_per_client * max(args.concurrency))
    if wanted > count:
        print(f"note: {count} prompts for {wanted} requests: some are sent twice; serve without a prefix cache")
    for name, clients, output_tokens in points:
        file = f"{args.label}_{name}.json"
        (args.folder / file).unlink(missing_ok=True)
        subprocess.run(command(args, dataset, clients, output_tokens, file), check=True)
        done = json.loads((args.folder / file).read_text())
        if done["completed"] != done["num_prompts"]:
            raise SystemExit(f"error: {file}: {done['completed']} of {done['num_prompts']} requests were answered")


def read(folder: Path, label: str) -> dict[str, dict[str, Any]]:
    """The results of one server by point."""
    found = {path.stem.removeprefix(f"{label}_"): path for path in folder.glob(f"{label}_*.json")}
    points = {name: json.loads(path.read_text()) for name, path in found.items() if name == PREFILL or name.isdigit()}
    if not points:
        raise SystemExit(f"error: no {label}_*.json in {folder}")
    return points


def compare(static: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Figures of both, and how many times better ours is, at the points that both have."""
    rows = {}
    for name in sorted(set(static) & set(ours), key=lambda point: (not point.isdigit(), point.zfill(6))):
        row: dict[str, Any] = {}
        for figure, more_is_better in _FIGURES.items():
            before, after = static[name].get(figure), ours[name].get(figure)
            if before and after:
                gain = after / before if more_is_better else before / after
                row[figure] = {"static": before, "ours": after, "gain": gain}
        rows[name] = row
    return rows


def table(rows: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    names = {"output_throughput": "output tokens/s", "mean_ttft_ms": "first token, ms", "mean_tpot_ms": "per token, ms"}
    lines = ["| requests at once | " + " | ".join(names.values()) + " |", "|---" * (len(names) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for figure in names:
            found = row.get(figure)
            cells.append("" if not found else f"{found['static']:.1f}, {found['ours']:.1f} ({found['gain']:.2f} x)")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(args: argparse.Namespace) -> None:
    """Write ``sweep.json`` and ``sweep.png``, and print the table: static, ours, and how many times better ours is."""
    from matplotlib.figure import Figure

    rows = compare(read(args.folder, args.static), read(args.folder, args.ours))
    (args.folder / "sweep.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))
    figure = Figure(figsize=(6.4, 3.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    clients = [name for name in rows if name.isdigit()]
    for key, label in (("output_throughput", "output tokens per second"), ("mean_ttft_ms", "time to first token")):
        points = [(int(name), rows[name][key]["gain"]) for name in clients if key in rows[name]]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.axhline(1.0, color="#666666", linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("requests at once")
    axes.set_ylabel("times better than static")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(args.folder / "sweep.png")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    actions = parser.add_subparsers(required=True)
    measuring = actions.add_parser("run", help="measure one server")
    measuring.add_argument("--label", required=True, help="name of this server's results")
    measuring.add_argument("--url", default="http://127.0.0.1:8000")
    measuring.add_argument("--tokenizer", type=Path, required=True, help="folder of the served model")
    measuring.add_argument("--model", help="name under which it is served (default: that folder)")
    measuring.add_argument("--prompts", type=Path, required=True, help="jsonl, as for zeda rollout")
    measuring.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32, 64, 256])
    measuring.add_argument("--output-tokens", type=int, default=512, help="of every answer, whatever it says")
    measuring.add_argument("--prompts-per-client", type=int, default=4)
    measuring.add_argument("--least-prompts", type=int, default=16)
    measuring.add_argument("--skip-chat-template", action="store_true")
    measuring.add_argument("--client", default="vllm", help="the vllm command")
    measuring.add_argument("--folder", type=Path, default=Path("sweep"))
    measuring.set_defaults(action=run)
    drawing = actions.add_parser("draw", help="compare two sweeps")
    drawing.add_argument("--static", default="static", help="label of the static model's sweep")
    drawing.add_argument("--ours", default="zeda", help="label of the dynamic model's sweep")
    drawing.add_argument("--folder", type=Path, default=Path("sweep"))
    drawing.set_defaults(action=draw)
    args = parser.parse_args(argv)
    args.action(args)


if __name__ == "__main__":
    main()
