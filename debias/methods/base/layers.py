"""Augmentation of features: hooks on named layers that are at work inside a training step and nowhere else."""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Sequence
from dataclasses import field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias.errors import DebiasError, RowsError
from debias.methods.base.method import Method
from debias.ops.fields import arguments
from debias.step.context import Step
from debias.tap.hooks import Hook

__all__ = ["LayerAugmenter", "default_layers", "find_layers", "prefix_tokens"]

_COMPILED = "_orig_mod"  # torch.compile puts it into the paths


@arguments
class LayerAugmenter(Method):
    """A method that changes the outputs of layers during training.

    A layer is changed only while a training step runs and the layer itself is in training mode. Where activation
    checkpointing recomputes a layer in the backward pass, it is changed again, by the same draws.

    Args:
        layers: dotted paths of layers whose output is ``(N, C, H, W)`` or ``(N, T, D)``; ``*`` stands for anything but
            a dot. By default those of ``resnet_layers`` or ``vit_blocks`` in the one ResNet or vision transformer
            (torchvision, timm) of the module.
        prefix_tokens: tokens of ``(N, T, D)`` before those of the patches, such as the class token, which stay as they
            are; found in timm and torchvision.
    """

    resnet_layers: ClassVar[tuple[str, ...]] = ("layer1", "layer2")
    vit_blocks: ClassVar[tuple[float, ...]] = (0.25, 0.5)

    layers: str | list[str] | None = field(default=None, kw_only=False)
    prefix_tokens: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        layers, prefix_tokens = self.layers, self.prefix_tokens
        self.layers = given = [layers] if isinstance(layers, str) else layers
        if given is not None and (not given or not all(isinstance(path, str) and path for path in given)):
            raise DebiasError(
                f"Expected `layers` to be dotted paths of layers, such as ['net.layer1', 'net.layer2'], but got"
                f" {layers!r}."
            )
        if prefix_tokens is not None and (type(prefix_tokens) is not int or prefix_tokens < 0):
            raise DebiasError(f"Expected `prefix_tokens` to be a number of tokens or None, but got {prefix_tokens!r}.")
        self.step: Step | None = None
        self._handles: list[Any] = []

    # -- what a method overrides -------------------------------------------------------------------

    def change(self, x: Tensor, path: str) -> Tensor:
        """The new output of a layer.

        Args:
            x: ``(N, C, H, W)`` or, without prefix tokens, ``(N, T, D)``.
            path: where the layer is; names its draws.
        """
        raise NotImplementedError

    def found(self, layers: dict[str, nn.Module]) -> None:
        """Told once a run which layers were found, by path."""

    # -- the rest ----------------------------------------------------------------------------------

    @property
    def loss_rows(self) -> None:
        """Nothing: its ``rows`` are those of a layer."""

    def augment(self, step: Step) -> None:
        """From now on, until the backward pass has ended, layers are changed."""
        self.step = step

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine and put hooks on the layers: before the first call, or a compiled layer would not see them.

        Raises:
            DebiasError: a path matches nothing, or there is no network whose layers are known.
        """
        super().setup(trainer, pl_module, stage)
        if stage != "fit" or self._handles:
            return
        if self.layers is None:
            layers = default_layers(pl_module, self.resnet_layers, self.vit_blocks)
        else:
            layers = find_layers(pl_module, self.layers)
        self.found(layers)
        for path, layer in layers.items():
            before = prefix_tokens(pl_module, path) if self.prefix_tokens is None else self.prefix_tokens
            hook = functools.partial(self._run, path, before)
            self._handles.append(layer.register_forward_hook(Hook(hook)))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the hooks away."""
        while self._handles:
            self._handles.pop().remove()
        self.step = None
        super().teardown(trainer, pl_module, stage)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Nothing is recomputed any more. (Under manual optimisation a step may go on after a backward pass.)"""
        if self.random.replaying:
            self.step = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the step."""
        self.step = None

    def ids_of_rows(self, ids: Tensor, rows: int) -> Tensor:
        """Values per row of a layer's output from values per sample; ``rows=`` says how several rows are arranged.

        Raises:
            RowsError: the layer has another number of rows than the batch has samples, and nothing says why.
        """
        if rows == len(ids):
            return ids
        if self.rows in ("tiled", "interleaved") and rows % len(ids) == 0:
            times = rows // len(ids)
            return ids.repeat(times) if self.rows == "tiled" else ids.repeat_interleave(times)
        raise RowsError(
            f"Expected a layer's output to have one row for each of the {len(ids)} samples, but got {rows}. If every"
            " sample has several, say how they are arranged: `rows='tiled'` (all samples, then all again) or"
            " `rows='interleaved'` (all rows of a sample together)."
        )

    @torch.compiler.disable  # draws and collectives stay outside the graph of a compiled network
    def _run(self, path: str, before: int, layer: nn.Module, args: Any, output: Any) -> Tensor | None:
        if self.step is None or not layer.training:
            return None
        # Once the step has ended, only autograd runs it again; others, such as on_before_zero_grad, see the plain one.
        if self.random.replaying and torch._C._current_graph_task_id() == -1:
            return None
        if not isinstance(output, Tensor) or output.ndim not in (3, 4) or not output.is_floating_point():
            got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise DebiasError(
                f"Expected the output of the layer {path!r} to be feature maps (N, C, H, W) or tokens (N, T, D), but"
                f" got {got}. Choose other `layers`."
            )
        if output.ndim == 3 and before:
            return torch.cat([output[:, :before], self.change(output[:, before:], path)], dim=1)
        return self.change(output, path)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_handles": [], "step": None}


