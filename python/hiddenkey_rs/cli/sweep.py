"""``hiddenkey sweep``: run a plan's trials, as many processes at a time as asked for, until every one has its line."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, HiddenKeyError

if TYPE_CHECKING:
    from ..experiments.sweep.plan import Plan
    from ..experiments.sweep.runner import Sweep


class UnfinishedError(HiddenKeyError):
    """Trials failed, or the slice of time was over."""

    exit_code = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The plan, the folder, and how it is run."""
    parser.add_argument("plan", metavar="PLAN.yaml", help="what to run; experiments/ holds plans")
    parser.add_argument("--out", required=True, metavar="DIR", help="the results' folder; run again to go on with it")
    parser.add_argument("--data", metavar="DIR", help="folder that holds the task folders")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at a time (default: 1)")
    parser.add_argument("--threads", type=int, metavar="N", help="of a process (default: an equal share)")
    parser.add_argument("--only", metavar="ID", help="one trial: task/method/setting/seed/stage")
    parser.add_argument(
        "--retries", type=int, default=1, metavar="N", help="further tries of a failed trial (default: 1)"
    )
    parser.add_argument("--slice", type=float, metavar="MINUTES", help="start no trial after so many minutes")
    parser.add_argument("--dry-run", action="store_true", help="check the plan and list what is missing")
    parser.add_argument("--backend", choices=("local", "ray"), default="local", help="who runs trials (default: local)")


def main(options: argparse.Namespace) -> int:
    """Run, and say what came out and what is missing."""
    from ..experiments.sweep.reading import load_plan
    from ..experiments.sweep.runner import Sweep, equal_share, local_pool

    for name in ("jobs", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} must be at least 1 (got {value}); leave it out for the default")
    if options.retries < 0:
        raise ConfigError(f"--retries must be at least 0 (got {options.retries}); leave it out for one more try")
    plan = load_plan(options.plan, options.data)
    _warn_of_few_seeds(plan)
    threads = options.threads or (1 if options.backend == "ray" else equal_share(options.jobs))
    command = _command(options, threads)
    sweep = Sweep(plan, Path(options.plan).read_text(encoding="utf-8"), options.out, options.retries)
    if options.dry_run:
        waiting = sweep.waiting(options.only)
        for trial in waiting:
            print(trial.id)
        print(f"{len(waiting)} of {len(sweep.trials())} known trials to run")
        return 0
    if options.backend == "ray":
        from ..experiments.sweep.ray_pool import RayPool

        missing = sweep.run(
            lambda: RayPool(options.jobs, threads, plan.digest, command), options.only, _seconds(options)
        )
    else:
        missing = sweep.run(lambda: local_pool(plan, options.jobs, threads, command), options.only, _seconds(options))
    for (task, method), setting in sweep.winners().items():
        print(f"{task}: {method} with {dict(plan.methods[method].settings[setting]) or 'its only setting'}")
    trials = sweep.trials()
    lines = [line for trial in trials if (line := sweep.line_of(trial)) is not None]
    diverged = sum(line.diverged for line in lines)
    said = f", {diverged} diverged" if diverged else ""
    print(
        f"{sum(line.done for line in lines)} of {len(trials)} trials done{said}; hiddenkey report {options.out} shows them"
    )
    if options.only is not None:
        _check_only(sweep, options.only)
    elif missing:
        raise UnfinishedError(f"trials are missing (got {missing} without results); run the same command again")
    return 0


def _command(options: argparse.Namespace, threads: int) -> str:
    """The first words of what runs one of the trials again, ``--only ID`` behind them."""
    words = ["hiddenkey", "sweep", options.plan, "--out", options.out]
    words += ["--data", options.data] if options.data is not None else []
    return shlex.join([*words, "--threads", str(threads)])


def _warn_of_few_seeds(plan: Plan) -> None:
    """No refusal: a plan may be there to try things out, or to show intervals alone."""
    least = plan.least_p()
    if least is not None and least >= 0.05:
        what = f"no comparison of this plan can reach p < .05 (got {least:.2g} at best, after Holm's correction)"
        print(f"{what}; it takes more final seeds", file=sys.stderr)


def _check_only(sweep: Sweep, trial: str) -> None:
    line = next((sweep.line_of(known) for known in sweep.trials() if known.id == trial), None)
    if line is not None and line.diverged:
        print(f"{trial}: {line.error}, which is its result")
    elif line is None or not line.done:
        reason = "it was not started in time" if line is None else line.error
        raise UnfinishedError(f"the trial has no result (got {trial!r}: {reason}); run the same command again")


def _seconds(options: argparse.Namespace) -> float | None:
    return None if options.slice is None else 60 * options.slice
