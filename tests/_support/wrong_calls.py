"""Wrong calls of everything public: each name x each argument x values that its annotation does not admit.

A right call of each name comes from the names of its arguments, so a new public name joins by being public; where an
argument of a new name is not known here, the test says so.
"""

from __future__ import annotations

import collections.abc
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics.classification import BinaryAccuracy

import debias
import debias.audit.model
import debias.audit.run
import debias.data
import debias.functional
import debias.metrics

N, C, D, G = 6, 3, 4, 3  # samples, classes, features, groups


def _data() -> TensorDataset:
    return TensorDataset(torch.zeros(N, D), torch.zeros(N, dtype=torch.long))


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C))


def _loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.randn(4 * N, D), IDS.repeat(4)), batch_size=N)


def _predictions() -> pd.DataFrame:
    return pd.DataFrame({"target": [0, 1] * 20, "prediction": [0, 1, 1, 1] * 10, "place": ["a", "b"] * 20})


IDS = torch.tensor([0, 1, 2, 0, 1, 2])
# A right value for an argument of this name, made anew for each call.
RIGHT: dict[str, Callable[[], Any]] = {
    "activation": lambda: nn.ReLU,
    "adjustment": lambda: 0.5,
    "after": _predictions,
    "alpha": lambda: 0.5,
    "batch_size": lambda: 3,
    "box": lambda: (0, 2, 0, 2),
    "boxes": lambda: [torch.tensor([[0.0, 0.0, 2.0, 2.0]])],
    "before": _predictions,
    "biased": lambda: torch.rand(N),
    "by_group": lambda: torch.rand(G),
    "class_counts": lambda: torch.tensor([3, 2, 1]),
    "cosines": lambda: torch.rand(N, C),
    "collate_fn": lambda: default_collate,
    "data": _data,
    "dataset": _data,
    "domain": lambda: "place",
    "domains": lambda: IDS.clone(),
    "early": lambda: torch.randn(N, C),
    "epochs": lambda: 2,
    "family": lambda: "blur",
    "features": lambda: torch.randn(N, D),
    "final": lambda: torch.randn(N, C),
    "folder": lambda: "nowhere",
    "fourth": lambda: torch.tensor(2.0),
    "fractions": lambda: torch.full((G,), 1 / G),
    "gamma": lambda: 4.0,
    "frame": _predictions,
    "generator": torch.Generator,
    "group": lambda: "place",
    "group_counts": lambda: torch.tensor([3, 2, 1]),
    "group_losses": lambda: torch.rand(G),
    "groups": lambda: IDS.clone(),
    "identities": lambda: IDS.clone(),
    "identity": lambda: "person",
    "images": lambda: torch.rand(N, 3, 8, 8),
    "keys": lambda: torch.arange(N),
    "labels": lambda: IDS.clone(),
    "layers": lambda: "backbone.1",
    "loader": _loader,
    "loaders": _loader,
    "log_weights": lambda: torch.zeros(G),
    "logits": lambda: torch.randn(N, C),
    "losses": lambda: torch.rand(G),
    "main": lambda: torch.rand(N),
    "margins": lambda: torch.rand(C),
    "metric": BinaryAccuracy,
    "model": _network,
    "module": _network,
    "n": lambda: torch.tensor(float(N)),
    "n_classes": lambda: C,
    "n_domains": lambda: G,
    "n_groups": lambda: G,
    "n_identities": lambda: G,
    "n_labels": lambda: C,
    "out_features": lambda: C,
    "outputs": lambda: torch.randn(N, C),
    "partners": lambda: torch.arange(N - 1, -1, -1),
    "path": lambda: "table.npz",
    "present": lambda: torch.ones(G, dtype=torch.bool),
    "preds": lambda: torch.randn(N, C),
    "probabilities": lambda: torch.rand(N),
    "progress": lambda: 0.5,
    "scatter": lambda: torch.eye(D),
    "shares": lambda: torch.full((N,), 0.5),
    "step_size": lambda: 0.1,
    "strength": lambda: 1.0,
    "target": lambda: IDS.clone(),
    "targets": lambda: IDS.clone(),
    "train_counts": lambda: torch.tensor([3, 2, 1]),
    "upweight": lambda: 4.0,
    "values": lambda: torch.rand(N),
    "wrong": lambda: torch.tensor([0, 1, 0, 1, 0, 0]),
    "x": lambda: torch.randn(N, 3, 8, 8),
    "reference": lambda: "erm.ckpt",
    "root": lambda: "nowhere",
    "in_features": lambda: D,
}
# Right calls where a name means something else.
SPECIAL: dict[str, dict[str, Callable[[], Any]]] = {
    "AdvStyleLayer": {"num_channels": lambda: 3},
    "AttributeProbe": {"attribute": lambda: "place", "n_values": lambda: 2, "features": lambda: "backbone"},
    "BoxStability": {"layers": lambda: ["backbone.1"]},
    "DomainFolder": {"test_domain": lambda: "a"},
    "GroupDROLoss": {"adjustment": lambda: 0.5, "group_counts": lambda: [3, 2, 1]},
    "GroupMixup": {"domain": lambda: "place"},
    "LastLayerRetraining": {"method": lambda: "balanced"},
    "LossCall": {},
    "MultilabelF1Monitor": {"label_names": lambda: ["a", "b"]},
    "VOCFolder": {"class_names": lambda: ["a"]},
    "adversarial_style": {"noise": lambda: torch.randn(2, N, 3), "spreads": lambda: torch.rand(2, 3)},
    "before_training": {"epochs": lambda: 0, "progress": lambda: False},
    "canny_edges": {
        "grey": lambda: torch.rand(N, 8, 8), "sigma": lambda: torch.ones(N), "low": lambda: torch.full((N,), 0.5),
        "high": lambda: torch.ones(N), "threshold": lambda: lambda values: values.flatten(1).mean(1),
    },
    "detection_accuracy": {"predicted": lambda: torch.rand(2, 4), "true": lambda: torch.rand(2, 4)},
    "fishr_penalty": {"variances": lambda: torch.rand(G, D)},
    "held_out_mean": {"accuracy": lambda: {"blur": 0.5}},
    "otsu_threshold": {"values": lambda: torch.rand(N, 8)},
    "probe_attribute": {
        "features": lambda: torch.randn(12, 2), "attributes": lambda: torch.arange(12) % 2, "n_values": lambda: 2,
    },
    "retrain_last_layer": {
        "method": lambda: "balanced", "loader": lambda: [(torch.randn(N, D), IDS.clone(), torch.randn(N, D))],
    },
    "sample_keys": {"indices": lambda: torch.arange(N), "name": lambda: "blur"},
    "select_setting": {"scores": lambda: {"a": 0.5}},
    "selective_pairs": {"same_label": lambda: True},
    "two_fold_score": {"runs": lambda: [(["a"], {"a": 0.5, "b": 0.5}), (["b"], {"a": 0.5, "b": 0.5})]},
    "uncertain_style": {"noise": lambda: torch.randn(2, N, 3)},
    "useful_groups": {"losses": lambda: torch.rand(N)},
    "vrex_penalty": {"losses": lambda: torch.rand(N)},
}  # fmt: skip
# What is public and called by the engine, or takes anything by its nature.
LEFT_OUT = {
    "LastLayerFit": "made by `retrain_last_layer`",
    "LossCall": "made by the engine alone",
    "Report": "made by the audit",
    "TaggedDataset": "made by `tag`, which checks",
    "TaggedIterableDataset": "made by `tag`, which checks",
    "tag": "tags are called as the user likes; tests/data/test_tagging.py has its wrong calls",
    "detection_losses": "wraps a model of torchvision",
    "register_loss": "registers any function",
}
POOL: dict[str, Any] = {
    "None": None, "word": "nonsense", "whole": 7, "negative": -1, "fraction": 1.5, "nan": math.nan, "inf": math.inf,
    "huge": 10**30, "true": True, "list": [], "dict": {}, "object": object(), "class": dict, "complex": 1j,
    "words": ["nonsense"], "tensor": torch.zeros(2, 5, 1, 1, 1),
}  # fmt: skip


