"""Finding the classifier head and the features it reads, without being told. No Lightning here.

In the first step every ``F.linear`` is noted; the one whose output became the logits of the loss is the head. In the
second, a hook on that module has to deliver the same input; from then on it does so alone, so that nothing else is kept
alive. Where it cannot (two heads, a head that runs twice, a weight that is used without its module) the noting goes on.
Other features are the output of a module that is named.
"""

from __future__ import annotations

import difflib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import HeadNotFoundError
from debias.step.tap import LossCall

__all__ = ["FeatureTap", "HeadFinder", "HeadTap", "submodule"]

_T = torch.Tensor
# Operations between head and loss that leave every logit what it is.
_PASS = frozenset(
    {_T.float, _T.double, _T.to, _T.contiguous, _T.squeeze, _T.unsqueeze, _T.view, _T.reshape, _T.flatten, _T.type_as}
    | {_T.clone, _T.transpose, _T.permute}
    | {torch.squeeze, torch.unsqueeze, torch.reshape, torch.flatten, torch.transpose, torch.permute, torch.clone}
)


class HeadFinder:
    """Notes linear layers (and 1x1 convolutions) of one step and matches their outputs with the logits of a loss."""

    def __init__(self) -> None:
        self._linears: list[tuple[Tensor, Tensor, Tensor]] = []  # output, input, weight
        self._passed: list[tuple[Tensor, Tensor]] = []  # output, input

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Note one operation."""
        if func is F.linear or func is F.conv2d or func is torch.conv2d:
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            if isinstance(weight, Tensor) and (weight.ndim == 2 or weight.shape[2:] == (1, 1)):
                source = args[0] if args else kwargs["input"]
                self._linears.append((out, source, weight))
        elif (func in _PASS or (func is _T.__getitem__ and _keeps_rows(args[1]))) and isinstance(out, Tensor):
            self._passed.append((out, args[0]))

    def match(self, logits: Tensor) -> tuple[Tensor, Tensor] | None:
        """Input and weight of the linear layer whose output the logits are."""
        end = len(self._passed)
        while True:
            for out, source, weight in self._linears:
                if out is logits:
                    return source, weight
            # By position, not identity alone: `.float()` may return its argument.
            for i in range(end - 1, -1, -1):
                if self._passed[i][0] is logits:
                    logits, end = self._passed[i][1], i
                    break
            else:
                return None


def _keeps_rows(index: Any) -> bool:
    """Whether an index takes columns only, as `logits[:, 0]` does."""
    return isinstance(index, tuple) and index[0] == slice(None) and all(isinstance(i, int | None) for i in index[1:])


class HeadTap:
    """Delivers features and head of the selected loss: found in the first step, hooked from the second.

    Args:
        root: the user's module.
        path: dotted path of the head, or None to find it.
        compiled: something in the module is compiled. A hook added now would silently never run, so the noting goes on.
    """

    def __init__(self, root: nn.Module, path: str | None, *, compiled: bool = False) -> None:
        self.root = root
        self.head: nn.Module | None = None
        self._runs: list[tuple[bool, Tensor]] = []  # whether gradients were recorded, input
        self._handle: Any = None
        self._noting = path is None
        self._hookable = not compiled
        self._agreed = False
        self._armed = False
        self._hooked = False
        if path is not None:
            self.head = submodule(root, path, argument="head")
            self._hook()

    def start(self) -> HeadFinder | None:
        """Begin a step: nothing of an earlier one may be used."""
        self._runs.clear()
        self._armed = True
        self._hooked = self._handle is not None  # in this step, and not only since a method has asked in it
        self._noting = self._noting and not (self._hookable and self._agreed)
        return HeadFinder() if self._noting else None

    def stop(self) -> None:
        """End the user's step: penalties and monitors may run the network again."""
        self._armed = False

    def resolve(self, call: LossCall) -> None:
        """Give a call its features and its head.

        Raises:
            HeadNotFoundError: the logits are no linear layer's output, or the head ran not exactly once in this step.
        """
        self.stop()
        # What ran without gradients, to log an accuracy, has not made the logits of a loss that is trained with.
        inputs = [x for recorded, x in self._runs if recorded] or [x for _, x in self._runs]
        if not self._noting:
            if len(inputs) != 1:
                raise HeadNotFoundError(
                    f"Expected the head to run once in a step, but it ran {_times(inputs)}. Name the layer that"
                    " makes the logits of the loss: `head='dotted.path'`."
                )
            call.features, call.head = inputs[0], self.head
            return
        call.features, weight = call.linear or (None, None)
        # Not by `m.weight`, which some parametrizations compute anew, and change their state.
        found = [m for m in self.root.modules() if _own_weight(m) is weight] if weight is not None else []
        if not found:
            raise HeadNotFoundError(
                f"Expected the logits of `{call.name}` to be the output of a linear layer of the module, but no layer"
                " was found (averaged heads, `logits / temperature` and cosine heads are not). Name it:"
                " `head='dotted.path'`."
            )
        call.head = found[0]
        if not self._hookable:
            return
        if self._handle is None:
            self.head = call.head
            self._hook()
        elif call.head is not self.head or (self._hooked and (len(inputs) != 1 or inputs[0] is not call.features)):
            self._hookable = False
            self.close()
        else:
            self._agreed = self._hooked

    def close(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self) -> None:
        from debias.step.proxy import Hook

        keep = Hook(self._keep_input)
        self._handle = self.head.register_forward_pre_hook(keep, with_kwargs=True)  # type: ignore[union-attr]

    def _keep_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorded = torch.is_grad_enabled()
        if self._armed and sum(r == recorded for r, _ in self._runs) < 2:  # two are enough to tell one from many
            self._runs.append((recorded, args[0] if args else next(iter(kwargs.values()))))


