"""``hiddenkey train``: flags are the fields of :class:`~hiddenkey_rs.experiments.run_config.RunConfig`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..experiments.run_config import RunConfig, field_kind
from ..serialise import yaml_loader


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag a field, ``--config`` and ``--resume``."""
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON file of these choices; flags win over it")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        choices=[True, "auto"],
        metavar="auto",
        help="go on with the stopped run in --out; 'auto': if there is one, else start it",
    )
    for item in fields(RunConfig):
        flag = f"--{item.name.replace('_', '-')}"
        kind, many, _ = field_kind(item.name)
        text = item.metadata["help"]
        if item.metadata["choices"]:
            text += f": {', '.join(item.metadata['choices'])}"
        if item.default not in (None, (), False):
            default: Any = item.default
            text += f" (default: {' '.join(default) if many else default})"
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        else:
            shape: dict[str, Any] = {"nargs": "+"} if many else {}
            parser.add_argument(flag, type=kind, metavar=item.name.upper(), **shape, **options)


def main(options: argparse.Namespace) -> int:
    """Train and print the table."""
    from ..experiments.job import job
    from ..experiments.report import table
    from ..experiments.run import run
    from ..train import ranks

    with job():
        with ranks.together():
            config = run_config(options)
        metrics = run(config, resume=options.resume)
    if ranks.launched()[0]:  # the first process speaks for all
        return 0
    print(f"{config.model} on {metrics['task']}, {metrics['preset']}, seed {metrics['seed']}: {config.out}")
    print(table(result_rows(metrics)))
    rates = ", ".join(f"{site} {rate:.4f}" for site, rate in metrics["realised_rates"].items())
    print(f"measured rates: {rates or 'nothing dropped'}")
    speed, seconds, memory = metrics["examples_per_second"], metrics["seconds"], metrics["peak_rss_mb"]
    print(f"{speed:.1f} examples/s, {seconds:.0f} s in all, {memory:.0f} MiB at most")
    return 0


def run_config(options: argparse.Namespace) -> RunConfig:
    """The run that flags and ``--config`` describe."""
    names = {item.name for item in fields(RunConfig)}
    given = {name: value for name, value in vars(options).items() if name in names}
    values: dict[str, Any] = {}
    if options.config is not None:
        values = _read(Path(options.config))
    return RunConfig.from_dict({**values, **given})


def result_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the closing table: the best epoch and the last, training and development side by side."""
    rows = []
    last = metrics["last"]
    for name, epoch, entry in (("best", metrics["best_epoch"], metrics), ("last", last["epoch"], last)):
        for part in ("train", "dev", "test"):
            if entry.get(part):
                rows.append({"adapter": name, "epoch": f"{epoch:g}", "rows": part, **entry[part]})
    return rows


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), yaml_loader()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"the run's config cannot be read (got {str(path)!r}: {text}); check the file") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"the run's config is no mapping of choices (got {type(values).__name__} in {str(path)!r}); mend it"
        )
    # A run's own config.json holds its choices under "run": it can be given back as it is.
    return values["run"] if isinstance(values.get("run"), dict) else values
