"""Finding the classifier head and the features it reads, without being told. No Lightning here.

In the first step every ``F.linear`` is noted; the one whose output became the logits of the loss is the head. In the
second, a hook on that module has to deliver the same input; from then on it does so alone, so that nothing else is kept
alive. Where it cannot (two heads, a head that runs twice, a weight that is used without its module) the noting goes on.
Other features are the output of a module that is named.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import HeadNotFoundError
from debias.tap.calls import LossCall
from debias.tap.features import (
    Having,
    Run,
    check_features,
    deliver,
    moves_to_logits,
    of_loaders,
    own_weight,
    pooled,
    rows_of_features,
)
from debias.tap.hooks import Hook
from debias.tap.moves import CASTS, MOVES, REORDERING, among, kind_of
from debias.tap.notes import Note, Notes
from debias.tap.rows import RowTracker
from debias.tap.sharded import has_shards, whole

__all__ = ["FeatureTap", "HeadFinder", "HeadTap", "check_features", "rows_of_features", "submodule"]

# Operations between head and loss that leave every logit what it is.
_passes = among(CASTS | (MOVES - REORDERING))


class HeadFinder(Notes):
    """Notes linear layers (and 1x1 convolutions) of one step and matches their outputs with the logits of a loss.

    Args:
        root: the user's module, where its parameters are sharded: which layer a weight is of is then only known while
            the layer runs, as it holds another tensor before and after.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        super().__init__()
        self._root = root

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note one operation."""
        if func is F.linear or func is F.conv2d or func is torch.conv2d:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if isinstance(weight, Tensor) and (weight.ndim == 2 or weight.shape[2:] == (1, 1)):
                layer = None if self._root is None else _holder(self._root, weight)
                self._records.append(Note(out, 0, F.linear, (args[0] if args else kwargs["input"], weight, layer)))
        elif args and out is not args[0] and _keeps_logits(func, args, out):
            self._records.append(Note(out, 0, func, args, kwargs, kind_of(func)))

    def runs_of(self, weight: Tensor) -> int:
        """How often a layer of this weight ran with gradients."""
        return sum(note.out.requires_grad for note in self._with(weight))

    def layer_of(self, root: nn.Module, weight: Tensor) -> nn.Module | None:
        """The layer of a module that ran with a weight, sharded or not."""
        layers = [note.args[2] for note in self._with(weight) if note.args[2] is not None]
        return layers[0] if layers else _holder(root, weight)

    def match(self, logits: Tensor) -> Run | None:
        """The run of the linear layer whose output the logits are, with its weight and the moves between them."""
        out = logits
        while (note := self._note(out)).func is not F.linear:
            if len(note.sources) != 1:
                return None
            out = note.sources[0]
        moves = self.moves(logits, out)
        return None if moves is None else Run(note.args[0], out, weight=note.args[1], moves=moves)

    def _with(self, weight: Tensor) -> list[Note]:
        return [note for note in self._records if note.func is F.linear and note.args[1] is weight]


def _holder(root: nn.Module, weight: Tensor) -> nn.Module | None:
    """The layer that holds a weight: not by ``m.weight``, which some parametrizations compute anew, and change their
    state.
    """
    return next((m for m in root.modules() if own_weight(m) is weight), None)


def _keeps_logits(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Whether an operation keeps all of a tensor, or takes columns only, as ``logits[:, 0]`` does."""
    if func is not Tensor.__getitem__:
        whole = _passes(func) and isinstance(args[0], Tensor) and isinstance(out, Tensor)
        return whole and out.is_floating_point() and out.numel() == args[0].numel()
    index = args[1]
    parts = index if isinstance(index, tuple) else (index,)
    if out.shape == args[0].shape and all(isinstance(i, slice) or i is Ellipsis for i in parts):
        return all(i is Ellipsis or i.step in (None, 1) for i in parts)
    if not isinstance(index, tuple) or not index or not isinstance(index[0], slice):
        return False
    return index[0] == slice(None) and all(isinstance(i, int | None) for i in index[1:])


