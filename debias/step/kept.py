"""What a step leaves in its modules beside their parameters, when it is run several times."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from debias.errors import UnsupportedStrategyError
from debias.ops import arguments

__all__ = ["Kept"]

_OF_ANY_MODULE = vars(nn.Module()).keys() - {"training"}
# The tables in which any module keeps its buffers and its hooks.
_TABLES = [k for k, x in vars(nn.Module()).items() if isinstance(x, dict) and k not in ("_parameters", "_modules")]


class Kept:
    """What modules keep when it is made: buffers, states of metrics, counters, lists, hooks, and which layers train.

    Objects of other classes that a module refers to are not looked into.

    Args:
        module: the user's module.
        reads: look at values of parameters beyond the CPU, too, which waits for the device.
    """

    def __init__(self, module: nn.Module, *, reads: bool) -> None:
        modules = [m for m in module.modules() if not isinstance(m, torch.jit.ScriptModule)]
        self._tables = [table for m in modules for table in _tables_of(m)]
        self._values = _copied(self._tables)
        self._parameters = {name: p for name, p in module.named_parameters() if type(p) is nn.Parameter}
        # As they are before the step, which may freeze others for a while; trained ones may be moved, as by an LSTM.
        self._frozen = {p for p in self._parameters.values() if not p.requires_grad}
        self._read = [p for p in self._parameters.values() if reads or arguments.on_host(p)]
        self._marks = self._marks_of_parameters()

    def _marks_of_parameters(self) -> list[tuple[float, ...]]:
        """By which it shows that parameters were changed in place, also through their ``data``."""
        real = (torch.view_as_real(p.detach()) if p.is_complex() else p.detach().float() for p in self._read)
        norms = [torch.linalg.vector_norm(p).float().to(self._read[0].device) for p in real]
        sizes = dict(zip(self._read, torch.stack(norms).nan_to_num(-1.0).tolist() if norms else [], strict=True))
        places = {p: p.data_ptr() for p in self._frozen} | sizes
        return [(p._version, places.get(p, 0)) for p in self._parameters.values()]

    def check_parameters(self, losses: str) -> None:
        """Refuse a step that has changed parameters, which it would change again on each part.

        Raises:
            UnsupportedStrategyError: naming one.
        """
        for name, before, after in zip(self._parameters, self._marks, self._marks_of_parameters(), strict=True):
            if before != after:
                raise UnsupportedStrategyError(
                    f"Expected the training step to leave parameters as they are with `losses={losses!r}`, which runs"
                    f" it several times, but it has changed `{name}`. Where that is an average of another network's,"
                    " update it in `on_train_batch_start` or `on_train_batch_end`."
                )

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """While this lasts, modules keep copies of what they kept then; afterwards what they keep now."""
        now = [dict(table) for table in self._tables]
        try:
            for table, values in zip(self._tables, _copied(self._values), strict=True):
                _fill(table, values)
            yield
        finally:
            for table, values in zip(self._tables, now, strict=True):
                _fill(table, values)


def _tables_of(module: nn.Module) -> list[dict[str, Any]]:
    """Where a module keeps things; one that its first call builds, which it tells by a hook, keeps its hooks."""
    names = ["_buffers"] if isinstance(module, LazyModuleMixin) else _TABLES
    return [vars(module), *(vars(module)[name] for name in names)]


def _fill(table: dict[str, Any], values: dict[str, Any]) -> None:
    table.clear()
    table.update(values)


def _copied(tables: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Copies of what a step may change; what modules share is shared by the copies."""
    made: dict[int, Any] = {}

    def copied(x: Any) -> Any:
        if id(x) not in made:
            made[id(x)] = x.clone() if isinstance(x, Tensor) else copy.copy(x)
            if isinstance(x, dict):
                made[id(x)].update({key: changeable(value) for key, value in x.items()})
        return made[id(x)]

    def changeable(x: Any) -> Any:
        plain = isinstance(x, dict | list | set | deque) and type(x).__module__ in ("builtins", "collections")
        return copied(x) if plain or (isinstance(x, Tensor) and not is_lazy(x)) else x

    return [{name: x if name in _OF_ANY_MODULE else changeable(x) for name, x in table.items()} for table in tables]