def find_layers(root: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """Submodules by dotted paths, in which ``*`` stands for anything but a dot.

    Raises:
        DebiasError: a path matches nothing; the error names what is near.
    """
    named = {_plain(name): module for name, module in root.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matching = {name: module for name, module in named.items() if _matches(name, _plain(pattern))}
        if not matching:
            near = [name for name in named if name.endswith(f".{pattern}")]
            near += [n for n in difflib.get_close_matches(pattern, list(named), n=3, cutoff=0.4) if n not in near]
            hint = f"Near: {', '.join(near[:3])}" if near else f"There are: {', '.join(list(named)[:20])}"
            raise DebiasError(
                f"Expected `layers` to name layers of the module by dotted paths, but {pattern!r} matches none."
                f" {hint}. `*` stands for anything but a dot."
            )
        found |= matching
    return found


def default_layers(root: nn.Module, resnet: Sequence[str], vit: Sequence[float]) -> dict[str, nn.Module]:
    """Layers of the one ResNet or vision transformer in a module.

    Args:
        root: the module.
        resnet: names of a ResNet's layers.
        vit: after which of a transformer's blocks, as shares of its depth.

    Raises:
        DebiasError: there is no such network, or more than one.
    """
    networks: dict[str, dict[str, nn.Module]] = {}
    for name, module in root.named_modules():
        name = _plain(name)  # a compiled module shows the parts of the module inside it
        path = f"{name}." if name else ""
        if all(hasattr(module, part) for part in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4")):
            networks[name] = {path + part: getattr(module, part) for part in resnet}
        elif (blocks := _blocks(module)) is not None:
            where, layers = blocks
            names = list(layers)
            chosen = [names[i] for i in sorted({max(math.ceil(share * len(names)) - 1, 0) for share in vit})]
            networks[name] = {f"{path}{where}.{block}": layers[block] for block in chosen}
    if len(networks) == 1:
        return next(iter(networks.values()))
    got = f"{len(networks)} of them, at {', '.join(map(repr, networks))}" if networks else "none"
    raise DebiasError(
        "Expected `layers` to be given unless the module has one ResNet or vision transformer of torchvision or timm,"
        f" but got {got}. Name the layers, e.g. `layers=['net.stage1', 'net.stage2']`."
    )


def prefix_tokens(root: nn.Module, path: str) -> int:
    """How many tokens of a layer's output are no patches: what the innermost transformer around it says."""
    named = {_plain(name): module for name, module in root.named_modules()}
    parts = path.split(".")
    if "patch_embed" in parts:
        return 0
    for end in range(len(parts), -1, -1):
        module = named.get(".".join(parts[:end]))
        if isinstance(count := getattr(module, "num_prefix_tokens", None), int):
            return count
        if any(isinstance(getattr(module, token, None), Tensor) for token in ("class_token", "cls_token")):
            return 1
    return 0


def _blocks(module: nn.Module) -> tuple[str, dict[str, nn.Module]] | None:
    """Where the blocks of a vision transformer are, and the blocks."""
    if hasattr(module, "patch_embed") and hasattr(module, "num_prefix_tokens"):
        where, blocks = "blocks", getattr(module, "blocks", None)
    elif hasattr(module, "conv_proj"):
        where, blocks = "encoder.layers", getattr(getattr(module, "encoder", None), "layers", None)
    else:
        return None
    layers = dict(blocks.named_children()) if isinstance(blocks, nn.Module) else {}
    return (where, layers) if layers else None


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
