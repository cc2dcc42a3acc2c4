"""The loss of a group is what the user's own step would return for the samples of that group alone.

``losses="split"`` runs the step on each group, and is the oracle. Steps are drawn: a loss of torch that compares a
prediction of a network with BatchNorm with a target, its reduction and weights, a mask, what the step does with the
elements, how it divides, a factor, a second loss, a term on parameters, and rows that are samples, tokens or views. In
each the whole batch gives the group losses, group weights and gradients of the split one, or it is refused.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from debias import GroupDRO, VREx
from debias.errors import DebiasError
from debias.ops import arguments
from debias.step.context import Step
from debias.step.settle import Learned, Settlement
from debias.step.split import split_losses
from debias.tap.rows import RowTracker
from debias.tap.tap import LossTap

N, D, C, T = 7, 4, 3, 2
GROUPS = torch.tensor([0, 1, 0, 2, 1, 0, 1])


def _classes(y: Tensor) -> Tensor:
    return (y[..., 0] > 0.3).long() + (y[..., 1] > 0.5)


# How each loss is called: (logits, target in [0, 1], options) -> loss; logits and target are (rows, C).
CROSS_ENTROPIES = {
    "cross_entropy": lambda z, y, **o: F.cross_entropy(z, _classes(y), **o),
    "class weights": lambda z, y, **o: F.cross_entropy(z, _classes(y), z.new_tensor([1.0, 3.0, 0.5]), **o),
    "ignored": lambda z, y, **o: F.cross_entropy(z, torch.where(y[..., 2] < 0.2, -100, _classes(y)), **o),
    "smoothed": lambda z, y, **o: F.cross_entropy(z, _classes(y), label_smoothing=0.1, **o),
    "soft": lambda z, y, **o: F.cross_entropy(z, y.softmax(-1), **o),
    "nll": lambda z, y, **o: F.nll_loss(z.log_softmax(-1), _classes(y), **o),
    "margin": lambda z, y, **o: F.multi_margin_loss(z, _classes(y), **o),
    "multilabel margin": lambda z, y, **o: F.multilabel_soft_margin_loss(z, (y > 0.5).to(z.dtype), **o),
}
ELEMENTWISE = {
    "bce": lambda z, y, **o: F.binary_cross_entropy_with_logits(z, (y > 0.5).to(z.dtype), **o),
    "bce weight": lambda z, y, **o: F.binary_cross_entropy_with_logits(z, (y > 0.5).to(z.dtype), weight=y, **o),
    "bce pos_weight": lambda z, y, **o: F.binary_cross_entropy_with_logits(
        z, (y > 0.5).to(z.dtype), pos_weight=z.new_tensor([1.0, 2.0, 0.3]), **o
    ),
    "bce of probabilities": lambda z, y, **o: F.binary_cross_entropy(z.sigmoid(), (y > 0.5).to(z.dtype), **o),
    "mse": lambda z, y, **o: F.mse_loss(z, y, **o),
    "mse weight": lambda z, y, **o: F.mse_loss(z, y, weight=y + 0.1, **o),
    "mse with the target first": lambda z, y, **o: F.mse_loss(y, z, **o),
    "l1": lambda z, y, **o: F.l1_loss(z, y, **o),
    "huber": lambda z, y, **o: F.huber_loss(z, y, delta=0.3, **o),
    "smooth l1": lambda z, y, **o: F.smooth_l1_loss(z, y, beta=0.3, **o),
    "soft margin": lambda z, y, **o: F.soft_margin_loss(z, 2 * (y > 0.5).to(z.dtype) - 1, **o),
    "hinge": lambda z, y, **o: F.hinge_embedding_loss(z, 2 * (y > 0.5).to(z.dtype) - 1, **o),
    "kl": lambda z, y, **o: F.kl_div(z.log_softmax(-1), y.softmax(-1), **o),
    "poisson": lambda z, y, **o: F.poisson_nll_loss(z, y, **o),
    "gaussian": lambda z, y, **o: F.gaussian_nll_loss(z, y, torch.full_like(z, 0.5), **o),
}
LOSSES = CROSS_ENTROPIES | ELEMENTWISE


def _per_row(losses: Tensor) -> Tensor:
    return losses if losses.ndim < 2 else losses.sum(-1)


def _masked(losses: Tensor, mask: Tensor) -> Tensor:
    return mask if losses.ndim == 1 else mask[:, None].expand(losses.shape)


# What a step does with unreduced losses and the mask of their rows.
ENDS = {
    "mean": lambda ls, m: ls.mean(),
    "sum over elements, mean over samples": lambda ls, m: _per_row(ls).mean(),
    "mean over samples, sum over elements": lambda ls, m: ls.mean(0).sum(),
    "mean in two stages": lambda ls, m: ls.mean(-1).mean() if ls.ndim > 1 else ls.mean(),
    "masked mean": lambda ls, m: (ls * _masked(ls, m)).mean(),
    "masked, over the mask": lambda ls, m: (ls * _masked(ls, m)).sum() / _masked(ls, m).sum(),
    "masked, over the mask of rows": lambda ls, m: (_per_row(ls) * m).sum() / m.sum().clamp(min=1e-6),
    "masked, over the rows": lambda ls, m: (_per_row(ls) * m).sum() / len(ls),
    "masked, over a number": lambda ls, m: (_per_row(ls) * (m > 0.4)).sum() / int((m > 0.4).sum()),
    "masked, times the reciprocal": lambda ls, m: (ls * _masked(ls, m)).sum() * _masked(ls, m).sum().reciprocal(),
    "by normalised weights": lambda ls, m: (_per_row(ls) * (m / m.sum())).sum(),
    "mean by normalised weights": lambda ls, m: (ls * (_masked(ls, m) / m.mean())).mean(),
    "divided, then summed": lambda ls, m: (ls / len(ls)).sum(),
    "a product with weights": lambda ls, m: _per_row(ls) @ m / m.sum(),
    "masked, by mean over mean": lambda ls, m: (_per_row(ls) * m).mean() / m.mean(),
    "sum over rows": lambda ls, m: ls.sum() / len(ls),
    "sum over elements": lambda ls, m: ls.sum() / ls.numel(),
    "sum over a constant": lambda ls, m: ls.sum() / 100,
    "sum": lambda ls, m: ls.sum(),
    "selected": lambda ls, m: ls[m > 0.4].mean(),
    "selected, over the mask": lambda ls, m: ls[m > 0.4].sum() / (m > 0.4).sum(),
    "filled": lambda ls, m: _per_row(ls).masked_fill(m < 0.4, 0).mean(),
    "where": lambda ls, m: torch.where(_masked(ls, m) > 0.4, ls, 0.1).mean(),
    "focal": lambda ls, m: ((1 - torch.exp(-ls.abs())) ** 2 * ls).mean(),
    "clamped": lambda ls, m: ls.clamp(max=0.8).mean(),
    "root of each": lambda ls, m: (_per_row(ls).abs() + 0.01).sqrt().mean(),
    "in place": lambda ls, m: ls.mul_(2.0).mean(),
    "reshaped": lambda ls, m: ls.reshape(-1).mean(),
    "flipped": lambda ls, m: ls.flip(0).mean(),
    "hardest": lambda ls, m: _per_row(ls).topk(2).values.mean(),
    "root of the mean": lambda ls, m: (ls.mean().abs() + 0.01).sqrt(),
    "variance": lambda ls, m: ls.mean() + 0.1 * ls.var(),
}
# How the rows of a loss come from the samples: (network, x, y, mask) -> logits, target, mask of its rows.
LAYOUTS = {
    "samples": lambda net, x, y, m: (net(x[:, 0]), y[:, 0], m[:, 0]),
    "sorted": lambda net, x, y, m: (lambda o: (net(x[o][:, 0]), y[o][:, 0], m[o][:, 0]))(x[:, 0, 0].argsort()),
    "tokens": lambda net, x, y, m: (net(x).reshape(-1, C), y.reshape(-1, C), m.reshape(-1)),
    "time first": lambda net, x, y, m: (
        net(x.transpose(0, 1)).reshape(-1, C), y.transpose(0, 1).reshape(-1, C), m.t().reshape(-1)
    ),
    "views": lambda net, x, y, m: (
        net(torch.cat([x[:, 0], x[:, 1]])), torch.cat([y[:, 0]] * 2), torch.cat([m[:, 0]] * 2)
    ),
    "interleaved": lambda net, x, y, m: (net(x.reshape(-1, D)), y[:, 0].repeat_interleave(T, 0), m.reshape(-1)),
}  # fmt: skip


@dataclass
class Form:
    """One step."""

    loss: str
    layout: str
    end: str
    factor: float
    second: str | None
    regulariser: bool

    def __call__(self, net: nn.Module, batch: Any) -> Tensor:
        x, y, m = batch
        z, target, mask = LAYOUTS[self.layout](net, x, y, m)
        of = LOSSES[self.loss]
        if self.end.startswith("reduction="):
            loss = of(z, target, reduction=self.end.partition("=")[2])
        elif self.end == "reduced sum over rows":
            loss = of(z, target, reduction="sum") / len(z)
        else:
            loss = ENDS[self.end](of(z, target, reduction="none"), mask)
        loss = self.factor * loss if self.factor != 1 else loss
        if self.second is not None:
            loss = loss + 0.3 * LOSSES[self.second](z, target)
        if self.regulariser:
            loss = loss + 0.01 * sum(p.pow(2).sum() for p in net.parameters())
        return loss


forms = st.builds(
    Form,
    loss=st.sampled_from(sorted(LOSSES)),
    layout=st.sampled_from(sorted(LAYOUTS)),
    end=st.sampled_from([*ENDS, "reduction=mean", "reduction=sum", "reduction=batchmean", "reduced sum over rows"]),
    factor=st.sampled_from([1.0, 1.0, 0.5]),
    second=st.sampled_from([None, None, None, "mse", "cross_entropy", "bce weight"]),
    regulariser=st.booleans(),
).filter(  # torch warns of the mean of kl_div
    lambda form: form.end != ("reduction=mean" if form.loss == "kl" else "reduction=batchmean")
)


def _data() -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(N, T, D, generator=random), torch.rand(N, T, C, generator=random)
    return x.double(), y.double(), 0.2 + torch.rand(N, T, generator=random).double()


DATA = _data()


class RowNorm(nn.BatchNorm1d):
    """BatchNorm of the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(-1, x.shape[-1])).view(x.shape)


