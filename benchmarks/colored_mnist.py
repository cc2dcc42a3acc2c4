"""Colored MNIST as published, with several restarts: accuracy at test, colour flipped at 0.9 and grey.

    python benchmarks/colored_mnist.py --root mnist.npz --restarts 5

Runs ``recipes/colored_mnist`` for every method, restart by restart, and appends each result to a CSV as soon as it is
there; what the CSV holds is not run again. ``--table`` only prints the table of what is there.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
# Accuracy in percent at test, in grey and in training, mean and standard deviation over 10 restarts: Rame et al., ICML
# 2022, Table 2, and the README of its code.
PUBLISHED = {
    "erm": ((14.0, 0.7), (71.0, 0.7), (86.4, 0.2)),
    "irm": ((65.6, 1.8), (66.1, 0.2), (71.0, 0.5)),
    "vrex": ((67.2, 1.5), (68.6, 2.2), (71.7, 1.5)),
    "fishr": ((69.5, 1.0), (70.2, 1.1), (71.0, 0.9)),
}
PUBLISHED_RESTARTS = 10
METHODS = ["erm", "irm", "vrex", "fishr", "hgp", "diagonal"]
FIELDS = ["method", "seed", "steps", "test", "grey", "train", "seconds", "torch", "debias"]


def run(method: str, seed: int, root: str, steps: int) -> dict[str, object]:
    """One restart through the recipe."""
    from debias import __version__
    from debias.cli.training import DebiasCLI

    folder = "methods" if method == "erm" else "colored_mnist"
    words = ["--config", f"{RECIPES}/colored_mnist/base.yaml", "--config", f"{RECIPES}/{folder}/{method}.yaml"]
    words += ["--data.root", root, "--seed_everything", str(seed), "--trainer.max_steps", str(steps)]
    words += ["--trainer.logger", "false", "--trainer.accelerator", "auto"]
    words += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    cli = DebiasCLI("fit", words)
    start = time.perf_counter()
    cli.trainer.callbacks = [c for c in cli.trainer.callbacks if type(c).__name__ != "ModelCheckpoint"]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    seconds = time.perf_counter() - start
    cli.datamodule.setup("fit")
    accuracy = {
        name: 100 * _accuracy(cli.model, data)
        for name, data in (
            ("test", cli.datamodule.test_set), ("grey", cli.datamodule.grey_set), ("train", cli.datamodule.train_set)
        )
    }  # fmt: skip
    return {
        "method": method, "seed": seed, "steps": steps, **{k: round(v, 3) for k, v in accuracy.items()},
        "seconds": round(seconds, 1), "torch": torch.__version__, "debias": __version__,
    }  # fmt: skip


@torch.no_grad()
def _accuracy(model: torch.nn.Module, data: torch.utils.data.Dataset) -> float:
    batches = torch.utils.data.DataLoader(data, batch_size=5000, collate_fn=_collate)
    right = [(model(x).squeeze(-1) > 0).eq(y.squeeze(-1) > 0.5) for x, y in batches]
    return float(torch.cat(right).double().mean())


def _collate(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    pairs = [s.sample for s in samples]
    return torch.stack([x for x, _ in pairs]), torch.stack([torch.as_tensor(y) for _, y in pairs])


def read(path: Path) -> list[dict[str, str]]:
    """Rows of the CSV."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def table(rows: list[dict[str, str]], steps: int) -> Table:
    """Mean and standard deviation over restarts beside the published ones.

    *Difference* is that of the means at test, with twice its standard error.
    """
    out = Table(title=f"Colored MNIST, {steps} full-batch steps; accuracy in %, mean ± std over restarts")
    columns = ["method", "restarts", "test (flip 0.9)", "published", "difference", "grey", "published", "train"]
    for name in [*columns, "published"]:
        out.add_column(name, justify="left" if name == "method" else "right")
    for method in METHODS:
        mine = [r for r in rows if r["method"] == method and int(r["steps"]) == steps]
        if not mine:
            continue
        cells, difference = [], ""
        for i, key in enumerate(("test", "grey", "train")):
            values = [float(r[key]) for r in mine]
            mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None
            published = PUBLISHED.get(method, (None,) * 3)[i]
            cells += [_spread(mean, std), _spread(*published) if published else ""]
            if key == "test" and published and std is not None:
                error = math.sqrt(published[1] ** 2 / PUBLISHED_RESTARTS + std**2 / len(values))
                difference = f"{mean - published[0]:+.1f} ± {2 * error:.1f}"
        out.add_row(method, str(len(mine)), *cells[:2], difference, *cells[2:])
    return out


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--root", help="an mnist.npz, or torchvision's folder")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--steps", type=int, default=501)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=HERE / "colored_mnist.csv")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table and args.root is None:
        parser.error("expected --root FILE_OR_FOLDER with MNIST")
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*(number of training batches|you have a `val_dataloader`).*")
    for seed in [] if args.table else range(args.restarts):
        for method in args.methods:
            done = {(r["method"], int(r["seed"]), int(r["steps"])) for r in read(args.out)}
            if (method, seed, args.steps) in done:
                continue
            row = run(method, seed, args.root, args.steps)
            new = not args.out.exists()
            with args.out.open("a", newline="") as file:
                writer = csv.DictWriter(file, FIELDS)
                if new:
                    writer.writeheader()
                writer.writerow(row)
            print(row, flush=True)
    Console(width=None if sys.stdout.isatty() else 130).print(table(read(args.out), args.steps))


if __name__ == "__main__":
    main()