class FeatureTap:
    """Delivers the output of a named module as the features of a loss.

    Args:
        root: the user's module.
        path: dotted path of the module whose output the features are.
    """

    def __init__(self, root: nn.Module, path: str) -> None:
        from debias.step.proxy import Hook

        self.path = path
        self._outputs: list[Tensor] = []
        self._armed = False
        self._handle: Any = submodule(root, path, argument="features").register_forward_hook(Hook(self._keep_output))

    def start(self) -> None:
        """Begin a step: nothing of an earlier one may be used."""
        self._outputs.clear()
        self._armed = True

    def stop(self) -> None:
        """End the user's step: penalties and monitors may run the network again."""
        self._armed = False

    def resolve(self, call: LossCall) -> None:
        """Give a call its features.

        Raises:
            HeadNotFoundError: the module ran not exactly once in this step.
        """
        if len(self._outputs) != 1:
            raise HeadNotFoundError(
                f"Expected the module `features={self.path!r}` to run once in a step, but it ran"
                f" {_times(self._outputs)}. Name one that runs once."
            )
        call.features = self._outputs[0]

    def close(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _keep_output(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if self._armed:
            self._outputs.append(output)
        del self._outputs[2:]


def _own_weight(module: nn.Module) -> Any:
    return module._parameters.get("weight", vars(module).get("weight"))


def _times(kept: list[Tensor]) -> str:
    return "several times" if kept else "0 times"


def submodule(root: nn.Module, path: str, *, argument: str) -> nn.Module:
    """The submodule at a dotted path.

    Raises:
        HeadNotFoundError: there is none; the error names what is near, and lists what is there.
    """
    try:
        return root.get_submodule(path)
    except AttributeError:
        names = [name for name, _ in root.named_modules() if name]
        near = " or ".join(repr(name) for name in difflib.get_close_matches(path, names))
        raise HeadNotFoundError(
            f"Expected `{argument}` to be the dotted path of a submodule, but got"
            f" {path!r}.{f' Did you mean {near}?' if near else ''} There are: {', '.join(names[-20:])}."
        ) from None