class Logging(nn.Module):
    """What a method asks of a module: its device, its parameters, and where values are logged."""

    device = torch.device("cpu")
    automatic_optimization = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.logged: dict[str, Tensor] = {}

    def log(self, name: str, value: Tensor, **options: Any) -> None:
        self.logged[name] = value.detach().clone()

    def log_dict(self, values: dict[str, Tensor], **options: Any) -> None:
        self.logged |= values


def _settled(
    form: Form, method: Any, learned: Learned | None = None, data: tuple[Tensor, ...] = DATA
) -> dict[str, Tensor]:
    """What one step logs, and the gradients of the loss that it returns; ``learned`` is what steps before it showed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(D, 5), RowNorm(5), nn.Tanh(), nn.Linear(5, C)).double()
    parameters = list(net.parameters())
    trainer = SimpleNamespace(callbacks=[method], optimizers=[torch.optim.SGD(parameters, 0.1)], is_global_zero=True)
    module = Logging(net)
    step = Step(trainer, module, "train", data, {"place": GROUPS}, logging=True)
    learned = Learned() if learned is None else learned
    method.begin(step)
    if method.reweighs and method.losses == "split":
        loss = split_losses(lambda batch: form(net, batch), step, method)
    else:
        settlement = Settlement(step, [method], learned)
        tracker = RowTracker(step.batch, N, everything=learned.rows_needed.get(("train", 0), True))
        tap = LossTap(tracker=tracker, careful=settlement.first, constants=net.buffers())
        with tap, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = form(net, data)
        loss = settlement.settle(tap, loss, {})
    found = {k: v for k, v in module.logged.items() if "by_group" in k or "weight" in k or "penalty" in k}
    names = [f"gradient {name}" for name, _ in net.named_parameters()]
    return found | dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


BEFORE = tuple(x.roll(1, 0) for x in DATA)
REFUSED: list[Form] = []
quick = settings(
    max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@quick
@given(form=forms)
def test_whole_is_split_or_refused(form):
    try:
        whole = _settled(form, GroupDRO("place", 3, step_size=0.5, loss=None if form.second is None else "sum"))
    except DebiasError:
        REFUSED.append(form)
        return
    split = _settled(form, GroupDRO("place", 3, step_size=0.5, losses="split"))
    assert whole.keys() == split.keys()
    for name in whole:
        # A term on parameters alone stays as it is; the loss of a group alone holds it too.
        if not (form.regulariser and "loss_by_group" in name):
            torch.testing.assert_close(whole[name], split[name], rtol=1e-6, atol=1e-8)


@quick
@given(form=forms)
def test_later_steps_on_a_device_are_as_the_first_one_or_refused(form):
    """Where nothing may be read any more, as reading waits for the device."""
    method = functools.partial(GroupDRO, "place", 3, step_size=0.5, loss=None if form.second is None else "sum")
    learned = Learned()
    with mock.patch.object(arguments, "on_host", return_value=False):
        try:
            _settled(form, method(), learned, BEFORE)
        except DebiasError:
            return
        later = _settled(form, method(), learned)
    torch.testing.assert_close(later, _settled(form, method()), rtol=1e-9, atol=1e-9)


@settings(quick, max_examples=150)
@given(form=forms.filter(lambda form: not form.regulariser))
def test_penalties_are_of_the_same_group_losses(form):
    loss = None if form.second is None else "sum"
    try:
        whole = _settled(form, VREx("place", 3, penalty_weight=1.0, loss=loss))
    except DebiasError:
        REFUSED.append(form)
        return
    split = _settled(form, GroupDRO("place", 3, losses="split"))
    by_group = torch.stack([split[f"train/loss_by_group/{g}"] for g in range(3)])
    torch.testing.assert_close(whole["train/vrex_penalty"], by_group.var(unbiased=False), rtol=1e-5, atol=1e-7)


def test_what_is_refused_is_what_has_to_be():
    """Ways to end a loss that no sample has a share in, and sums that nothing divides; nothing else."""
    if not REFUSED:  # where another process has drawn the steps
        test_whole_is_split_or_refused()
    assert REFUSED
    never = {"sum over a constant", "sum", "hardest", "root of the mean", "variance", "reduction=sum"}
    assert [form for form in REFUSED if form.end not in never and form.second is None] == []


@pytest.mark.slow
@settings(quick, max_examples=20_000)
@given(form=forms)
def test_whole_is_split_or_refused_at_length(form):
    test_whole_is_split_or_refused.hypothesis.inner_test(form)
