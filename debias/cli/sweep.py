"""A comparison as a sweep of W&B: the ranges that its recipe and methods declare, and the run of one trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from debias.cli.suggest import nearest
from debias.compare.grid import Recipe, RunSpec, expand
from debias.compare.search import Space, applies, callbacks, class_name
from debias.errors import DebiasError

__all__ = ["make_sweep", "read_trial", "sweep_spaces"]

KINDS = {"uniform": "uniform", "log_uniform": "log_uniform_values", "integers": "int_uniform"}
NOTHING = "none"  # no domain is held out


def sweep_spaces(
    recipe: Recipe, methods: Sequence[str], vary: Mapping[str, Sequence[Any]], *, ranges: bool
) -> dict[str, dict[str, Space]]:
    """What is searched, by method and hyperparameter.

    Args:
        recipe: whose ``search:`` sections declare the ranges, beside those of the methods.
        methods: names of method files.
        vary: further values by key, for the methods that have it.
        ranges: whether the declared ranges take part.
    """
    found = {}
    for method in methods:
        contents = recipe.configs(method)
        varied = {key: Space("choices", tuple(values)) for key, values in vary.items() if applies(contents, key)}
        found[method] = (recipe.spaces(method) if ranges else {}) | varied
    return found


def make_sweep(
    recipe: Recipe,
    spaces: Mapping[str, Mapping[str, Space]],
    seeds: Sequence[int],
    *,
    domains: int | None = None,
    rule: str | None = None,
    runs: int | None = None,
) -> dict[str, Any]:
    """The sweep, as ``wandb sweep`` reads it; without its project and command.

    It draws at random where a range takes part, else it is a grid. A hyperparameter of another method is drawn as well,
    as W&B knows no conditions, and has no effect.

    Args:
        recipe: what is trained.
        spaces: from :func:`sweep_spaces`.
        seeds: of the runs.
        domains: number of training domains to hold out one by one, or None.
        rule: that chooses checkpoints; by default one that fits what the recipe's own checkpoint monitors.
        runs: after how many the sweep ends; None for a sweep that goes on.
    """
    named = _named(spaces)
    searched = {name: _distribution(space) for of in named.values() for name, space in of.items()}
    drawn = any(space.kind != "choices" for of in spaces.values() for space in of.values())
    held_out = {} if domains is None else {"held_out": {"values": [NOTHING, *range(domains)]}}
    sweep: dict[str, Any] = {
        "name": f"debias compare {recipe.name}",
        "method": "random" if drawn or runs is not None else "grid",
        "parameters": {"method": {"values": [*spaces]}, "seed": {"values": [*seeds]}, **held_out, **searched},
    }
    if (metric := _metric(recipe, rule)) is not None:
        sweep["metric"] = metric
    return sweep if runs is None else sweep | {"run_cap": runs}


def read_trial(
    words: Mapping[str, Any], spaces: Mapping[str, Mapping[str, Space]], seeds: Sequence[int], domains: int | None
) -> RunSpec:
    """The run that an agent of such a sweep is to make.

    Args:
        words: values by name, as the agent writes them.
        spaces: from :func:`sweep_spaces`, of the same command.
        seeds: of the runs.
        domains: number of training domains to hold out one by one, or None.

    Raises:
        DebiasError: a name or a value is none of the sweep.
    """
    named = _named(spaces)
    known: dict[str, list[Any]] = {"method": [*spaces], "seed": [*seeds], "held_out": [NOTHING, *range(domains or 0)]}
    method, seed, held_out = (_choice(name, words.get(name, values[0]), values) for name, values in known.items())
    for name in words:
        if name not in known and not any(name in of for of in named.values()):
            every = [*known, *(name for of in named.values() for name in of)]
            raise DebiasError(
                f"Expected `trial` to set parameters of the sweep, but got `{name}`{nearest(name, every)}"
            )
    params = {}
    for (name, space), key in zip(named[method].items(), spaces[method], strict=True):
        if name in words:
            params[key] = _choice(name, words[name], space.values) if space.kind == "choices" else words[name]
    runs = expand({method: [params]}, [seed], domains)
    return next(run for run in runs if run.held_out == (None if held_out == NOTHING else held_out))


def _named(spaces: Mapping[str, Mapping[str, Space]]) -> dict[str, dict[str, Space]]:
    """Ranges by the names of parameters, which begin with the method where two declare different ranges of a key."""
    every = [item for of in spaces.values() for item in of.items()]
    return {
        method: {
            f"{method}:{key}" if any(key == other and space != theirs for other, theirs in every) else key: space
            for key, space in of.items()
        }
        for method, of in spaces.items()
    }


def _distribution(space: Space) -> dict[str, Any]:
    if space.kind == "choices":
        return {"values": [*space.values]}
    low, high = space.values
    return {"distribution": KINDS[space.kind], "min": low, "max": high}


def _metric(recipe: Recipe, rule: str | None) -> dict[str, str] | None:
    """What a Bayesian search would follow: the score of the checkpoint that the rule chooses."""
    files = recipe.configs("erm")
    for entries, i in callbacks(files):
        arguments = entries[i].get("init_args") or {} if isinstance(entries[i], dict) else {}
        if class_name(entries[i]) == "ModelCheckpoint" and "monitor" in arguments:
            monitor = arguments["monitor"]
            rule = rule or ("val_worst_group" if "worst" in monitor else "val_average")
            goal = "minimize" if arguments.get("mode", "min") == "min" else "maximize"
            return {"name": f"{rule}/{monitor}", "goal": goal}
    return None


def _choice(name: str, given: Any, values: Sequence[Any]) -> Any:
    """The value that an agent has written as text."""
    for value in values:
        if given == value or str(given) == str(value):
            return value
    raise DebiasError(f"Expected `trial` to set `{name}` to one of {[*values]}, but got {given!r}.")