class _LayerTap:
    """Keeps what a layer is given, and what it makes of it, while a step runs."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._entered: list[Tensor | None] = []
        self._tracker: RowTracker | None = None
        self._armed = False
        self._handles: list[Any] = []

    def _hook(self, layer: nn.Module, around: Sequence[nn.Module] = ()) -> None:
        """Watch a layer from now on, and the modules that it lies in, the outermost first."""
        for module in around:
            self._handles.append(module.register_forward_pre_hook(Hook(self._enter), with_kwargs=True))
            self._handles.append(module.register_forward_hook(Hook(self._leave)))
        self._handles.append(layer.register_forward_pre_hook(Hook(self._begin), with_kwargs=True))
        self._handles.append(layer.register_forward_hook(Hook(self._end)))

    def _hook_named(self, root: nn.Module, path: str, *, argument: str) -> nn.Module:
        """Watch the layer at a dotted path.

        Raises:
            HeadNotFoundError: there is none.
        """
        layer = submodule(root, path, argument=argument)
        names = path.split(".")
        # Not in the root, whose forward pass under DDP is the step.
        self._hook(layer, [root.get_submodule(".".join(names[:end])) for end in range(1, len(names))])
        return layer

    def start(self, tracker: RowTracker | None = None) -> HeadFinder | None:
        """Begin a step: nothing of an earlier one may be used. Returns what is to note its operations."""
        self.forget()
        self._tracker, self._armed = tracker, True
        return None

    def stop(self) -> None:
        """End the user's step: penalties and monitors may run the network again."""
        self._armed = False

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        self._runs, self._entered, self._tracker = [], [], None

    def close(self) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()

    @property
    def runs(self) -> list[Run]:
        """All but those without gradients, of a teacher or to log an accuracy: a loss is not trained with them."""
        return [run for run in self._runs if run.recorded] or self._runs

    @property
    def several(self) -> bool:
        """Whether the layer ran several times in this step."""
        return len(self.runs) > 1

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._armed:
            self._entered.append(next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._armed and self._entered:
            self._entered.pop()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded = torch.is_grad_enabled()
        if self._armed and (recorded or len(self._runs) < 2):  # without gradients, enough to tell one from many
            given = whole(args[0] if args else next(iter(kwargs.values()), None))
            around = [x for x in (given, *reversed(self._entered)) if isinstance(x, Tensor)]
            self._runs.append(Run(given, around=around, recorded=recorded))

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._armed and self._runs and self._runs[-1].output is None:
            output = self._runs[-1].output = whole(output)
            if self._tracker is not None and isinstance(output, Tensor):
                self._tracker.follow(output)


class HeadTap(_LayerTap):
    """Delivers features and head of the selected loss: found in the first step, hooked from the second.

    Args:
        root: the user's module.
        path: dotted path of the head, or None to find it.
        compiled: something in the module is compiled. A hook added now would silently never run, so the noting goes on.
    """

    def __init__(self, root: nn.Module, path: str | None, *, compiled: bool = False) -> None:
        super().__init__()
        self.root = root
        self._named = path is not None
        self.head = None if path is None else self._hook_named(root, path, argument="head")
        self._noting = path is None
        self._finder: HeadFinder | None = None
        self._hookable = not compiled

    def start(self, tracker: RowTracker | None = None) -> HeadFinder | None:
        """Begin a step: nothing of an earlier one may be used. Returns what is to note its operations."""
        super().start(tracker)
        if self.head is not None and self._hookable and not self._handles:
            self._hook(self.head)
        if self._noting:
            self._finder = HeadFinder(self.root if has_shards(self.root) else None)
        return self._finder

    def forget(self) -> None:
        """Let go of every tensor of the step."""
        super().forget()
        self._finder = None

    @property
    def several(self) -> bool:
        """Whether the head that is named, or known by now, ran several times in this step."""
        return self._finder is None and super().several

    def resolve(self, call: LossCall, *, join: bool = False, having: Having = None, of_loss: Any = None) -> None:
        """Give a call its features and its head.

        Args:
            call: the loss.
            join: of several runs of a head that is named, take the rows of all; else the run that made the logits.
            having: of several loaders, the names of those whose samples have ids; rows of the others are left out.
            of_loss: of several loaders, those whose samples the loss is of.

        Raises:
            HeadNotFoundError: the logits are no linear layer's output, or the head did not run in this step, or several
                times and nothing tells which run is meant.
            RowsError: it has seen no sample of a loader whose samples have ids.
        """
        if self._finder is not None:
            self._resolve_noted(self._finder, call, join, having, of_loss)
            return
        runs = self.runs
        join = join and self._named and len(runs) > 0
        if join:
            runs = of_loaders(self._tracker, runs, having, "head")
        elif len(runs) > 1:
            runs = [run for run in runs if moves_to_logits(self._tracker, run, call) is not None] or runs
        if len(runs) != 1 and not (join and runs):
            raise HeadNotFoundError(
                f"Expected the head to run once in a step, but it ran {_times(runs)}. Name the layer that"
                " makes the logits of the loss, `head='dotted.path'`; where that runs on parts of the batch, let it"
                " run once on all, `head(torch.cat(parts))`, or use a penalty that needs losses only (VREx)."
            )
        call.head = self.head
        deliver(call, self._tracker, [(run, run.given) for run in runs])

    def _resolve_noted(
        self, finder: HeadFinder, call: LossCall, join: bool, having: Having, of_loss: set[int] | None
    ) -> None:
        """Give a call what was noted of the layer that made its logits; a hook has to give the same in the next one."""
        noted: Run | None = call.record.linear
        head = None if noted is None else finder.layer_of(self.root, noted.weight)
        if noted is None or head is None:
            way = "; or the module whose output is meant, `features='dotted.path'`, of maps with `pool='mean'`"
            raise HeadNotFoundError(
                f"Expected the logits of `{call.name}` to be the output of a linear layer of the module, but no layer"
                " was found (averaged heads, `logits / temperature`, cosine and tensor-parallel heads are not). Name"
                f" it: `head='dotted.path'`{way if join else ''}."
            )
        if join and having and not having.keys() <= (of_loss or set()):
            raise HeadNotFoundError(
                "Expected the features to be named where samples of other loaders than those of the loss have ids"
                f" ({', '.join(having.values())}): nothing tells else whether they are seen. Name the module that runs"
                " on all of them: `features='dotted.path'`."
            )
        if join and finder.runs_of(noted.weight) > 1:
            path = next(name for name, module in self.root.named_modules() if module is head)
            raise HeadNotFoundError(
                f"Expected the classifier head to run once in a step, but {path!r} ran several times. Name the module"
                " whose output is meant, of which all runs then count; one that is given the batch itself:"
                " `features='dotted.path'`."
            )
        call.head = head
        deliver(call, self._tracker, [(noted, noted.given)])
        if not self._hookable:
            return
        runs = self.runs
        agrees = len(runs) == 1 and runs[0].given is noted.given  # what the hook has seen with what was noted
        if self.head is None:
            self.head = head  # hooked from the next step on
        elif head is self.head and (agrees or not self._handles):
            self._noting = not self._handles
        else:
            self._hookable, self._noting = False, True
            self.close()


class FeatureTap(_LayerTap):
    """Delivers the output of a named module as the features of a loss.

    Args:
        root: the user's module.
        path: dotted path of the module whose output the features are.
        pool: how its tokens or maps become one row a sample; see :func:`debias.tap.features.pooled`.
    """

    def __init__(self, root: nn.Module, path: str, pool: str | None = None) -> None:
        super().__init__()
        self.path = path
        self.pool = pool
        self._hook_named(root, path, argument="features")

    def resolve(self, call: LossCall, *, join: bool = False, having: Having = None, of_loss: Any = None) -> None:
        """Give a call its features; the arguments are those of :meth:`HeadTap.resolve`.

        Raises:
            HeadNotFoundError: the module did not run in this step, or several times and these are not to be joined.
            RowsError: it has seen no sample of a loader whose samples have ids.
        """
        runs = self.runs
        if join and runs:
            runs = of_loaders(self._tracker, runs, having, f"features={self.path!r}")
        elif len(runs) != 1:
            raise HeadNotFoundError(
                f"Expected the module `features={self.path!r}` to run once in a step, but it ran"
                f" {_times(runs)}. Name one that runs once."
            )
        call.head = None
        deliver(call, self._tracker, [(run, pooled(run.output, self.pool)) for run in runs])


def _times(runs: list[Run]) -> str:
    return "several times" if runs else "0 times"


def submodule(root: nn.Module, path: str, *, argument: str) -> nn.Module:
    """The submodule at a dotted path.

    Raises:
        HeadNotFoundError: there is none; the error names what is near, and lists what is there.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        metrics = [f"{name}." for name, module in root.named_modules() if name and _is_metric(module)]
        names = [name for name, _ in root.named_modules() if name and not f"{name}.".startswith(tuple(metrics))]
        near = " or ".join(repr(name) for name in difflib.get_close_matches(path, names))
        raise HeadNotFoundError(
            f"Expected `{argument}` to be the dotted path of a submodule, but got"
            f" {path!r}.{f' Did you mean {near}?' if near else ''} There are: {', '.join(names[-20:])}."
        ) from None


def _is_metric(module: nn.Module) -> bool:
    return any(
        c.__name__ in ("Metric", "MetricCollection") and "torchmetrics" in c.__module__ for c in type(module).__mro__
    )
