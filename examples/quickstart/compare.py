"""`make compare`: the methods, the sweeps and the study's questions on the quickstart's model, several seeds each.

    python examples/quickstart/compare.py                    # goes on where it was stopped; hours on two cores
    python examples/quickstart/compare.py --list             # the runs and which of them are done
    python examples/quickstart/compare.py --only 'zeda*'     # some of them (and those they start from)
    python examples/quickstart/compare.py --seeds 1          # fewer seeds
    python examples/quickstart/compare.py --report docs/study    # tables and pictures from what is done
    python examples/quickstart/compare.py --tune             # what the settings were chosen from, in runs/tune

Every run is one single-threaded process and leaves one file in `runs/compare/results`; a run that has its file is not
repeated. The folder of a run holds the commands that a user would type (`log.txt`), its metrics and its export.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import compare_report
from compare_job import execute
from compare_plan import QUICKSTART_HELD_OUT_FACTS, SEEDS, SIZES, Run, plan
from inputs import HERE, REPOSITORY, Command, teacher_rollouts, tool, write_prompts

TEACHER = HERE / "teacher"
Start = Callable[[Run], "subprocess.Popen[bytes]"]


def prepare(root: Path, skip_held_out: int) -> None:
    """Make what all runs share: prompts, the teacher's responses, its import."""
    done = root / "inputs.json"
    if done.is_file():
        return
    shutil.rmtree(root / "prompts", ignore_errors=True)
    write_prompts(root / "prompts", SIZES, skip_held_out=skip_held_out)
    (root / "rollouts").mkdir(exist_ok=True)
    commands = teacher_rollouts(TEACHER, root)  # `zeda rollout` goes on with a file that is not complete
    if not (root / "teacher-megatron").exists():
        commands.append(tool("hf_to_megatron", "--hf", TEACHER, "--megatron", root / "teacher-megatron"))
    for command in commands:
        show(command)
        subprocess.run([str(word) for word in command], cwd=REPOSITORY, env=environment(), check=True)
    done.write_text(json.dumps({"prompts": str(SIZES)}) + "\n")


def show(command: Command) -> None:
    """Print a command as a user would type it."""
    words = ["python" if word == sys.executable else str(word) for word in command]
    print(f"$ {shlex.join(words)}", flush=True)


def environment() -> dict[str, str]:
    """One thread: two runs beside each other are faster than one after another on two."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def result_of(root: Path, name: str) -> Path:
    """Where a run's numbers are; the file is there when it is done."""
    return root / "results" / f"{name}.json"


def selected(runs: list[Run], patterns: list[str]) -> list[Run]:
    """The runs whose label or name fits, and those they start from, in the order of the plan."""
    if not patterns:
        return runs
    wanted = {r.name for r in runs if any(fnmatch.fnmatch(n, p) for n in (r.name, r.label) for p in patterns)}
    wanted |= {run.needs for run in runs if run.name in wanted and run.needs}
    return [run for run in runs if run.name in wanted]


def work(runs: list[Run], is_done: Callable[[str], bool], start: Start, *, jobs: int, poll: float = 0.5) -> list[str]:
    """Run what is not done, `jobs` at a time, each after the one it starts from.

    Args:
        runs: in the order in which they are to be started, where they may.
        is_done: of a name.
        start: begins a run.
        jobs: processes at once.
        poll: seconds between looks at them.

    Returns:
        The names of those that failed, and of those that could not start because of them.
    """
    waiting = [run for run in runs if not is_done(run.name)]
    total, began = len(waiting), time.monotonic()
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            ready = [run for run in waiting if run.needs is None or is_done(run.needs)]
            for run in ready[: jobs - len(running)]:
                waiting.remove(run)
                running[run.name] = start(run)
            stuck = [run for run in waiting if run.needs in failed]
            if not running and not ready:
                stuck = list(waiting)
            failed += [run.name for run in stuck]
            waiting = [run for run in waiting if run not in stuck]
            time.sleep(poll)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    good = process.returncode == 0 and is_done(name)
                    failed += [] if good else [name]
                    left = len(waiting) + len(running)
                    minutes = (time.monotonic() - began) / 60
                    print(
                        f"{minutes:6.1f} min  {name}: {'done' if good else 'FAILED'}, {left} of {total} left",
                        flush=True,
                    )
    finally:
        for process in running.values():  # after Ctrl-C
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Compare the methods on the quickstart's model.")
    parser.add_argument("--run-dir", type=Path, help="(runs/compare, or runs/tune)")
    parser.add_argument("--tune", action="store_true", help="the runs that the settings were chosen from")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at once (%(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="(%(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="PATTERN", help="names or labels of runs")
    parser.add_argument("--list", action="store_true", help="print the runs and whether they are done")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="only write tables and pictures there")
    parser.add_argument("--job", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = (arguments.run_dir or REPOSITORY / "runs" / ("tune" if arguments.tune else "compare")).resolve()
    runs = plan(tuple(arguments.seeds), tune=arguments.tune)
    if arguments.job:
        by_name = {run.name: run for run in runs}
        execute(by_name[arguments.job], root, TEACHER, result_of(root, arguments.job))
        return 0
    runs = selected(runs, arguments.only)
    if arguments.list:
        for run in runs:
            print(f"{'done' if result_of(root, run.name).is_file() else '-':<5} {run.name}")
        return 0
    if arguments.report is None:
        (root / "results").mkdir(parents=True, exist_ok=True)
        (root / "runs").mkdir(exist_ok=True)
        prepare(root, 0 if arguments.tune else QUICKSTART_HELD_OUT_FACTS)

        def start(run: Run) -> subprocess.Popen[bytes]:
            words = [sys.executable, __file__, "--run-dir", root, "--seeds", str(run.seed), "--job", run.name]
            words += ["--tune"] if arguments.tune else []
            with (root / "runs" / f"{run.name}.txt").open("ab") as log:
                return subprocess.Popen(words, cwd=REPOSITORY, env=environment(), stdout=log, stderr=log)

        failed = work(runs, lambda name: result_of(root, name).is_file(), start, jobs=arguments.jobs)
        for name in failed:
            print(f"error: {name} failed: {root / 'runs' / f'{name}.txt'}", file=sys.stderr)
        if failed:
            return 1
    compare_report.write(root / "results", arguments.report or root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
