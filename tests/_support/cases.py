"""Every registered method, and the doubles, built from their constructors' argument names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from _support.doubles import DOUBLES
from _support.fits import N_GROUPS, N_PERSONS
from _support.flat import EdgeView
from debias import Debiaser
from debias.cli.listing import methods
from debias.methods.base.two_stage import TwoStage

# What an argument of this name is filled with, whether or not it has a default.
FILLED = {
    "group": "place",
    "n_groups": N_GROUPS,
    "domain": "place",
    "n_domains": N_GROUPS,
    "identity": "person",
    "n_identities": N_PERSONS,
    "layers": "backbone.1",
    "n_classes": 2,
}

# Weights at which a method changes a short run of the tiny problem visibly and does not let it diverge; for a method
# whose first stage is plain training, what makes that end within the first epoch.
TUNED: dict[str, dict[str, Any]] = {
    "HessianAlignment": {"alpha": 0.5, "beta": 0.5},
    "Fishr": {"penalty_weight": 5.0},
    "IRM": {"penalty_weight": 0.5},
    "VREx": {"penalty_weight": 1.0},
    "CVaRDRO": {"alpha": 0.3},
    "LDAM": {"check_logits": False, "scale": 3.0},
}

# The suite's rows are no images, and its runs too short for two stages: methods that need these have the same tests in
# files of their own.
METHODS: dict[str, type[Debiaser]] = {
    name: cls
    for name, cls in methods().items()
    if issubclass(cls, Debiaser) and not issubclass(cls, TwoStage) and "images" not in cls.needs
}
METHODS |= {"EdgeView": EdgeView} | {cls.__name__: cls for cls in DOUBLES}


def takes(name: str) -> set[str]:
    """Names of a method's arguments."""
    return set(inspect.signature(METHODS[name]).parameters)


def arguments(name: str) -> dict[str, Any]:
    """Constructor arguments of a method."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    filled = {p.name: FILLED[p.name] for p in parameters if p.name in FILLED} | TUNED.get(name, {})
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name not in filled and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert not missing, f"{name} needs {missing}: add them to FILLED or TUNED in tests/_support/cases.py"
    return filled


def build(name: str | None, **changed: Any) -> list[Debiaser]:
    """A fresh method as a list of callbacks; None gives the empty list, plain training."""
    return [] if name is None else [METHODS[name](**(arguments(name) | changed))]


def names_where(condition: Callable[[Any], bool]) -> list[str]:
    """Names of the methods for which it holds; one that cannot be built stays, so that its own tests say why."""

    def holds(name: str) -> bool:
        try:
            (callback,) = build(name)
        except Exception:
            return True
        return condition(callback)

    return [name for name in METHODS if holds(name)]


def augments(name: str) -> bool:
    """Whether the method draws random numbers for its augmentation."""
    return METHODS[name].augment is not Debiaser.augment


def exact(name: str) -> bool:
    """Whether two ranks must equal one process: not where each rank draws its own augmentation."""
    return not augments(name) or METHODS[name] in DOUBLES


def has_groups(name: str) -> bool:
    """Whether the method computes something for each group or domain; an augmenter only asks who is alike."""
    return bool({"n_groups", "n_domains"} & takes(name)) and not augments(name)
