"""The command ``debias``: train from YAML, run the demo, and list what is there.

Nothing heavier than the standard library is imported until a command needs it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from debias import __version__
from debias.cli.audit import add_audit_options
from debias.cli.compare_options import add_compare_options, add_rule
from debias.cli.suggest import nearest
from debias.extras import needs_extra

__all__ = ["main"]

TRAINING = {
    "fit": "train a model, validating as it goes",
    "validate": "evaluate a checkpoint on the validation set",
    "test": "evaluate a checkpoint on the test set",
    "predict": "run a checkpoint on the prediction set",
    "retrain": "refit the last layer of a checkpoint on held-out samples",
}
EXAMPLES = {
    "": ("debias demo", "debias methods", "debias compare colored_digits --methods group_dro vrex --seeds 0 1 2"),
    "demo": ("debias demo", "debias demo --seeds 0 --epochs 5"),
    "gallery": ("debias gallery --images a.jpg b.jpg --out gallery.png",),
    "shift-selection": ("debias shift-selection --epochs 2",),
    "compare": (
        "debias compare colored_digits --methods group_dro vrex --seeds 0 1 2",
        "debias compare colored_digits --methods group_dro --vary GroupDRO.step_size=0.001,0.01,0.1",
        "debias compare ./my_recipe --draws 8 --jobs 4 --project my-debiasing",
    ),
    "report": (
        "debias report debias_compare/colored_digits",
        "debias report runs/here runs/from_the_cluster --select val_average --out results",
    ),
    "audit": (
        "debias audit --predictions predictions.csv --out audit",
        "debias audit --config recipes/colored_digits/base.yaml --ckpt_path best.ckpt --out audit",
    ),
    "methods": ("debias methods",),
    "recipes": ("debias recipes", "debias recipes copy colored_digits ."),
}
# Names of `debias.compare.selection.RULES`, which would import more than the parser may.
RULES = (
    "val_average",
    "val_worst_group",
    "val_worst_class",
    "val_worst_inferred",
    "leave_one_domain_out",
    "val_shift",
    "oracle",
    "last",
)


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Says defaults, where there are any, and leaves examples as they are."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


def example(stage: str) -> str:
    """How a command that trains or evaluates is called."""
    configs = "--config recipes/colored_digits/base.yaml --config recipes/methods/group_dro.yaml"
    more = {"fit": "--trainer.max_epochs 5", "retrain": "--ckpt_path best.ckpt --retrain.method dfr"}
    return f"debias {stage} {configs} {more.get(stage, '--ckpt_path best.ckpt')}"


def main(args: Sequence[str] | None = None) -> None:
    """Run one command; the entry point of ``debias`` and ``python -m debias``.

    Args:
        args: the words after ``debias``; those of the command line by default.
    """
    words = list(sys.argv[1:] if args is None else args)
    if args is None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # configs name modules of the user's own; `python -m debias` finds them, too
    if words and words[0] in TRAINING:
        from debias.cli.errors import readable_errors

        with readable_errors(), needs_extra("cli"):
            from debias.cli.retrain import retrain
            from debias.cli.training import train
        if words[0] == "retrain":
            retrain(words[1:])
        else:
            train(words[0], words[1:])
        return
    parser = make_parser()
    if words and not words[0].startswith("-") and words[0] not in parser.get_default("commands"):
        parser.error(f"unknown command `{words[0]}`{nearest(words[0], parser.get_default('commands'))}")
    options = parser.parse_args(words, argparse.Namespace(words=words[1:]))
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader, `head` say, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def make_parser() -> argparse.ArgumentParser:
    """Build the parser of everything but training, whose options come from the classes that a config names."""
    parser = argparse.ArgumentParser(
        prog="debias", description="Debiasing methods as PyTorch Lightning callbacks.", formatter_class=_Help
    )
    parser.add_argument("--version", action="version", version=f"debias {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="command")

    for name, summary in TRAINING.items():  # listed here, handled by `train`
        commands.add_parser(name, help=summary)

    demo = commands.add_parser(
        "demo", help="compare ERM with GroupDRO on coloured digits; about a minute, without a GPU or a network"
    )
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run per method and seed")
    demo.add_argument("--epochs", type=int, default=None, help="epochs of a run; by default those it was tuned for")
    demo.add_argument("--out", type=Path, default=Path("debias_demo"), help="folder of the table and the figure")
    demo.set_defaults(run=_demo)

    gallery = commands.add_parser("gallery", help="one picture of every crafted shift and style augmentation")
    gallery.add_argument(
        "--images", type=Path, nargs="+", default=[], help="image files; by default those of scikit-learn"
    )
    gallery.add_argument("--out", type=Path, default=Path("gallery.png"), help="the PNG file")
    gallery.add_argument("--size", type=int, default=160, help="side of the images in pixels")
    gallery.add_argument("--draws", type=int, default=2, help="columns for each image")
    gallery.add_argument("--seed", type=int, default=0, help="seed of the random draws")
    gallery.set_defaults(run=_gallery)

    selection = commands.add_parser(
        "shift-selection", help="test whether crafted shifts choose better than plain validation: 24 settings on digits"
    )
    selection.add_argument("--source", choices=("digits", "mnist"), default="digits", help="the training data")
    selection.add_argument("--mnist", default=None, help="an mnist.npz, for a real shift of writers and scanner")
    selection.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds; scores are means over them")
    selection.add_argument("--epochs", type=int, default=None, help="epochs of a run")
    selection.add_argument("--out", type=Path, default=Path("shift_selection"), help="folder of the tables and figure")
    selection.set_defaults(run=_selection)

    compare = commands.add_parser(
        "compare", help="train every method with every seed on a recipe; a table, figures, a page", allow_abbrev=False
    )  # a sweep's command repeats the words
    add_compare_options(compare, RULES)
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="make tables, figures and a page of finished runs of `debias compare`")
    report.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders that hold runs, at any depth")
    add_rule(report, RULES)
    report.add_argument("--out", type=Path, default=None, help="folder of the results; by default the first DIR")
    report.add_argument("--project", default=None, help="W&B project to log the results to")
    report.add_argument("--entity", default=None, help="user or team of the W&B project")
    report.add_argument("--group", default=None, help="W&B group; by default that of the runs")
    report.set_defaults(run=_report)

    audit = commands.add_parser(
        "audit", help="say whether a model uses a shortcut, which one, whom it hurts, and what to do"
    )
    add_audit_options(audit)
    audit.set_defaults(run=_audit)

    methods = commands.add_parser(
        "methods", help="list methods and monitors: what each does, what it needs, its recipe and its reference"
    )
    methods.set_defaults(run=_methods)

    recipes = commands.add_parser("recipes", help="list the recipes, or copy one to edit it")
    recipes.set_defaults(run=_recipes)
    actions = recipes.add_subparsers(metavar="action")
    copy = actions.add_parser("copy", help="copy a recipe and the method files: debias recipes copy colored_digits .")
    copy.add_argument("recipe", help="a name that `debias recipes` lists")
    copy.add_argument("folder", type=Path, nargs="?", default=Path(), help="where recipes/<recipe> is made")
    copy.set_defaults(run=_copy)

    for name, command in {"": parser, **commands.choices}.items():
        command.formatter_class = _Help
        if name not in TRAINING:
            command.epilog = "\n  ".join(("examples:", *EXAMPLES[name]))
    parser.set_defaults(commands=tuple(commands.choices))
    return parser


def _demo(options: argparse.Namespace) -> None:
    from debias.cli.errors import check_writable, readable_errors

    with readable_errors():
        check_writable(options.out)
        with needs_extra("recipes"):
            from debias.cli.demo import run

        run(seeds=options.seeds, out=options.out, max_epochs=options.epochs)


def _gallery(options: argparse.Namespace) -> None:
    from debias.cli.errors import check_writable, readable_errors

    with readable_errors():
        check_writable(options.out.parent)
        with needs_extra("recipes"):
            from debias.cli.gallery import run

        run(options.out, options.images, size=options.size, draws=options.draws, seed=options.seed)


def _selection(options: argparse.Namespace) -> None:
    from debias.cli.errors import check_writable, readable_errors

    with readable_errors():
        check_writable(options.out)
        with needs_extra("recipes"):
            from debias.cli.shift_selection import run

        run(options.out, source=options.source, mnist=options.mnist, seeds=options.seeds, epochs=options.epochs)


def _compare(options: argparse.Namespace) -> None:
    from debias.cli.errors import readable_errors

    with readable_errors():
        with needs_extra("compare"):
            from debias.cli.compare import compare

        compare(options)


def _report(options: argparse.Namespace) -> None:
    from debias.cli.errors import readable_errors

    with readable_errors():
        with needs_extra("compare"):
            from debias.compare.report import report

        where = {"project": options.project, "entity": options.entity, "group": options.group}
        report(options.folders, options.select, options.out, **where)


def _audit(options: argparse.Namespace) -> None:
    from debias.cli.errors import readable_errors

    with readable_errors():
        from debias.cli.audit import audit

        audit(options)


def _methods(_: argparse.Namespace) -> None:
    from debias.cli.listing import print_methods

    print_methods()


def _recipes(_: argparse.Namespace) -> None:
    from debias.cli.recipes import print_recipes

    print_recipes()


def _copy(options: argparse.Namespace) -> None:
    from debias.cli.errors import readable_errors
    from debias.cli.recipes import copy_recipe

    with readable_errors():
        copy_recipe(options.recipe, options.folder)