def public() -> dict[str, Any]:
    """Everything public that is called, by module and name."""
    found: dict[str, Any] = {}
    # The room `debias.audit` is called through its door; what it takes besides its own arguments are the settings.
    behind = {"audit": debias.audit.model.audit}
    found["Settings"] = debias.audit.run.Settings
    for module in (debias, debias.functional, debias.metrics, debias.data, debias.audit):
        for name in module.__all__:
            value = behind.get(name, getattr(module, name))
            # Mixins are inherited, and hold the same modules.
            if callable(value) and not name.endswith("Mixin") and name not in LEFT_OUT:
                found.setdefault(name, value)
    return found


def parameters(value: Any) -> dict[str, inspect.Parameter]:
    named = inspect.signature(value).parameters.items()
    return {name: p for name, p in named if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def options(annotation: Any) -> set[Any]:
    """The parts of a union, flattened; of generics the class."""
    origin = typing.get_origin(annotation)
    if isinstance(annotation, typing.TypeAliasType if hasattr(typing, "TypeAliasType") else ()):
        return options(annotation.__value__)
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(options, typing.get_args(annotation)))
    return {origin or annotation}


def wrong(annotation: Any) -> dict[str, Any]:
    """Values that this annotation does not admit."""
    kinds = options(annotation)
    if typing.Any in kinds:
        return {}
    admitted = set()
    for kind in kinds:
        if kind is types.NoneType or kind is None:
            admitted.add("None")
        elif kind is str:
            admitted.add("word")
        elif kind is bool:
            admitted.add("true")
        elif kind is int:
            admitted.add("whole")
        elif kind is float:
            admitted |= {"whole", "fraction", "huge"}
        elif kind in (collections.abc.Callable, type):
            admitted.add("class")
        elif kind in (list, tuple, collections.abc.Sequence):
            if str in {o for part in typing.get_args(annotation) for o in options(part)} or "str" in str(annotation):
                admitted.add("words")
        elif kind in (dict, collections.abc.Mapping):
            admitted.add("dict")
    return {name: value for name, value in POOL.items() if name not in admitted}


def hints(value: Any) -> dict[str, Any]:
    target = value.__init__ if inspect.isclass(value) else value
    try:
        module = importlib.import_module(target.__module__)
        return typing.get_type_hints(target, vars(module) | {"Tensor": torch.Tensor})
    except NameError:
        return {}


def right(name: str, value: Any, special: dict[str, dict[str, Callable[[], Any]]]) -> dict[str, Any]:
    """A right call."""
    own = special.get(name, {})
    unknown = [p for p, q in parameters(value).items() if q.default is q.empty and p not in own and p not in RIGHT]
    assert not unknown, f"{name} needs {unknown}: add them to RIGHT in tests/_support/wrong_calls.py"
    return {
        p: own.get(p, RIGHT.get(p))()  # type: ignore[misc]
        for p, q in parameters(value).items()
        if q.default is q.empty or p in own
    }


def calls(name: str, value: Any, special: dict[str, dict[str, Callable[[], Any]]]) -> Iterator[tuple[str, str, Any]]:
    """Argument, kind of wrong value, and the value."""
    known = hints(value)
    for argument in parameters(value):
        for kind, bad in wrong(known.get(argument, typing.Any)).items():
            yield argument, kind, bad
