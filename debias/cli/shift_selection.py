"""``debias shift-selection``: does the accuracy under crafted shifts choose better than plain validation accuracy?

A grid of settings (network, learning rate, weight decay, with and without crafted shifts as augmentation) is trained on
handwritten digits. Each setting has two scores, neither of which sees the target: accuracy on the validation set, and
accuracy on crafted shifts of it that the run was not trained on. How well do they rank the settings by their accuracy
on real shifts: digits of other people, and of MNIST?

The protocol of arXiv 2409.19774: without augmentation one run gives everything. With it, one run on each fold of the
families gives the score (each family by the run that did not train on it), and a third run on all families is the one
whose accuracy on the real shift, and on plain validation, is looked at.
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scipy.stats import rankdata

from debias import CraftedShifts, ShiftedValidation
from debias.cli.demo import COLORS, _quiet, _Tick
from debias.data import DigitsShift
from debias.errors import DebiasError
from debias.models.classifier import Classifier
from debias.ops.shifts import FAMILIES, FOLDS, select_setting, two_fold_score

__all__ = ["Setting", "Trained", "bootstrap", "rank_correlation", "run", "train"]

EPOCHS = 20
SCORES = {"plain": "plain validation", "shift": "crafted shifts"}
RESAMPLES = 10_000


@dataclass(frozen=True)
class Setting:
    """One point of the grid.

    Attributes:
        backbone: ``"mlp"`` or ``"cnn"`` of :class:`debias.models.classifier.Classifier`.
        lr: Adam's learning rate.
        weight_decay: decoupled weight decay.
        augmented: whether crafted shifts are in the training.
    """

    backbone: str
    lr: float
    weight_decay: float
    augmented: bool


# Fixed before any accuracy on a real shift was looked at.
GRID = [
    Setting(*point) for point in itertools.product(("mlp", "cnn"), (1e-3, 3e-3, 1e-2), (0.0, 0.3), (False, True))
]  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """One run.

    Attributes:
        setting: its point of the grid.
        seed: seed of initialisation, split and order.
        fold: families it was trained on: ``"none"``, ``"first"``, ``"second"`` or ``"all"``.
        plain: accuracy on the validation set.
        shifted: accuracy on the validation set under each family.
        real: accuracy on each real shift.
        seconds: wall-clock time.
    """

    setting: Setting
    seed: int
    fold: str
    plain: float
    shifted: dict[str, float]
    real: dict[str, float]
    seconds: float


def run(
    out: Path,
    *,
    source: str = "digits",
    mnist: str | None = None,
    seeds: Sequence[int] = (0,),
    epochs: int | None = None,
    grid: Sequence[Setting] = tuple(GRID),
) -> None:
    """Train the grid; print the table, write ``runs.csv``, ``correlations.csv`` and ``scatter.png``.

    Args:
        out: folder of the results, made if it is not there.
        source: what is trained on, ``"digits"`` or ``"mnist"``; see :class:`debias.data.DigitsShift`.
        mnist: path of an ``mnist.npz``; without it the only real shift is that of other writers.
        seeds: scores are means over seeds.
        epochs: epochs of a run; :data:`EPOCHS` by default.
        grid: the settings.

    Raises:
        DebiasError: no seed, no epoch, or fewer than three settings, of which no correlation can be told.
    """
    seeds, epochs = list(dict.fromkeys(seeds)), EPOCHS if epochs is None else epochs
    if not seeds or min(seeds) < 0 or epochs < 1 or len(grid) < 3:
        raise DebiasError(
            f"Expected seeds >= 0, at least one epoch and at least 3 settings, but got seeds {seeds}, {epochs} epochs"
            f" and {len(grid)} settings."
        )
    data = functools.partial(_data, source, mnist)
    data(0)  # a wrong path is an error now
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    jobs = [
        (setting, fold, seed)
        for seed in seeds
        for setting in grid
        for fold in (("first", "second", "all") if setting.augmented else ("none",))
    ]
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), "epochs", TimeElapsedColumn())
    runs = []
    with _quiet(), Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(jobs) * epochs)
        for setting, fold, seed in jobs:
            progress.update(task, description=f"{setting.backbone}, lr {setting.lr:g}, shifts {fold}, seed {seed}")
            runs.append(train(setting, fold, seed, data(seed), epochs, callbacks=[_Tick(progress, task)]))
    _write(out / "runs.csv", [_row(r) for r in runs])
    points = collect(runs)
    results = [result for real in points[0]["real"] for result in compare(points, real)]
    _write(out / "correlations.csv", results)
    console.print(make_table(points))
    console.print(make_summary(results))
    for line in conclusions(results):
        console.print(line, highlight=False)
    draw(points, results).savefig(out / "scatter.png", dpi=150)
    for name in ("runs.csv", "correlations.csv", "scatter.png"):
        console.print(str(out / name), highlight=False, soft_wrap=True)


def train(
    setting: Setting, fold: str, seed: int, data: DigitsShift, epochs: int, callbacks: Sequence[Callback] = ()
) -> Trained:
    """Train once, with :class:`ShiftedValidation` at the end, and test on the real shifts.

    Args:
        setting: the point of the grid.
        fold: families to train on, ``"none"`` for plain training.
        seed: seed of initialisation and order.
        data: what to train on; its test sets are the real shifts.
        epochs: epochs to train; the last one counts, nothing is chosen within a run.
        callbacks: further callbacks of the Trainer.
    """
    start = time.perf_counter()
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    with isolate_rng(), tempfile.TemporaryDirectory() as folder:
        L.seed_everything(seed, verbose=False)
        adam = functools.partial(torch.optim.AdamW, lr=setting.lr, weight_decay=setting.weight_decay)
        width = 64 if setting.backbone == "mlp" else 24
        model = Classifier(
            setting.backbone, 10, in_channels=1, image_size=data.image_size, width=width, optimizer=adam
        )  # fmt: skip
        shifts = [] if fold == "none" else [CraftedShifts(families=fold, seed=seed)]
        trainer = L.Trainer(
            max_epochs=epochs,
            check_val_every_n_epoch=epochs,
            callbacks=[*shifts, ShiftedValidation(), *callbacks],
            default_root_dir=folder,
            **quiet,
        )
        trainer.fit(model, data)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return Trained(
        setting=setting,
        seed=seed,
        fold=fold,
        plain=metrics["val_shift/original"],
        shifted={family: metrics[f"val_shift/{family}"] for family in FAMILIES},
        real={name: _accuracy(model, part) for name, part in _real(data).items()},
        seconds=time.perf_counter() - start,
    )


def collect(runs: Sequence[Trained]) -> list[dict[str, Any]]:
    """Both scores and the real accuracies of each setting, means over its seeds."""
    points = []
    for setting in dict.fromkeys(r.setting for r in runs):
        here = [r for r in runs if r.setting == setting]
        final = [r for r in here if r.fold in ("none", "all")]
        scores = []
        for seed in dict.fromkeys(r.seed for r in here):
            # The run on all families has none that it was not trained on, and adds nothing.
            scores.append(two_fold_score([(FOLDS.get(r.fold, ()), r.shifted) for r in here if r.seed == seed]))
        points.append(
            {
                "setting": setting,
                "plain": float(np.mean([r.plain for r in final])),
                "shift": float(np.mean(scores)),
                "real": {name: float(np.mean([r.real[name] for r in final])) for name in final[0].real},
            }
        )
    return points


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis, tied values with their mean rank; NaN where one is constant."""
    ranks = [rankdata(values, axis=-1) for values in (x, y)]
    a, b = (r - r.mean(-1, keepdims=True) for r in ranks)
    norm = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), norm, out=np.full(norm.shape, np.nan), where=norm > 0)


