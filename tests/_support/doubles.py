"""Small methods that between them use everything a method can use: augmentation, hooks in the network, a penalty, found
features, an owned network, updates per epoch. They run through the conformance suite beside the exported methods."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from debias import Debiaser, LossCall
from debias.ops.distributed import as_global, global_sum, weighted_mean
from debias.step.batch import replace
from debias.step.context import Step
from debias.step.owned import OwnedModule
from debias.tap.head import submodule
from debias.tap.hooks import Hook


def _count(rows: Tensor) -> Tensor:
    return global_sum(rows.new_full((), rows.shape[0]))


class LogitVariance(Debiaser):
    """Penalises the variance of the logits over the global batch: a mean enters a second global statistic."""

    stateful: ClassVar[bool] = True

    def __init__(self, *, weight: float = 0.1, name: str | None = None) -> None:
        super().__init__(name=name)
        self.weight = weight
        self.module = nn.Module()
        self.module.register_buffer("mean", torch.zeros(2, dtype=torch.float64))

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        logits = call.logits.double()
        count = _count(logits)
        mean = global_sum(logits.sum(0)) / count
        self.module.mean.copy_(mean.detach())
        return self.weight * global_sum(((logits - mean) ** 2).sum()) / count


class FeatureNorm(Debiaser):
    """Penalises features times head weights; the head and its features are found."""

    needs_features: ClassVar[bool] = True

    def __init__(self, *, head: str | None = None, name: str | None = None) -> None:
        super().__init__(head=head, name=name)
        self.mismatch: list[Tensor] = []

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        logits = nn.functional.linear(call.features, call.head.weight, call.head.bias)
        self.mismatch.append((logits - call.logits).detach().abs().max())
        share = global_sum((call.features**2).sum() + 0 * call.head.weight.sum()) / _count(call.features)
        return 0.01 * share * (call.head.weight**2).sum()


class SharedFlip(Debiaser):
    """Flips the sign of input features; all ranks flip the same."""

    def augment(self, step: Step) -> None:
        x = step.read(0, argument="input")
        signs = self.random.draw(
            "input", x.device, lambda g: torch.randint(0, 2, (x.shape[1],), generator=g, device=g.device), shared=True
        )
        step.batch = replace(step.batch, 0, x * (2 * signs - 1).to(x.dtype))


class LayerNoise(Debiaser):
    """Scales the output of a layer inside the network by random numbers, through a forward hook."""

    def __init__(self, *, layer: str = "backbone", name: str | None = None) -> None:
        super().__init__(name=name)
        self.layer = layer
        self._handle: Any = None

    def augment(self, step: Step) -> None:
        pass

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if self._handle is None:
            self._handle = submodule(pl_module, self.layer, argument="layer").register_forward_hook(Hook(self._scale))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        super().teardown(trainer, pl_module, stage)

    def _scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if not module.training or self.engine is None or self not in self.engine.watchers():
            return None
        width = output.shape[1]
        noise = self.random.draw(
            self.layer, output.device, lambda g: torch.rand(width, generator=g, dtype=torch.float64, device=g.device),
            shared=True,
        )  # fmt: skip
        return output * (0.5 + noise).to(output.dtype)


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Adversary(Debiaser):
    """A network of its own guesses who is on the picture; gradient reversal."""

    stateful: ClassVar[bool] = True
    needs_features: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("identity",)

    def __init__(self, identity: str, n_identities: int, *, lr: float | None = None, name: str | None = None) -> None:
        super().__init__(name=name)
        self.identity = identity
        self.n_identities = n_identities
        self.owned = {"adversary": OwnedModule(self._build, seed=1, lr=lr)}

    def _build(self, width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, self.n_identities))

    def sample_ids(self, step: Step) -> Tensor:
        return step.ids(self.identity, self.n_identities, argument="identity")

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        ids = self.sample_ids(step)
        features = call.features
        with torch.autocast(features.device.type, enabled=False):
            features = features if features.dtype == torch.float64 else features.float()
            network = self.owned["adversary"].create(features.shape[1], features.device, features.dtype)
            losses = nn.functional.cross_entropy(network(_Reverse.apply(features)), ids, reduction="none")
        return weighted_mean(losses, torch.ones_like(losses))


class Scheduled(Debiaser):
    """A penalty on squared logits whose weight grows from epoch to epoch."""

    stateful: ClassVar[bool] = True

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.module = nn.Module()
        self.module.register_buffer("weight", torch.tensor(0.01, dtype=torch.float64))

    def new_epoch(self, epoch: int) -> None:
        self.module.weight.mul_(1.5)

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        return self.module.weight * global_sum((call.logits.double() ** 2).sum()) / _count(call.logits)


def _second(width: int) -> nn.Module:
    return nn.Linear(width, 2)


class SecondNetwork(Debiaser):
    """A second network reads the input; samples whose loss it finds high count more, and it learns on its own loss.

    One class that both reweighs and penalises: what both need is made once a step.
    """

    stateful: ClassVar[bool] = True

    def __init__(self, *, input: int = 0, target: int = 1, name: str | None = None) -> None:
        super().__init__(name=name)
        self.input, self.target = input, target
        self.owned = {"second": OwnedModule(_second, seed=2)}

    def sample_ids(self, step: Step) -> Tensor:
        return step.ids(self.target, 2, argument="target")

    def _losses(self, step: Step) -> Tensor:
        def make() -> Tensor:
            x = step.read(self.input, argument="input")
            with torch.autocast(x.device.type, enabled=False):
                network = self.owned["second"].create(x.shape[1], x.device, x.dtype)
                return nn.functional.cross_entropy(network(x), self.sample_ids(step), reduction="none")

        return step.once((self, "losses"), make)

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        weights = 1 + self._losses(step).detach()
        made = []
        for call in calls:
            num = call.num * call.of_rows(weights).to(call.num.dtype)
            made.append(global_sum(num.sum()) / global_sum(call.den.sum()))
        return made

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        losses = self._losses(step)
        count = _count(losses)
        local = self.owned["second"].local_loss(losses, torch.ones_like(losses), count)
        return as_global(local, global_sum(losses.detach().sum()) / count)


class PlainFirst(Debiaser):
    """Plain training for an epoch, then a penalty on squared logits."""

    stateful: ClassVar[bool] = True

    def __init__(self, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.module = nn.Module()
        self.module.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    def new_epoch(self, epoch: int) -> None:
        self.module.weight.fill_(0.05)

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        return self.module.weight * global_sum((call.logits.double() ** 2).sum()) / _count(call.logits)


DOUBLES = (LogitVariance, FeatureNorm, SharedFlip, LayerNoise, Adversary, Scheduled, SecondNetwork, PlainFirst)
