"""``debias compare``: a grid of methods x settings x seeds on one recipe, and what came out of it."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from yaml import YAMLError, safe_dump

from debias.cli.recipes import METHODS, recipes, recipes_folder
from debias.cli.suggest import nearest
from debias.cli.sweep import make_sweep, read_trial, sweep_spaces
from debias.cli.training import config_words, offline_without_login, parse_config
from debias.compare.escape import plain
from debias.compare.grid import BASELINES, Recipe, RunSpec, expand, prepare, settings_of, spec_hash
from debias.compare.records import RECORD, default_group, read_record, read_spec
from debias.compare.report import report
from debias.compare.runner import Interrupted, run_all
from debias.compare.search import Space, read_config
from debias.errors import DebiasError
from debias.extras import needs_extra
from debias.ops.arguments import check_count

__all__ = ["compare", "find_recipe"]

LEFT_OUT = "leave_one_domain_out"


def compare(options: argparse.Namespace) -> None:
    """Run the command.

    Args:
        options: those of :func:`add_compare_options`, and ``words``, what was typed after ``debias compare``.

    Raises:
        DebiasError: an option is wrong, the recipe lacks what a method needs, or the folder is another comparison's;
            before anything is run or written.
        SystemExit: with status 1 if a run failed, 130 after Ctrl-C.
    """
    console = Console(stderr=options.print_wandb_sweep)
    if not options.seeds or not 0 <= min(options.seeds) <= max(options.seeds) < 2**32:
        raise DebiasError(f"Expected `seeds` to be one or more integers from 0 to 2**32 - 1, but got {options.seeds}.")
    check_count("jobs", options.jobs, 1, 1000)
    check_count("draws", options.draws, 1, 10_000)
    check_count("draw_seed", options.draw_seed, 0, 2**32 - 1)
    seeds = list(dict.fromkeys(options.seeds))
    fixed = {key: values[0] for key, values in _pairs("set", options.set).items()}
    recipe = find_recipe(options.recipe, tuple(options.config), fixed)
    methods = _methods(recipe, options.methods, console)
    vary = _pairs("vary", options.vary)
    settings = settings_of(recipe, methods, vary=vary, draws=options.draws, draw_seed=options.draw_seed)
    _check_settings(recipe, settings)
    domains = _n_domains(recipe) if options.select == LEFT_OUT else None
    spaces = sweep_spaces(recipe, methods, vary, ranges=not vary or options.draws > 1)
    if options.print_wandb_sweep:
        _print_sweep(options, recipe, spaces, seeds, domains)
        return
    runs = expand(settings, seeds, domains)
    if options.only is not None:
        runs = _only(runs, options.only)
    elif options.trial:
        words = {key: values[0] for key, values in _pairs("trial", options.trial).items()}
        runs = [read_trial(words, spaces, seeds, domains)]
    alone = options.only is not None or bool(options.trial)

    if not alone:
        # What an agent of W&B says is for one run; of several, all would become the same.
        for name in ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
            os.environ.pop(name, None)
    out = options.out or Path("debias_compare") / recipe.name
    folders = prepare(recipe, runs, out)
    checked = {folder: spec_hash(read_spec(folder)) for folder in folders}
    logging = _logging(options, recipe, out, console)
    if options.launcher == "submitit":
        _submit(checked, logging, _pairs("launcher-args", options.launcher_args), out, console)
        return
    there = sum((folder / RECORD).exists() and read_record(folder / RECORD).finished for folder in folders)
    if there:
        console.print(f"{there} of {len(folders)} runs have finished before.", highlight=False)
    doing = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(20), MofNCompleteColumn(), "runs", TimeElapsedColumn(), "left", TimeRemainingColumn(), doing)
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            records = run_all(folders, lambda f: _command(f, checked[f], logging), jobs=options.jobs, progress=progress)
    except Interrupted:
        done = sum((folder / RECORD).exists() and read_record(folder / RECORD).finished for folder in folders)
        console.print(f"Interrupted: {done} of {len(folders)} runs are done. The same command goes on from there.")
        raise SystemExit(130) from None
    if not alone:
        where = {"project": options.project, "entity": options.entity, "group": logging.get("group")}
        report([out], options.select, **where, console=console)
        _say_where_offline_runs_lie(out, console)
    if not all(record.finished for record in records):
        raise SystemExit(1)


def find_recipe(name: str, extra: tuple[Path, ...] = (), fixed: dict[str, Any] | None = None) -> Recipe:
    """Find a recipe by its folder, or by its name among those of the package.

    Args:
        name: of either.
        extra: further config files.
        fixed: hyperparameters set for all runs.

    Raises:
        DebiasError: there is no such recipe.
    """
    # A name means the user's own copy first, as `debias recipes copy` makes it.
    folder = next((path for path in (Path(name), Path("recipes", name)) if (path / "base.yaml").is_file()), Path(name))
    if not (folder / "base.yaml").is_file():
        known = recipes()
        found = known.get(folder.name) if name in (folder.name, f"recipes/{folder.name}") else None
        if found is None:
            raise DebiasError(
                f"Expected `recipe` to be a folder with a base.yaml or one of the package's recipes, but got `{name}`"
                f"{nearest(folder.name, known)}"
            )
        folder = found
    if not any(read_config(path).get("model") for path in (folder / "base.yaml", *extra)):
        raise DebiasError(
            f"Expected {folder / 'base.yaml'} to name a model, `model: {{class_path: ...}}`, but it has none. A recipe"
            " names its data, model and trainer."
        )
    shared = folder.resolve().parent / METHODS
    shared = shared if shared.is_dir() else recipes_folder() / METHODS
    return Recipe(folder.resolve().name, folder, shared, extra, fixed or {})


def _methods(recipe: Recipe, asked: Sequence[str] | None, console: Console) -> list[str]:
    """The baselines, and what was asked for; each must fit the recipe, or, if nobody asked for it, is left out."""
    known = recipe.methods()
    for name in asked or []:
        if name not in known:
            raise DebiasError(f"Expected `methods` to be method files, but got `{name}`{nearest(name, known)}")
    methods = []
    for name in dict.fromkeys([*BASELINES, *(asked or known)]):
        why = _refusal(recipe, name)
        if why is None:
            methods.append(name)
        elif name == BASELINES[0]:
            raise DebiasError(
                f"Expected the recipe `{recipe.name}`, with `--config` and `--set`, to be a configuration, but {why}"
                " Nothing was run."
            )
        elif asked and name in asked:
            raise DebiasError(
                f"Expected the recipe `{recipe.name}` to have what the method `{name}` needs, but {why} Nothing was"
                f" run. Leave `{name}` out, or choose another recipe."
            )
        else:
            console.print(f"Left out {plain(name)}: {plain(why)}", highlight=False, markup=False, soft_wrap=True)
    return methods


def _check_settings(recipe: Recipe, settings: dict[str, list[dict[str, Any]]]) -> None:
    """A key that the method's callback does not have is an error now, not after the first runs."""
    for method, own in settings.items():
        for params in {tuple(params): params for params in own if params}.values():
            why = _refusal(recipe, method, params)
            if why is not None:
                raise DebiasError(
                    f"Expected `--vary` and `search:` to set what `{method}` has, but {why} Nothing was run."
                )


