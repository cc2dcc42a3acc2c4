"""Options of ``debias compare``; the standard library alone, so that ``debias --help`` is quick."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

__all__ = ["add_compare_options", "add_rule"]


def add_compare_options(parser: argparse.ArgumentParser, rules: Sequence[str]) -> None:
    """Add the options of ``debias compare`` to its parser; ``rules`` are the names of the selection rules."""
    add = parser.add_argument
    add("recipe", help="name or folder of a recipe: colored_digits, ./my_recipe")
    add("--methods", nargs="+", default=None, metavar="NAME", help="by default every method that the data can serve")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="one run per method, setting and seed")
    add_rule(parser, rules)
    add("--out", type=Path, default=None, metavar="DIR", help="folder of the runs; by default debias_compare/<recipe>")
    add(
        "--config", type=Path, action="append", default=[], metavar="FILE",
        help="YAML file that is read after the recipe's base file, and before the method's",
    )  # fmt: skip
    add(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="values of the config for all runs: trainer.max_epochs=5",
    )  # fmt: skip
    add(
        "--vary", nargs="+", action="extend", default=[], metavar="KEY=V1,V2",
        help="try all combinations of these values: GroupDRO.step_size=0.01,0.1 model.init_args.width=64,128",
    )  # fmt: skip
    add(
        "--draws",
        type=int,
        default=1,
        metavar="N",
        help="settings of each method; those after the first are drawn from `search:`",
    )
    add("--draw-seed", type=int, default=0, metavar="N", help="seed of these draws")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time, on several GPUs one on each")
    add("--project", default=None, metavar="NAME", help="log to this W&B project")
    add("--entity", default=None, metavar="NAME", help="user or team of the W&B project")
    add("--group", default=None, metavar="NAME", help="W&B group of the runs: by default the recipe and a short hash")
    add("--tensorboard", action="store_true", help="log to TensorBoard; a CSV is always written")
    add("--only", default=None, metavar="RUN", help="make only this run of the grid")
    add(
        "--trial", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="make only this run of a sweep: method=group_dro seed=0 GroupDRO.step_size=0.1",
    )  # fmt: skip
    add("--launcher", choices=("local", "submitit"), default="local", help="submitit: one SLURM job per run")
    add(
        "--launcher-args", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
        help="parameters for submitit: timeout_min=60 slurm_partition=gpu gpus_per_node=1",
    )  # fmt: skip
    add("--print-wandb-sweep", action="store_true", help="print a W&B sweep over the `search:` ranges, or over --vary")


def add_rule(parser: argparse.ArgumentParser, rules: Sequence[str]) -> None:
    """Add the rule of selection."""
    say = "the rule that chooses checkpoints and settings, the same for all methods: "
    default = " (default: val_worst_group, or val_average where validation knows no groups)"
    parser.add_argument("--select", choices=rules, default=None, metavar="RULE", help=say + ", ".join(rules) + default)
