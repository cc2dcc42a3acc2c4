"""Options of ``debias compare``; the standard library alone, so that ``debias --help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["add_compare_options"]


def add_compare_options(parser: argparse.ArgumentParser, rules: Sequence[str]) -> None:
    """Add the options of ``debias compare`` to its parser; ``rules`` are the names of the selection rules."""
    add = parser.add_argument
    add("recipe", help="a recipe's name or folder: recipes/colored_digits")
    add("--methods", nargs="+", default=None, metavar="NAME", help="method files; by default all that the data serves")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one run per method, setting and seed")
    add("--select", choices=rules, default=None, help="the rule that chooses checkpoints and settings, for all alike")
    add("--out", type=Path, default=None, metavar="DIR", help="folder of runs and results: debias_compare/<recipe>")
    add("--config", type=Path, action="append", default=[], metavar="FILE", help="goes between the base and the method")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="for all runs: trainer.max_epochs=5")
    add(
        "--vary", nargs="+", action="extend", default=[], metavar="KEY=V1,V2",
        help="all combinations of these values: GroupDRO.step_size=0.01,0.1 model.init_args.width=64,128",
    )  # fmt: skip
    add("--draws", type=int, default=1, metavar="N", help="settings drawn from the recipe's `search:` sections")
    add("--draw-seed", type=int, default=0, metavar="N", help="another one gives other draws")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time; seconds per step then mean little")
    add("--project", default=None, metavar="NAME", help="log to this W&B project, too")
    add("--entity", default=None, metavar="NAME", help="user or team of the W&B project")
    add("--group", default=None, metavar="NAME", help="W&B group of the runs: by default the recipe and a short hash")
    add("--tensorboard", action="store_true", help="log to TensorBoard, too; a CSV there is always")
    add("--only", default=None, metavar="RUN", help="make this run of the grid and no other, here or on any machine")
    add(
        "--trial", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="make one run of the sweep and no other: method=group_dro seed=0 GroupDRO.step_size=0.1",
    )  # fmt: skip
    add("--launcher", choices=("local", "submitit"), default="local", help="submitit hands the grid to SLURM")
    add(
        "--launcher-args", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="parameters of submitit: timeout_min=60 slurm_partition=gpu gpus_per_node=1",
    )  # fmt: skip
    add("--print-wandb-sweep", action="store_true", help="print a W&B sweep of the `search:` ranges, or of --vary")