def _refusal(recipe: Recipe, method: str, params: dict[str, Any] | None = None) -> str | None:
    """Parse the configuration as a run does; say why it cannot be."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            parse_config(config_words(recipe.configs(method, params)))
        except SystemExit:
            pass
        else:
            return None
    message = err.getvalue()
    missing = re.search(r"Expected the config to set `([\w.]+)`", message)
    if missing:
        return f"its base does not set `{missing[1]}`."
    lines = [line for line in message.splitlines() if line.startswith("error: ")]
    return lines[-1].removeprefix("error: ") if lines else message.strip()


def _pairs(option: str, words: Sequence[str]) -> dict[str, list[Any]]:
    """Read ``KEY=V1,V2``, values as in YAML."""
    pairs: dict[str, list[Any]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise DebiasError(f"Expected `--{option}` to be KEY=VALUE, but got `{word}`.")
        try:
            found = OmegaConf.to_container(OmegaConf.create(f"[{values}]"), resolve=False)
        except (OmegaConfBaseException, YAMLError, ValueError) as error:
            raise DebiasError(f"Expected `--{option}` to have YAML values, but got `{word}`.") from error
        assert isinstance(found, list)
        if option != "vary" and len(found) != 1:
            raise DebiasError(f"Expected `--{option}` to have one value, but got `{word}`. Write a list as [1,2].")
        if key in pairs:
            raise DebiasError(f"Expected `--{option}` to name each key once, but got `{key}` twice. Write `{key}=1,2`.")
        pairs[key] = found
    return pairs


def _n_domains(recipe: Recipe) -> int:
    data = [content.get("data") or {} for content in recipe.configs(BASELINES[0])]
    found = [(part.get("init_args") or {}).get("n_domains") for part in data]
    number = next((value for value in reversed(found) if value is not None), None)  # the last file wins
    if not isinstance(number, int) or number < 2:
        raise DebiasError(
            f"Expected the recipe `{recipe.name}` to set `data.init_args.n_domains` to 2 or more, to leave one domain"
            f" out after another, but got {number}. Choose another rule with `--select`."
        )
    return number


def _only(runs: Sequence[RunSpec], name: str) -> list[RunSpec]:
    found = [run for run in runs if run.id == name]
    if not found:
        raise DebiasError(
            f"Expected `only` to be a run of the grid, but got `{name}`. Its runs are {', '.join(r.id for r in runs)}."
        )
    return found


def _logging(options: argparse.Namespace, recipe: Recipe, out: Path, console: Console) -> dict[str, Any]:
    """How runs log: handed to each, no part of what is compared."""
    if options.tensorboard and not any(map(find_spec, ("tensorboard", "tensorboardX"))):
        raise DebiasError(
            "Expected the package `tensorboard` to be installed for `--tensorboard`, but it is not. Run"
            " `pip install tensorboard`."
        )
    loggers = ["tensorboard"] * options.tensorboard + ["wandb"] * (options.project is not None)
    if options.project is None:
        return {"loggers": loggers}
    group = options.group or default_group(recipe.name, recipe.hash)
    if offline_without_login():
        console.print(
            plain(f"Nobody is logged in to W&B, so its runs stay in {out}. Later: wandb login, then wandb sync with the"
            " folders that the end of this command names."),
            highlight=False, markup=False,
        )  # fmt: skip
    # The same run has the same id wherever and however often it is made, and another comparison's has another.
    unique = hashlib.sha256(f"{options.project}/{group}".encode()).hexdigest()[:8]
    return {
        "loggers": loggers, "project": options.project, "entity": options.entity, "group": group,
        "ids": f"{unique}-{{}}",
    }  # fmt: skip


def _command(folder: Path, checked: str, logging: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "debias.cli.one_run", str(folder), checked, json.dumps(logging)]


def _print_sweep(
    options: argparse.Namespace,
    recipe: Recipe,
    spaces: dict[str, dict[str, Space]],
    seeds: Sequence[int],
    domains: int | None,
) -> None:
    """Print the sweep; each agent calls this command for one trial."""
    if options.project is None:
        raise DebiasError(
            "Expected `--project` with `--print-wandb-sweep`, as the agents' runs log there, but got none. Add"
            " `--project NAME`."
        )
    again = [word for word in options.words if word != "--print-wandb-sweep"]
    runs = options.draws * len(spaces) * len(seeds) * (1 + (domains or 0)) if options.draws > 1 else None
    sweep = make_sweep(recipe, spaces, seeds, domains=domains, rule=options.select, runs=runs)
    command = ["${env}", "debias", "compare", *again, "--trial", "${args_no_hyphens}"]
    print(safe_dump(sweep | {"project": options.project, "command": command}, sort_keys=False), end="")


def _submit(
    checked: dict[Path, str], logging: dict[str, Any], parameters: dict[str, list[Any]], out: Path, console: Console
) -> None:
    """Hand the runs to submitit, which knows SLURM; a run that is finished ends at once."""
    import subprocess

    with needs_extra("cluster"):
        import submitit

    given = {"name": "debias"} | {key: values[0] for key, values in parameters.items()}
    if "cluster" not in given and shutil.which("sbatch") is None:  # submitit would start them all here, at once
        raise DebiasError(
            "Expected SLURM's `sbatch` for `--launcher submitit`, but it is not on the path. Run where SLURM's commands"
            " are, name another `cluster=` in `--launcher-args`, or leave the launcher out and use `--jobs`."
        )
    try:
        executor = submitit.AutoExecutor(folder=out / "submitit", cluster=given.pop("cluster", None))
        executor.update_parameters(**given)
        with executor.batch():
            jobs = [executor.submit(subprocess.call, _command(f.resolve(), h, logging)) for f, h in checked.items()]
    except Exception as error:  # of any kind: a wrong name is a NameError there
        raise DebiasError(
            f"Expected submitit to take the jobs with `--launcher-args` {parameters}, but it refused"
            f" ({type(error).__name__}): {error}. Correct them, or run where SLURM's commands are; `cluster=local` does"
            " without SLURM."
        ) from error
    console.print(f"{len(jobs)} jobs were submitted: {jobs[0].job_id} to {jobs[-1].job_id}. When they are done:")
    console.print(plain(shlex.join(["debias", "report", str(out)])), highlight=False, markup=False, soft_wrap=True)


def _say_where_offline_runs_lie(out: Path, console: Console) -> None:
    runs = [*out.glob("runs/*/wandb/offline-run-*"), *out.glob("wandb/offline-run-*")]
    if runs:
        console.print("W&B ran offline. Send its runs with:", highlight=False)
        place = shlex.quote(str(out))
        places = f"{place}/runs/*/wandb/offline-run-* {place}/wandb/offline-run-*"
        console.print(plain(f"wandb sync {places}"), highlight=False, markup=False, soft_wrap=True)
