"""Every method that debias exports, and the doubles, built from their constructors' argument names."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import debias
from _support.doubles import DOUBLES
from _support.fits import N_GROUPS, N_PERSONS
from _support.flat import EdgeView
from debias import Debiaser
from debias.methods._two_stage import TwoStage

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

# Weights at which a method changes a short run of the tiny problem visibly and does not let it diverge.
TUNED: dict[str, dict[str, Any]] = {
    "HessianAlignment": {"alpha": 0.5, "beta": 0.5},
    "Fishr": {"penalty_weight": 5.0},
    "IRM": {"penalty_weight": 0.5},
    "VREx": {"penalty_weight": 1.0},
    "CVaRDRO": {"alpha": 0.3},
    "LDAM": {"check_logits": False, "scale": 3.0},
}


def _exported() -> dict[str, type[Debiaser]]:
    found = {}
    for name, module in debias._EXPORTS.items():
        if module.startswith("debias.methods."):
            value = getattr(importlib.import_module(module), name)
            # The suite's rows are no images, and its runs too short for two stages: methods that need these have the
            # same tests in files of their own.
            own = inspect.isclass(value) and issubclass(value, Debiaser) and not issubclass(value, TwoStage)
            if own and "images" not in value.needs:
                found[name] = value
    return found


METHODS: dict[str, type[Debiaser]] = _exported() | {"EdgeView": EdgeView} | {cls.__name__: cls for cls in DOUBLES}


def arguments(name: str) -> dict[str, Any]:
    """Constructor arguments of a method."""
    parameters = inspect.signature(METHODS[name]).parameters.values()
    filled = {p.name: FILLED[p.name] for p in parameters if p.name in FILLED}
    missing = [
        p.name
        for p in parameters
        if p.default is p.empty and p.name not in filled and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    assert not missing, f"{name} needs {missing}: add them to FILLED in tests/_support/cases.py"
    return filled | TUNED.get(name, {})


def build(name: str | None, **changed: Any) -> list[Debiaser]:
    """A fresh method as a list of callbacks; None gives the empty list, plain training."""
    return [] if name is None else [METHODS[name](**(arguments(name) | changed))]


def augments(name: str) -> bool:
    """Whether the method draws random numbers for its augmentation."""
    return METHODS[name].augment is not Debiaser.augment


def exact(name: str) -> bool:
    """Whether two ranks must equal one process: not where each rank draws its own augmentation."""
    return not augments(name) or METHODS[name] in DOUBLES


def has_groups(name: str) -> bool:
    """Whether the method computes something for each group or domain; an augmenter only asks who is alike."""
    return bool({"n_groups", "n_domains"} & set(arguments(name))) and not augments(name)