def bootstrap(plain: np.ndarray, shift: np.ndarray, real: np.ndarray, seed: int = 0) -> dict[str, tuple[float, ...]]:
    """Rank correlations with ``real`` and their difference: value, and 95 % percentile interval over settings.

    Args:
        plain: one score of each setting, ``(S,)``.
        shift: the other.
        real: accuracy of each setting on the real shift.
        seed: seed of the resampling; settings are drawn with replacement, both scores together.
    """
    rows = np.random.RandomState(seed).randint(0, len(real), (RESAMPLES, len(real)))
    found: dict[str, tuple[float, ...]] = {}
    drawn = {}
    for name, score in (("plain", plain), ("shift", shift)):
        drawn[name] = rank_correlation(score[rows], real[rows])
        found[name] = (float(rank_correlation(score, real)), *_interval(drawn[name]))
    found["difference"] = (found["shift"][0] - found["plain"][0], *_interval(drawn["shift"] - drawn["plain"]))
    return found


def compare(points: Sequence[dict[str, Any]], real: str) -> list[dict[str, Any]]:
    """Correlations over all settings, and over those without and with augmentation."""
    results = []
    for which, augmented in (("all", None), ("plain training", False), ("crafted shifts in training", True)):
        here = [p for p in points if augmented is None or p["setting"].augmented is augmented]
        if len(here) < 3:
            continue
        plain, shift = (np.array([p[score] for p in here]) for score in ("plain", "shift"))
        found = bootstrap(plain, shift, np.array([p["real"][real] for p in here]))
        row: dict[str, Any] = {"real_shift": real, "settings": which, "number": len(here)}
        for name, (value, low, high) in found.items():
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        for score in SCORES:
            chosen = select_setting({i: p[score] for i, p in enumerate(here)})
            row[f"real_accuracy_chosen_by_{score}"] = here[chosen]["real"][real]
        row["best_real_accuracy"] = max(p["real"][real] for p in here)
        results.append(row)
    return results


