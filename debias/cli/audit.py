"""``debias audit``: a table of predictions, or a checkpoint and its data, in; a page, JSON and CSV out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from debias.extras import needs_extra

__all__ = ["add_audit_options", "audit"]

TABLE = ("target", "prediction", "score", "scores", "task", "positive")
SETTINGS = ("columns", "bins", "min_count", "alpha", "slices", "seed")


def add_audit_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``debias audit`` to its parser; the standard library alone, so that it is quick."""
    add = parser.add_argument
    add(
        "--predictions",
        type=Path,
        default=None,
        metavar="CSV",
        help="table with a row for each sample: target, prediction, metadata",
    )
    add(
        "--compare",
        type=Path,
        nargs=2,
        default=None,
        metavar=("BEFORE", "AFTER"),
        help="two tables, or two checkpoints",
    )
    add(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="config of the checkpoint, as for `debias fit`",
    )
    add("--ckpt_path", type=Path, default=None, metavar="FILE", help="the checkpoint to audit")
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="values of the config: data.init_args.root=data",
    )
    add(
        "--metadata",
        type=Path,
        default=None,
        metavar="CSV",
        help="table with more columns: in the order of the samples, or joined by --id",
    )
    add("--train", type=Path, default=None, metavar="CSV", help="table of the training samples: target and metadata")
    add("--id", default=None, metavar="NAME", help="column with the name of each sample")
    add("--out", type=Path, default=Path("audit"), metavar="DIR", help="folder of the page, the JSON and the CSVs")
    add("--title", default=None, help="title of the page")
    add("--columns", nargs="+", default=None, metavar="NAME", help="metadata columns to look at; by default all")
    add(
        "--target", default="target", metavar="NAME", help="column of the true label; of many: the part before _<label>"
    )
    add(
        "--prediction",
        default="prediction",
        metavar="NAME",
        help="column of the prediction; of many: the part before _<label>",
    )
    add("--score", default="score", metavar="NAME", help="column of the score; of many: the part before _<class>")
    add("--scores", choices=("probabilities", "logits"), default=None, help="say which of the two the scores are")
    add(
        "--task",
        choices=("classification", "multilabel", "regression"),
        default=None,
        help="by default read from the columns",
    )
    add("--positive", default=None, metavar="NAME", help="the positive class; by default the last of two")
    add("--bins", type=int, default=4, help="number of quantile bins of a numeric column")
    add("--min-count", type=int, default=20, help="groups with fewer samples are shown, but not ranked")
    add("--alpha", type=float, default=0.05, help="false-discovery rate of each table")
    add("--slices", type=int, default=5, help="number of slices of each kind to look for; 0 for none")
    add("--layers", nargs="+", default=[], metavar="PATH", help="modules whose outputs are probed as well")
    add("--seed", type=int, default=0, help="seed of all random draws")


def audit(options: argparse.Namespace) -> None:
    """Run the command: make the report, write it, print the answer."""
    from debias.errors import DebiasError

    given = [name for name in ("predictions", "compare", "ckpt_path") if getattr(options, name)]
    if len(given) != 1:
        what = "none of them" if not given else " and ".join(f"--{name}" for name in given)
        raise DebiasError(
            f"Expected one of --predictions CSV, --ckpt_path FILE with --config, and --compare BEFORE AFTER, but"
            f" got {what}."
        )
    settings = {name: getattr(options, name) for name in SETTINGS}
    if options.ckpt_path:
        report = _of_checkpoint(options, options.ckpt_path, settings)
    elif options.compare and options.config:
        from debias.audit.paired import compared

        report = compared(*(_of_checkpoint(options, path, settings) for path in options.compare))
    else:
        report = _of_table(options, settings)
    from lightning.pytorch.utilities import rank_zero_only

    if getattr(rank_zero_only, "rank", 0):  # of several ranks, which all have the same report, one writes
        return
    paths = report.save(options.out)
    for sentence in report.findings:
        print(f"- {sentence}")
    for i, each in enumerate(report.advice, 1):
        print(f"{i}. {each.what} {each.why}")
    print(paths["audit.html"])


def _of_table(options: argparse.Namespace, settings: dict[str, Any]) -> Any:
    from debias.audit import audit_predictions, compare_predictions

    given = options.compare or [options.predictions]
    make = compare_predictions if options.compare else audit_predictions
    return make(
        *(read_csv(path, "--compare" if options.compare else "--predictions") for path in given),
        metadata=None if options.metadata is None else read_csv(options.metadata, "--metadata"),
        train=None if options.train is None else read_csv(options.train, "--train"),
        id=options.id,
        title=options.title or f"Audit of {given[-1].name}",
        **{name: getattr(options, name) for name in TABLE},
        **settings,
    )


def _of_checkpoint(options: argparse.Namespace, path: Path, settings: dict[str, Any]) -> Any:
    """Build model and data from a config, and audit the checkpoint on the test set."""
    from debias.errors import DebiasError

    with needs_extra("audit"):
        from debias.audit.model import audit as audit_model
    with needs_extra("cli"):
        from debias.cli.training import DebiasCLI

    if not options.config:
        raise DebiasError(
            "Expected `--config FILE` with a checkpoint, but got none. Pass the config that it was trained with."
        )
    if not path.exists():
        raise DebiasError(
            f"Expected a checkpoint at {path}, but there is none. `debias fit` prints the path of the best one at its"
            " end."
        )
    metadata = None if options.metadata is None else read_csv(options.metadata, "--metadata")
    if metadata is not None and options.id is not None:
        metadata = metadata.drop(columns=options.id)
    words = [word for file in options.config for word in ("--config", str(file))]
    cli = DebiasCLI("test", [*words, *(f"--{pair}" for pair in options.set), "--trainer.logger=false"])
    trainer: Any = cli.trainer
    # Monitors of the recipe have nothing to say here.
    trainer.callbacks[:] = [callback for callback in trainer.callbacks if not hasattr(callback, "engine")]
    return audit_model(
        cli.model, cli.datamodule, metadata=metadata, ckpt_path=str(path), trainer=trainer,
        title=options.title or f"Audit of {path}", positive=options.positive, layers=options.layers, task=options.task,
        scores=options.scores, **settings,
    )  # fmt: skip


def read_csv(path: Path, option: str) -> Any:
    """Read a table.

    Raises:
        DebiasError: it is not there, or is none.
    """
    from debias.errors import DebiasError

    with needs_extra("audit"):
        import pandas as pd

    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise DebiasError(f"Expected `{option}` to be a table in CSV, but reading {path} failed: {error}") from error