def make_table(points: Sequence[dict[str, Any]]) -> Table:
    """A row for each setting."""
    names = list(points[0]["real"])
    table = Table(title="Accuracy of each setting, in %", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for header in ("network", "lr", "decay", "shifts", "plain\nvalidation", "crafted\nshifts", *names):
        table.add_column(header, justify="left" if header == "network" else "right")
    for p in points:
        s = p["setting"]
        values = [p["plain"], p["shift"], *(p["real"][name] for name in names)]
        cells = (s.backbone, f"{s.lr:g}", f"{s.weight_decay:g}", "yes" if s.augmented else "no")
        table.add_row(*cells, *(f"{100 * value:.1f}" for value in values))
    return table


def make_summary(results: Sequence[dict[str, Any]]) -> Table:
    """Rank correlations with their intervals, and the accuracy of what each score chooses."""
    table = Table(
        title="Spearman's rank correlation with the accuracy on the real shift [95 % bootstrap interval]",
        caption="Right: real accuracy, in %, of the setting that each score chooses, and of the best one.",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
    )
    for header in ("real shift", "settings", "plain", "shifts", "difference", "plain", "shifts", "best"):
        table.add_column(header)
    for r in results:
        cells = [f"{r[n]:+.2f} [{r[f'{n}_low']:+.2f}, {r[f'{n}_high']:+.2f}]" for n in ("plain", "shift", "difference")]
        chosen = [r["real_accuracy_chosen_by_plain"], r["real_accuracy_chosen_by_shift"], r["best_real_accuracy"]]
        table.add_row(
            r["real_shift"], f"{r['settings']} ({r['number']})", *cells, *(f"{100 * value:.1f}" for value in chosen)
        )
    return table


def conclusions(results: Sequence[dict[str, Any]]) -> list[str]:
    """What the intervals allow to say, in words."""
    lines = []
    for r in results:
        low, high = r["difference_low"], r["difference_high"]
        if low > 0:
            verdict = "the crafted shifts rank the settings better"
        elif high < 0:
            verdict = "plain validation ranks the settings better"
        else:
            verdict = "no difference between the two scores is resolved"
        where = f"{r['real_shift']}, {r['settings']} ({r['number']})"
        lines.append(f"{where}: {verdict} (difference {r['difference']:+.2f}, interval {low:+.2f} to {high:+.2f}).")
    return lines


def draw(points: Sequence[dict[str, Any]], results: Sequence[dict[str, Any]]) -> Figure:
    """Real accuracy against each score, a row for each real shift; a mark is a setting."""
    names = list(points[0]["real"])
    figure = Figure(figsize=(9, 3.8 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False, sharey="row")
    styles = {("mlp", False): "o", ("cnn", False): "s", ("mlp", True): "o", ("cnn", True): "s"}
    for row, name in zip(axes, names, strict=True):
        overall = next(r for r in results if r["real_shift"] == name and r["settings"] == "all")
        for axis, (score, title) in zip(row, SCORES.items(), strict=True):
            for (backbone, augmented), marker in styles.items():
                here = [p for p in points if (p["setting"].backbone, p["setting"].augmented) == (backbone, augmented)]
                axis.scatter(
                    [100 * p[score] for p in here],
                    [100 * p["real"][name] for p in here],
                    marker=marker,
                    s=45,
                    color=COLORS["GroupDRO"] if augmented else COLORS["ERM"],
                    edgecolor="black",
                    linewidth=0.6,
                    label=f"{backbone}, {'crafted shifts' if augmented else 'plain'}",
                )
            low, high = overall[f"{score}_low"], overall[f"{score}_high"]
            axis.set_title(f"rank correlation {overall[score]:+.2f} [{low:+.2f}, {high:+.2f}]", fontsize=10)
            axis.set_xlabel(f"{title}, accuracy in %")
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{name}, accuracy in %")
    axes[0, 0].legend(fontsize=8)
    return figure


def _data(source: str, mnist: str | None, seed: int) -> DigitsShift:
    data = DigitsShift(batch_size=64, seed=seed, source=source, mnist=mnist, train_size=1000)
    data.setup()
    return data


def _real(data: DigitsShift) -> dict[str, Any]:
    sets = {"other writers" if data.source == "digits" else "MNIST's test": data.test_set}
    if data.other_set is not None:
        sets["MNIST at 8 x 8" if data.source == "digits" else "scikit-learn's digits"] = data.other_set
    return sets


@torch.inference_mode()
def _accuracy(model: Classifier, part: Any) -> float:
    x, y = part.dataset.tensors
    model.eval()
    return float((model(x).argmax(1) == y).double().mean())


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _row(r: Trained) -> dict[str, Any]:
    real = {f"real/{name}": value for name, value in r.real.items()}
    shifted = {f"val_shift/{family}": value for family, value in r.shifted.items()}
    fixed = asdict(r.setting) | {"seed": r.seed, "trained_on": r.fold, "val": r.plain}
    return fixed | shifted | real | {"seconds": round(r.seconds, 2)}


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator=os.linesep)
        writer.writeheader()
        writer.writerows(rows)
