"""Steps as people write them, whole against ``losses="split"``: the loss of a group is what the step returns for it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

from debias import IRM, AttributeProbe, Fishr, GroupDRO, GroupMonitor, JustTrainTwice, SampleRecorder, tag
from debias.errors import AmbiguousLossError, DebiasError, LossNotFoundError, RowsError, UntappedLossError

N, T, D, C = 8, 3, 4, 3
G = torch.tensor([0, 1, 0, 1, 1, 0, 0, 0])
ORDER = torch.tensor([3, 1, 0, 7, 5, 2, 6, 4])
ALPHA = torch.tensor([0.2, 0.5, 0.3]).double()
ROWS = ALPHA.repeat(N + 1, 1)
HALF = torch.tensor([1, 1, 0, 1, 0, 0, 1, 0]).double()
Step = Callable[..., Any]


def data(tokens: int = T) -> tuple[Tensor, ...]:
    """Inputs, classes, classes of tokens, weights of samples, masks of tokens, soft targets."""
    random = torch.Generator().manual_seed(0)
    return (
        torch.randn(N, tokens, D, generator=random).double(),
        torch.randint(0, C, (N,), generator=random),
        torch.randint(0, C, (N, tokens), generator=random),
        0.2 + torch.rand(N, generator=random).double(),
        (torch.rand(N, tokens, generator=random) > 0.4).double(),
        torch.rand(N, C, generator=random).double(),
    )


class Model(L.LightningModule):
    def __init__(self, step: Step) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(D, C), nn.Tanh(), nn.Linear(C, C)).double()
        self.step = step

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self.net, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class Validated(Model):
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self.net, *batch)


def trainer(*callbacks: Any, **options: Any) -> L.Trainer:
    quiet: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    quiet |= {"max_epochs": 1, "log_every_n_steps": 1, "enable_model_summary": False, "callbacks": list(callbacks)}
    return L.Trainer(**quiet | options)


def fit(step: Step, dataset: Any = None, collate: Any = None, **options: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Losses of the groups, and parameters after two steps of GroupDRO, of which the first looks at everything."""
    model, run, groups = Model(step), trainer(GroupDRO("g", 2, step_size=0.5, **options)), G
    if dataset is None:
        *columns, groups = (torch.cat([x, x.flip(0)]) for x in (*data(), G))
        dataset = TensorDataset(*columns)
    run.fit(model, DataLoader(tag(dataset, g=groups), batch_size=N, collate_fn=collate))
    logged = {k: v for k, v in run.callback_metrics.items() if "loss_by_group" in k}
    return logged, nn.utils.parameters_to_vector(model.parameters()).detach()


def same(step: Step, dataset: Any = None, collate: Any = None, **options: Any) -> None:
    whole = fit(step, dataset, collate, **options)
    split = fit(step, dataset, collate, losses="split")
    torch.testing.assert_close(whole, split, rtol=1e-6, atol=1e-9)  # values are logged in single precision
    torch.testing.assert_close(whole[1], split[1], rtol=1e-9, atol=1e-9)


def ce(net: Any, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    return F.cross_entropy(net(x).mean(1), y, reduction=reduction)


def losses(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return ce(net, x, y, "none")


def tokens(net: Any, x: Tensor, yt: Tensor) -> Tensor:
    return F.cross_entropy(net(x).transpose(1, 2), yt, reduction="none")


summed = functools.partial(F.cross_entropy, reduction="sum")


def crops(net: Any, x: Tensor) -> Tensor:
    """Logits of all crops, one crop of all samples after the other, though the network has seen them otherwise."""
    return net(x.flatten(0, 1)).view(-1, T, C).transpose(0, 1).flatten(0, 1)


def scaled(net: Any, x: Tensor, z: Tensor, of: Step) -> Tensor:
    """The mean of losses of all classes, changed by something that is made of the logits."""
    logits = net(x).mean(1)
    return of(F.binary_cross_entropy_with_logits(logits, z, reduction="none"), logits).mean()


def of_states(loss: Tensor, total: Tensor) -> Tensor:
    """As metrics keep them."""
    states = {"loss": torch.tensor(0.0).double(), "total": torch.tensor(0.0).double()}
    states["loss"] += loss
    states["total"] += total
    return states["loss"] / states["total"]


def transcribed(net: Any, x: Tensor, yt: Tensor, loss: Step) -> Tensor:
    """Of one or two labels a sample, which are no blanks."""
    labels = torch.stack([yt[:, 0] % 2 + 1, 2 - yt[:, 0] % 2], 1)
    return loss(net(x).log_softmax(-1).transpose(0, 1), labels, torch.full((len(x),), T), yt[:, 1] % 2 + 1)


def through_a_view(values: Tensor, change: Step) -> Tensor:
    change(values.view(-1))
    return values


def masked_view(values: Tensor, y: Tensor, mask: Tensor) -> Tensor:
    """As of the next states of Q-learning, of which those that end are worth nothing."""
    best = values.gather(1, y[:, None]).squeeze(1)
    best[mask] = 0.0
    return best


def written_view(values: Tensor, rows: Tensor) -> None:
    values[:, 0].copy_(rows)


def over_its_own_sum(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum()


def padding(length: Tensor) -> Tensor:
    """The usual mask: tokens before the end."""
    return (torch.arange(max(T, length.max()))[None] < length[:, None]).double()


def sure(net: Any, x: Tensor) -> Tensor:
    """How sure the network is of each sample."""
    return net(x).mean(1).softmax(1).max(1).values.detach()


def counts(y: Tensor) -> Tensor:
    return 1 / (torch.bincount(y, minlength=C) + 1).double()


def drawn(x: Tensor) -> Tensor:
    """A bump for each sample, drawn into what is there."""
    target = torch.zeros(len(x), C).double()
    for i in range(len(x)):
        target[i] = torch.maximum(target[i], (-((torch.arange(C) - x[i, 0, 0]) ** 2)).exp())
    return target


def tasks(net: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return torch.stack([ce(net, x, y), F.mse_loss(net(x).mean(1), z)])


def zeroed(values: Tensor, loss: Tensor) -> Tensor:
    """The loss, after what it was computed from has been changed in place."""
    with torch.no_grad():
        values[:, :1] = -9
    return loss


def without_gradient(values: Tensor) -> Tensor:
    with torch.no_grad():
        weights = 1 - torch.exp(-values)
        return weights / weights.mean()


def stated(values: Tensor) -> dict[str, Tensor]:
    return {"loss": values.mean(), "losses": values}


def fixmatch(net: Any, views: Tensor) -> Tensor:
    """A loss of strongly changed samples with the classes of the weakly changed ones, where these are sure."""
    _, weak, strong = net(views).mean(1).chunk(3)
    sure, classes = weak.detach().softmax(-1).max(-1)
    return (F.cross_entropy(strong, classes, reduction="none") * (sure > 0.4).double()).mean()


@torch.no_grad()
def unfollowed(net: Any, x: Tensor, y: Tensor) -> Tensor:
    return losses(net, x, y)


def compared(z: Tensor, scores: Callable[[Tensor], Tensor]) -> Tensor:
    return F.cross_entropy(scores(z), torch.arange(len(z)))


def joined(z: Tensor) -> Tensor:
    n = len(z)
    return torch.cat([z[:, None].expand(-1, n, -1), z[None].expand(n, -1, -1)], -1).prod(-1)


def listed(z: Tensor) -> Tensor:
    return torch.stack([torch.stack([(a * b).sum() for b in z]) for a in z])


def filled(out: Tensor, parts: Any) -> Tensor:
    for key, part in parts:
        out[key] = part
    return out


def put(net: Any, x: Tensor, y: Tensor, w: Tensor, how: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The loss of a batch that is put into another order, inputs and labels alike."""
    rank = w.argsort().argsort()
    return F.cross_entropy(net(how(x[:, 0], rank)), how(y, rank))


def spread(rank: Tensor, x: Tensor) -> Tensor:
    return rank.view(-1, *[1] * (x.ndim - 1)).expand_as(x)


RIGHT: dict[str, Step] = {
    "over the lengths": lambda net, x, y, yt, w, k, z: summed(net(x).flatten(0, 1), yt.flatten()) / w.sum(),
    "over the lengths, of samples with as many rows as they like": lambda net, x, y, yt, w, k, z: (
        lambda rows: losses(net, x[rows], y[rows]).sum() / w.sum()
    )(torch.arange(len(x)).repeat_interleave(1 + (k[:, 0] > 0) + 2 * (k[:, 1] > 0))),
    "over the lengths, tokens first": lambda net, x, y, yt, w, k, z: (
        summed(net(x.transpose(0, 1)).flatten(0, 1), yt.t().flatten()) / w.sum()
    ),
    "over the labels that count, padded by one": lambda net, x, y, yt, w, k, z: (
        summed(net(x).flatten(0, 1), F.pad(yt.masked_fill(k == 0, -100), (0, 1), value=-100)[:, 1:].reshape(-1))
        / (yt[:, 1:].masked_fill(k[:, 1:] == 0, -100) != -100).sum()
    ),
    "in chunks": lambda net, x, y, yt, w, k, z: ce(lambda x: torch.cat([net(part) for part in x.chunk(3)]), x, y),
    "each class by itself, with its labels": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        torch.cat([net(x[y == c]).mean(1) for c in range(C)]), torch.cat([y[y == c] for c in range(C)])
    ),
    "constant labels in two parts": lambda net, x, y, yt, w, k, z: F.binary_cross_entropy_with_logits(
        net(x).mean((1, 2)), torch.cat([torch.ones(len(x) - 3), torch.ones(3)]).double()
    ),
    "a triple in each sample": lambda net, x, y, yt, w, k, z: F.triplet_margin_loss(*net(x).unbind(1)),
    "triples through the network one by one": lambda net, x, y, yt, w, k, z: F.triplet_margin_loss(
        net(x[:, 0]), net(x[:, 1]), net(x[:, 2])
    ),
    "triples through the network at once": lambda net, x, y, yt, w, k, z: F.triplet_margin_loss(
        *net(torch.cat([x[:, 0], x[:, 1], x[:, 2]])).chunk(3)
    ),
    "a pair in each sample, ranked": lambda net, x, y, yt, w, k, z: F.margin_ranking_loss(
        net(x)[:, 0, 0], net(x)[:, 1, 0], torch.sign(w - 0.6)
    ),
    "classes put into constants that were cast": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(x).mean(1), torch.zeros(len(y), C).double().scatter_(1, y[:, None], 1.0)
    ),
    "classes put into constants out of place": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(x).mean(1), torch.zeros(len(y), C).double().scatter(1, y[:, None], 1.0)
    ),
    "smoothed classes put into a clone": lambda net, x, y, yt, w, k, z: (
        lambda p: F.kl_div(p, p.data.clone().fill_(0.05).scatter_(1, y[:, None], 0.9), reduction="batchmean")
    )(net(x).mean(1).log_softmax(1)),
    "the two likeliest classes": lambda net, x, y, yt, w, k, z: F.binary_cross_entropy_with_logits(
        net(x).mean(1), torch.zeros(len(x), C).double().scatter_(1, z.topk(2, 1).indices, 1.0)
    ),
    "outputs put into constants, time first": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        filled(torch.zeros(T, len(x), C).double(), [(t, net(x[:, t])) for t in range(T)]).view(-1, C), yt.t().flatten()
    ),
    "a head for each class": lambda net, x, y, yt, w, k, z: (
        lambda h: F.cross_entropy(
            filled(torch.zeros(len(x), C).to(h), [(y == c, net(h[y == c]) * (c + 1)) for c in range(C)]), y
        )
    )(torch.cat([net(x).mean(1), w[:, None]], 1)),
    "experts whose outputs are added to their samples": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        torch.zeros(len(x), C).double().index_add_(0, (s := (w > 0.6).nonzero()[:, 0]), net(x[s]).mean(1)), y
    ),
    "columns put into constants": lambda net, x, y, yt, w, k, z: F.mse_loss(
        net(x).mean(1), torch.zeros(len(x), C).double().index_copy_(1, torch.tensor([0, 2]), z[:, :2])
    ),
    "a copy": lambda net, x, y, yt, w, k, z: F.mse_loss(net(x)[:, 0, 0], torch.zeros(len(x)).double().copy_(w)),
    "turned round by reversed": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(reversed(x)).mean(1), torch.stack(list(reversed(y)))
    ),
    "turned by half": lambda net, x, y, yt, w, k, z: F.mse_loss(
        net(torch.fft.fftshift(x, dim=0)).mean(1), torch.fft.fftshift(z, dim=0)
    ),
    "weights of classes put into constants": lambda net, x, y, yt, w, k, z: (
        losses(net, x, y) * torch.ones(C).double().scatter_(0, torch.tensor([1]), 2.0)[y]
    ).mean(),
    "rows of soft targets over their mask": lambda net, x, y, yt, w, k, z: (
        F.kl_div(
            net(x).log_softmax(-1).view(-1, C), (x[..., :C].softmax(-1) * k[..., None]).view(-1, C), reduction="sum"
        )
        / k.flatten().sum()
    ),
    "tokens first, beside their mask": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(x.transpose(0, 1) * k.t()[..., None]).flatten(0, 1), yt.t().flatten()
    ),
    "chosen by their losses": lambda net, x, y, yt, w, k, z: (
        lambda sure: F.cross_entropy(net(x).mean(1)[sure], y[sure])
    )(unfollowed(net, x, y) < 1.2),
    "a mask as the inputs are": lambda net, x, y, yt, w, k, z: over_its_own_sum(tokens(net, x, yt), (k > 0).to(x)),
    "constants spread over the batch": lambda net, x, y, yt, w, k, z: (
        lambda ce: (ce * ALPHA.repeat(len(x), 1) * ALPHA[None].expand_as(ce)).mean()
    )(tokens(net, x, yt)),
    "weights of the classes in each row": lambda net, x, y, yt, w, k, z: (
        losses(net, x, y) * ALPHA.repeat(len(y), 1).gather(1, y[:, None])[:, 0]
    ).mean(),
    "sparse features": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(torch.sparse.mm(x[:, 0].to_sparse(), torch.eye(D).double())), y
    ),
    "a graph of the batch": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(torch.sparse.mm(torch.sparse_coo_tensor(torch.arange(len(x)).repeat(2, 1), w, (len(x),) * 2), x[:, 0])), y
    ),
    "bags in a nested tensor": lambda net, x, y, yt, w, k, z: (
        lambda bags: F.cross_entropy(net(torch.stack([bag.mean(0) for bag in bags.unbind()])), y)
    )(torch.nested.as_nested_tensor([bag[: 1 + int(n)] for bag, n in zip(x, k.sum(1), strict=True)])),
    "targets of a teacher with BatchNorm": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(x.mean(1)), F.batch_norm(F.linear(x.mean(1), net[0].weight), None, None, training=True).detach().argmax(1)
    ),
    "spectra": lambda net, x, y, yt, w, k, z: F.l1_loss(
        net(x).mean(1), torch.stft(x.flatten(1), 8, window=ALPHA.repeat(3)[:N], return_complex=True).abs()[:, 0, :C]
    ),
    "weights of classes, looked up by what a teacher says": lambda net, x, y, yt, w, k, z: (
        lambda said: (F.cross_entropy(net(x + 0.1).mean(1), said, reduction="none") * ALPHA[said]).mean()
    )(net(x).mean(1).detach().max(1).indices),
    "weights of classes, gathered": lambda net, x, y, yt, w, k, z: (
        lambda alpha: (alpha * losses(net, x, y)).sum() / alpha.sum()
    )(ALPHA.gather(0, y.data.view(-1))),
    "targets scattered sample by sample": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(x).mean(1), torch.stack([torch.zeros(C).double().scatter(0, of[None], 1.0) for of in y])
    ),
    "counts of each sample": lambda net, x, y, yt, w, k, z: F.mse_loss(
        net(x).mean(1), torch.stack([torch.zeros(C).double().index_add(0, of, m) for of, m in zip(yt, k, strict=True)])
    ),
    "targets put by numbers": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(x).mean(1), torch.zeros(len(x), C).double().index_put((torch.arange(len(x)), y), torch.ones(()).double())
    ),
    "targets drawn one after the other": lambda net, x, y, yt, w, k, z: F.mse_loss(net(x).mean(1), drawn(x)),
    "a deep copy in another order": lambda net, x, y, yt, w, k, z: ce(net, *copy.deepcopy([x.flip(0), y.flip(0)])),
    "a masked autoencoder": lambda net, x, y, yt, w, k, z: F.mse_loss(
        torch.cat([net(x)[:, :2], net[0].bias.expand(len(x), 1, C)], 1).gather(
            1, x[..., 0].argsort(1)[..., None].expand(-1, -1, C)
        ),
        torch.from_numpy(x[..., :C].numpy().copy()),
    ),
    "the best of several": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt).min(dim=1).values * w).sum() / w.sum(),
    "the better of two": lambda net, x, y, yt, w, k, z: torch.min(losses(net, x, y), tokens(net, x, yt).amax(1)).mean(),
    "parts of one forward pass": lambda net, x, y, yt, w, k, z: fixmatch(net, torch.cat([x, x + 0.1, 2 * x])),
    "logits and targets, some of them ignored": lambda net, x, y, yt, w, k, z: (
        lambda logits, target: {
            "loss": -(logits.log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0][target >= 0]).mean(),
            "logits": logits,
            "targets": target,
        }
    )(net(x).mean(1), torch.where(w > 0.5, y, -100)),
    "an ensemble by vmap": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        torch.vmap(lambda factor: net(factor * x).mean(1))(ALPHA).mean(0), y
    ),
    "weights of classes, normalised": lambda net, x, y, yt, w, k, z: (
        F.binary_cross_entropy_with_logits(net(x).mean(1), z, reduction="none") * (ALPHA / ALPHA.mean())
    ).mean(),
    "weights of the classes, normalised and looked up": lambda net, x, y, yt, w, k, z: (
        losses(net, x, y) * (ALPHA / ALPHA.sum())[y]
    ).mean(),
    "weights of tokens, normalised": lambda net, x, y, yt, w, k, z: (
        (tokens(net, x, yt) * (ALPHA / ALPHA.sum())).sum(1).mean()
    ),
    "weights of a mean of 1": lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.sum() * len(w))).mean(),
    "sure samples, by detached losses": lambda net, x, y, yt, w, k, z: (
        lambda ce, sure: (sure * ce).sum() / sure.sum()
    )(ce := losses(net, x, y), torch.exp(-ce.detach())),
    "selected weights": lambda net, x, y, yt, w, k, z: (
        (losses(net, x, y)[w > 0.6] * w[w > 0.6]).sum() / w[w > 0.6].sum()
    ),
    "a count that is logged": lambda net, x, y, yt, w, k, z: (
        F.cross_entropy(net(x).mean(1), y, reduction="sum") / (len(x) if (w > 0).sum().item() == len(x) else 1)
    ),
    "a mean that is logged": lambda net, x, y, yt, w, k, z: (
        ce(net, x, y) / (1 if (w > 0).double().mean().item() == 1 else 2)
    ),
    "normalised weights": lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.sum())).sum(),
    "normalised in place": lambda net, x, y, yt, w, k, z: (losses(net, x, y) * w.clone().div_(w.sum())).sum(),
    "normalised masks of tokens": lambda net, x, y, yt, w, k, z: (k / k.sum() * tokens(net, x, yt)).sum(),
    "weighted after a division": lambda net, x, y, yt, w, k, z: (losses(net, x, y) / w.sum() * w).sum(),
    "losses over their number": lambda net, x, y, yt, w, k, z: (2 * losses(net, x, y) / len(x)).sum(),
    "over a tensor of their number": lambda net, x, y, yt, w, k, z: losses(net, x, y).sum() / torch.tensor(len(x)),
    "times a reciprocal": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() * (1 / k.sum()),
    "to a negative power": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() * k.sum() ** -1,
    "over what is not 0": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / torch.count_nonzero(k),
    "over a number that was read": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().item(),
    "over a guarded number": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / max(int(k.sum()), 1),
    "a product with weights": lambda net, x, y, yt, w, k, z: losses(net, x, y) @ w / w.sum(),
    "weights in a product": lambda net, x, y, yt, w, k, z: torch.dot(w, losses(net, x, y)) / len(x),
    "a guard in place": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().clamp_(min=1),
    "over the mean of weights": lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.mean())).mean(),
    "sure of a sample": (
        lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (sure(net, x) / sure(net, x).mean())).mean()
    ),
    "weights made without gradients": lambda net, x, y, yt, w, k, z: (lambda ce: (without_gradient(ce) * ce).mean())(
        losses(net, x, y)
    ),
    "a mask as the losses are": lambda net, x, y, yt, w, k, z: (
        lambda ce: (ce * (k > 0).type_as(ce)).sum() / (k > 0).to(ce).sum()
    )(tokens(net, x, yt)),
    "weights as the loss is": lambda net, x, y, yt, w, k, z: (lambda ce: (ce * w.float().to(ce.mean())).mean())(
        losses(net, x, y)
    ),
    "similarities of a sample with itself": lambda net, x, y, yt, w, k, z: F.binary_cross_entropy_with_logits(
        (net(x).mean(1) @ net(x)[:, 0].t()).diagonal(), w
    ),
    "distilled tokens": lambda net, x, y, yt, w, k, z: F.kl_div(
        net(x).log_softmax(-1).view(-1, C), x[..., :C].softmax(-1).view(-1, C), reduction="batchmean"
    ),
    "distilled in another order": lambda net, x, y, yt, w, k, z: F.kl_div(
        net(x.flip(0)).mean(1).log_softmax(-1), x.flip(0).mean(1)[:, :C].softmax(-1), reduction="batchmean"
    ),
    "masked inputs over the mean of the mask": lambda net, x, y, yt, w, k, z: (
        F.mse_loss(net(x)[..., 0] * k, yt.double() * k) / k.mean()
    ),
    "weights of the classes, looked up": lambda net, x, y, yt, w, k, z: (ALPHA[y] * losses(net, x, y)).mean(),
    "gathered": lambda net, x, y, yt, w, k, z: (ALPHA.gather(0, y) * losses(net, x, y)).mean(),
    "looked up in rows": lambda net, x, y, yt, w, k, z: (
        ROWS.gather(1, y[:, None]).squeeze(1) * losses(net, x, y)
    ).mean(),
    "of tokens": lambda net, x, y, yt, w, k, z: (ALPHA[yt] * tokens(net, x, yt)).mean(),
    "over their sum": lambda net, x, y, yt, w, k, z: over_its_own_sum(losses(net, x, y), ALPHA[y]),
    "a sum of a sample's tokens over all of them": lambda net, x, y, yt, w, k, z: (
        (losses(net, x, y) * k.sum(1)).sum() / k.sum()
    ),
    "a mean of them": lambda net, x, y, yt, w, k, z: (losses(net, x, y) * k.mean(1)).mean() / k.mean(),
    "padding up to the longest": lambda net, x, y, yt, w, k, z: over_its_own_sum(
        tokens(net, x, yt), padding(k.long().sum(1).clamp(min=1))
    ),
    "sorted by length": lambda net, x, y, yt, w, k, z: (
        lambda length, order: over_its_own_sum(tokens(net, x[order], yt[order]), padding(length[order]))
    )(k.long().sum(1), k.sum(1).argsort(descending=True)),
    **{
        f"sorted by weight, {name}": lambda net, x, y, yt, w, k, z, of=of: (
            lambda order: of(losses(net, x[order], y[order]), w[order] > 0.5).mean()
        )(w.argsort(descending=True))
        for name, of in {
            "selected by a mask": lambda losses, mask: losses[mask],
            "selected by name": lambda losses, mask: losses.masked_select(mask),
        }.items()
    },
    "means of each sequence": lambda net, x, y, yt, w, k, z: (
        F.cross_entropy(net(x).flatten(0, 1), yt.flatten(), reduction="none").view(len(x), T).mean(1).mean()
    ),
    "masked means of each sequence": lambda net, x, y, yt, w, k, z: (
        lambda ls: ((ls * k).sum(1) / (k.sum(1) + 1)).mean()
    )(F.cross_entropy(net(x).flatten(0, 1), yt.flatten(), reduction="none").view(len(x), T)),
    "sorted by what stands beside something else": lambda net, x, y, yt, w, k, z: (
        lambda order: ce(net, x[order], y[order])
    )(torch.stack([w.argsort(), y], 1)[:, 0]),
    "classes put into rows": lambda net, x, y, yt, w, k, z: (
        losses(net, x, y) * (torch.zeros(len(y), C, dtype=torch.float64).scatter_(1, y[:, None], 1.0) * ALPHA).sum(1)
    ).mean(),
    "functions of each row": lambda net, x, y, yt, w, k, z: (
        losses(net, x, y) * torch.linalg.vector_norm(x.flatten(1), dim=1) * torch.erf(w)
    ).mean(),
    "over a guarded sum": lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / (k.sum().clamp(min=1) + 1e-8),
    "logits changed afterwards": lambda net, x, y, yt, w, k, z: (lambda out: zeroed(out, F.cross_entropy(out, y)))(
        net(x).mean(1)
    ),
    "logits changed afterwards, without history": lambda net, x, y, yt, w, k, z: (
        lambda out: zeroed(out.detach(), F.cross_entropy(out, y))
    )(net(x).mean(1)),
    "labels changed afterwards": lambda net, x, y, yt, w, k, z: (
        lambda labels: zeroed(labels, tokens(net, x, labels.clone()).mean())
    )(yt.clone()),
    "losses changed afterwards": lambda net, x, y, yt, w, k, z: (
        lambda values: zeroed(values, (values * k).sum() / k.sum())
    )(tokens(net, x, yt)),
    "mask changed afterwards": lambda net, x, y, yt, w, k, z: (
        lambda mask: zeroed(mask, (tokens(net, x, yt) * mask.clone()).sum() / mask.sum())
    )(k.clone()),
    "looked up and sorted": lambda net, x, y, yt, w, k, z: (
        ALPHA[y[w.argsort()]] * losses(net, x[w.argsort()], y[w.argsort()])
    ).mean(),
    "focal": lambda net, x, y, yt, w, k, z: (lambda ce: (ALPHA[y] * (1 - torch.exp(-ce)).square() * ce).mean())(
        losses(net, x, y)
    ),
    "large losses alone": lambda net, x, y, yt, w, k, z: (lambda ce: over_its_own_sum(ce, ce > 0.9))(losses(net, x, y)),
    "crops in another order after the network": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        crops(net, x), torch.tensor(y.tolist() * T)
    ),
    **{
        f"sums {name}": lambda net, x, y, yt, w, k, z, of=of: of((losses(net, x, y) * w).sum(), w.sum())
        for name, of in {
            "of sums": lambda loss, total: loss.sum() / total.sum(),
            "added to 0": lambda loss, total: (torch.tensor(0.0) + loss) / (torch.tensor(0.0) + total),
            "added to 0 in place": lambda loss, total: (
                torch.zeros_like(loss).add_(loss) / torch.zeros_like(total).add_(total)
            ),
            "by the name of a state": lambda loss, total: of_states(loss, total),
            "of several": lambda loss, total: (torch.zeros(2).double().add_(total), loss / total)[1],
            "that are not 0": lambda loss, total: loss / torch.where(total == 0, torch.ones_like(total), total),
        }.items()
    },
    **{
        f"inputs {name}, beside targets of a list": lambda net, x, y, yt, w, k, z, of=of: F.cross_entropy(
            net(of(x)).mean(1), torch.tensor(y.tolist())
        )
        for name, of in {
            "that are flipped": lambda x: torch.where(torch.rand(len(x), 1, 1) < 0, x, x.flip(-1)),
            "that are rolled": lambda x: x.roll(1, -1),
            "that are turned": lambda x: x.rot90(2, (1, 2)),
            "whose numbers are shuffled": lambda x: x[..., torch.arange(D).flip(0)],
            "whose tokens are shuffled": lambda x: x[:, torch.arange(T).flip(0)],
            "whose tokens are chosen": lambda x: x.index_select(1, torch.tensor([2, 0])),
            "whose tokens are sorted": lambda x: x.gather(1, x[..., :1].argsort(1).expand_as(x)),
            "repeated": lambda x: x.repeat(1, 2, 1),
            "joined of halves": lambda x: torch.cat([x[:3], x[3:]]),
            "taken one by one": lambda x: torch.stack(list(x)),
        }.items()
    },
    "operands by keyword": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        F.linear(weight=net[2].weight, input=net[:2](x).mean(1)), y
    ),
    **{
        f"logits changed after their loss by {name}": lambda net, x, y, yt, w, k, z, change=change: (
            lambda h: (F.cross_entropy(h, y), change(h))[0]
        )(net(x).mean(1))
        for name, change in {
            "a function": torch.relu_,
            "a function that is told to": lambda h: F.leaky_relu(h, inplace=True),
        }.items()
    },
    **{
        f"transcripts, {name}": lambda net, x, y, yt, w, k, z, loss=loss: transcribed(net, x, yt, loss)
        for name, loss in {
            "their mean": lambda *given: F.ctc_loss(*given),
            "a sum over samples": lambda *given: F.ctc_loss(*given, reduction="sum") / len(given[-1]),
            "a sum over labels": lambda *given: F.ctc_loss(*given, reduction="sum") / given[-1].sum(),
            "each": lambda *given: F.ctc_loss(*given, reduction="none", zero_infinity=True).mean(),
            "one after the other": lambda logits, labels, steps, lengths: F.ctc_loss(
                logits, torch.cat([row[:n] for row, n in zip(labels, lengths, strict=True)]), steps, lengths
            ),
            "lengths as numbers": lambda logits, labels, steps, lengths: torch.nn.CTCLoss()(
                logits, labels, steps.tolist(), lengths.tolist()
            ),
        }.items()
    },
    "which of three views it is": lambda net, x, y, yt, w, k, z: F.cross_entropy(
        net(torch.cat([x, -x, 2 * x])).mean(1), torch.arange(C).repeat_interleave(len(x))
    ),
    "a mask written into a view": lambda net, x, y, yt, w, k, z: F.mse_loss(
        net(x).mean(1)[:, 0], masked_view(net(x).detach().mean(1), y, w > 0.7)
    ),
    "a view written to, and what it is of": lambda net, x, y, yt, w, k, z: (
        lambda h: (written_view(h, w), F.mse_loss(net(x).mean(1)[:, 0], h[:, 0]))[1]
    )(net(x).detach().mean(1)),
    "parameters of as many rows as samples": lambda net, x, y, yt, w, k, z: (
        lambda rows: F.cross_entropy(x.mean(1) @ rows.T @ F.normalize(rows, dim=0)[:, :C], y)
    )(net[0].weight.repeat(3, 1)[:N]),
    "weights of each sample, one by one": lambda net, x, y, yt, w, k, z: (
        lambda h: (F.cross_entropy(h, y, reduction="none") * torch.stack([row.sigmoid().mean() for row in h])).mean()
    )(net(x).mean(1)),
    "weights of networks of one sample each": lambda net, x, y, yt, w, k, z: (
        lambda h: (F.cross_entropy(h, y, reduction="none") * h.norm(dim=1)).mean()
    )(torch.stack([net(each[: 1 + int(c)]).mean(0) for each, c in zip(x, y, strict=True)])),
    "weights of pooled steps, time first": lambda net, x, y, yt, w, k, z: (
        lambda h: (F.cross_entropy(h, y, reduction="none") * h.norm(dim=1)).mean()
    )(net(x.transpose(0, 1)).mean(0)),
    "weights of each sample that are trained": lambda net, x, y, yt, w, k, z: (
        lambda h: (F.cross_entropy(h, y, reduction="none") * h.sigmoid().mean(1) / h.norm(dim=1)).mean()
    )(net(x).mean(1)),
    "stated beside a loss": lambda net, x, y, yt, w, k, z: stated(tokens(net, x, yt).max(1).values),
    "stated with more than the loss": lambda net, x, y, yt, w, k, z: stated(
        tokens(net, x, yt).mean(1) + 1 - (net(x).softmax(-1) * F.one_hot(yt, C)).mean((1, 2))
    ),
}
UNDIVIDED, OF_BATCH, BENT = "by what it runs over", "made of the whole batch", "to be linear"
NOT_FOLLOWED, MIXED = "cannot be followed", "mixes samples"
REFUSED: dict[str, tuple[str, Step]] = {
    "each class by itself, with constant labels": (
        NOT_FOLLOWED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            torch.cat([net(x[y == c]).mean(1) for c in range(C)]),
            torch.cat([torch.full(((y == c).sum(),), c) for c in range(C)]),
        ),
    ),
    **{
        f"by a number that is trained, {name}": (OF_BATCH, lambda net, x, y, yt, w, k, z, of=of: scaled(net, x, z, of))
        for name, of in {
            "their own sum": lambda losses, h: losses / losses.sum().sqrt(),
            "a focal sum": lambda losses, h: losses / ((1 - (-losses).exp()) ** 2).sum().clamp_min(1e-6),
            "in place": lambda losses, h: losses.div_(h.sigmoid().sum()),
            "of classes": lambda losses, h: losses * h.sigmoid().mean(0),
            "a maximum": lambda losses, h: losses * h.sigmoid().amax(0),
            "a norm": lambda losses, h: losses / h.norm(),
            "a deviation": lambda losses, h: losses / h.std(0),
            "over the batch": lambda losses, h: losses * h.softmax(0),
            "a power": lambda losses, h: losses ** h.sigmoid().mean(),
            "added": lambda losses, h: losses + h.sigmoid().mean(),
            "of the mean": lambda losses, h: losses.mean() * h.sigmoid().mean(),
            "of another task": lambda losses, h: losses.mean() / (1 + F.mse_loss(h, h.detach() + 1)),
        }.items()
    },
    "some samples beside some of a memory": (
        NOT_FOLLOWED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            torch.cat([net(x[:5]).mean(1), net(torch.zeros(len(x) - 5, T, D).double()).mean(1)]),
            torch.cat([y[:5], torch.zeros(len(x) - 5).long()]),
        ),
    ),
    "negatives of the next sample": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (lambda h: F.triplet_margin_loss(h, net(x)[:, 0], h.roll(1, 0)))(net(x)[:, 1]),
    ),
    "positives by an index": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (
            lambda h: F.triplet_margin_loss(h, h[(torch.arange(len(h)) + 1) % len(h)], net(x)[:, 1])
        )(net(x)[:, 0]),
    ),
    "one half ranked against the other": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (
            lambda h, n: F.margin_ranking_loss(h[:n], h[n : 2 * n], torch.ones(n).double())
        )(net(x).mean((1, 2)), len(x) // 2),
    ),
    **{
        f"put elsewhere by {name}": (NOT_FOLLOWED, lambda net, x, y, yt, w, k, z, how=how: put(net, x, y, w, how))
        for name, how in {
            "index_copy": lambda x, rank: torch.zeros_like(x).index_copy(0, rank, x),
            "index_put": lambda x, rank: torch.zeros_like(x).index_put((rank,), x),
            "index_add": lambda x, rank: torch.zeros_like(x).index_add(0, rank, x),
            "keywords": lambda x, rank: torch.index_add(input=torch.zeros_like(x), dim=0, index=rank, source=x),
            "scatter": lambda x, rank: torch.zeros_like(x).scatter(0, spread(rank, x), x),
            "scatter_add": lambda x, rank: torch.scatter_add(torch.zeros_like(x), 0, spread(rank, x), x),
            "scatter_reduce": lambda x, rank: torch.zeros_like(x).scatter_reduce(0, spread(rank, x), x, "sum"),
            "put": lambda x, rank: torch.zeros_like(x).put(
                spread(rank, x) * x[0].numel() + torch.arange(x[0].numel()).view(x[0].shape), x
            ),
            "slice_scatter": lambda x, rank: torch.slice_scatter(x, x[1:], 0, 0, len(x) - 1),
            "select_scatter": lambda x, rank: torch.select_scatter(x, x[1], 0, 0),
            "masked_scatter": lambda x, rank: torch.zeros_like(x).masked_scatter(torch.tensor(True), x.flip(0)),
            "index_copy_": lambda x, rank: torch.zeros_like(x).index_copy_(0, rank, x),
            "index_put_": lambda x, rank: torch.zeros_like(x).index_put_((rank,), x),
            "index_add_": lambda x, rank: torch.zeros_like(x).index_add_(0, rank, x),
            "scatter_": lambda x, rank: torch.zeros_like(x).scatter_(0, spread(rank, x), x),
            "put_ into what was cast": lambda x, rank: torch.zeros_like(x).to(x.dtype).index_copy_(0, rank, x),
        }.items()
    },
    "put elsewhere, beside a target of unknown origin": (
        NOT_FOLLOWED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(torch.zeros_like(x).index_copy(0, w.argsort().argsort(), x)).mean(1),
            torch.from_numpy(y[w.argsort()].numpy().copy()),
        ),
    ),
    "two views put elsewhere": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (
            lambda order, both: F.cross_entropy(
                net(filled(torch.zeros_like(both), [(order, both)])).mean(1),
                filled(torch.zeros(2 * len(x)).long(), [(order, torch.cat([y, y]))]),
            )
        )(torch.cat([w, x[:, 0, 0]]).argsort(), torch.cat([x, x])),
    ),
    "sorted values put into constants": (
        NOT_FOLLOWED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x).mean(1), torch.zeros(len(y), C).double().scatter_(1, y.sort().values[:, None], 1.0)
        ),
    ),
    "sorted values beside those of the samples": (
        NOT_FOLLOWED, lambda net, x, y, yt, w, k, z: F.mse_loss(net(x)[:, 0, 0], w.sort().values)
    ),
    "over how many sums are not 0": (
        UNDIVIDED,
        lambda net, x, y, yt, w, k, z: (losses(net, x, y) * w).sum() / w.sum().count_nonzero(),
    ),
    "weights over their maximum, by a view": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            losses(net, x, y) * through_a_view(w.clone(), lambda v: v.div_(v.max()))
        ).mean(),
    ),
    "losses times their maximum, by a view": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            lambda ce: through_a_view(ce, lambda v: v.mul_(ce.detach().max())).mean()
        )(1 * losses(net, x, y)),
    ),
    **{
        f"nodes put into {what}": (
            NOT_FOLLOWED,
            lambda net, x, y, yt, w, k, z, place=place: F.cross_entropy(
                torch.zeros(len(x), C).double().index_add(0, place(w).repeat_interleave(T), net(x).flatten(0, 1)),
                torch.tensor([y.tolist()[i] for i in place(w).argsort().tolist()]),
            ),
        )
        for what, place in {
            "a sorted order": lambda w: w.argsort().argsort(),
            "an order filled by hand": lambda w: filled(
                torch.zeros(len(w)).long(), [(w.argsort(), torch.arange(len(w)))]
            ),
            "an order made in Python": lambda w: torch.tensor(w.argsort().tolist()),
        }.items()
    },
    "rows of others written into a view": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (
            lambda h: (written_view(h, w.flip(0)), F.mse_loss(net(x).mean(1)[:, 0], h[:, 0]))[1]
        )(x.mean(1).clone()),
    ),
    "less the first sample's, in place": (
        MIXED, lambda net, x, y, yt, w, k, z: F.mse_loss(net(x)[:, 0, :1], w[:, None].clone().sub_(w[:1, None]))
    ),
    "the least of a list": (
        NOT_FOLLOWED, lambda net, x, y, yt, w, k, z: torch.stack(sorted(losses(net, x, y))[:3]).mean()
    ),
    "a mean over samples, of as many numbers": (
        MIXED, lambda net, x, y, yt, w, k, z: F.mse_loss(net(x)[:, 0].repeat(1, N)[:, :N].mean(0), torch.zeros(N))
    ),
    "weighed by how many are of the class": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (losses(net, x, y) / (y[:, None] == y[None]).sum(1)).mean()
    ),
    "hardest negatives beside the positives": (
        "made of the whole batch|by what it runs over",
        lambda net, x, y, yt, w, k, z: (
            lambda ce, chosen: ce[chosen].sum() / (y > 1).sum()
        )(ce := losses(net, x, y), (y > 1) | (ce.detach().argsort(descending=True).argsort() < 3)),
    ),
    "tokens compared with tokens": (
        MIXED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            torch.einsum("bsd,ctd->bcst", net(x), net(x + 1)).amax(-1).sum(-1), torch.arange(len(x))
        ),
    ),
    "tokens compared with tokens, by a product": (
        MIXED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            (net(x)[:, None] @ net(x + 1)[None].mT).amax(-1).sum(-1), torch.arange(len(x))
        ),
    ),
    "tokens compared with samples": (
        MIXED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            torch.matmul(net(x), net(x).mean(1).t()).mean(1), torch.arange(len(x))
        ),
    ),
    "samples compared at each place": (
        MIXED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            torch.bmm(net(x).transpose(0, 1), net(x).transpose(0, 1).mT).flatten(0, 1), torch.arange(len(x)).repeat(T)
        ),
    ),
    "cosines of all pairs": (
        MIXED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            F.cosine_similarity(net(x)[:, 0, :, None], net(x)[:, 1, :, None].transpose(0, 2)), torch.arange(len(x))
        ),
    ),
    "pairs put together": (MIXED, lambda net, x, y, yt, w, k, z: compared(net(x).mean(1), joined)),
    "pairs in a list": (MIXED, lambda net, x, y, yt, w, k, z: compared(net(x).mean(1), listed)),
    "hardest in a row of distances": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (
            lambda d: F.margin_ranking_loss(
                torch.stack([row[y != c].min() for row, c in zip(d, y, strict=True)]), d.mean(1), torch.ones(len(x))
            )
        )(torch.cdist(net(x).mean(1), net(x).mean(1))),
    ),
    "matched and shuffled pairs": (
        MIXED,
        lambda net, x, y, yt, w, k, z: (
            lambda a, b: F.binary_cross_entropy_with_logits(
                torch.cat([(a * b).sum(1), (a * b[ORDER[: len(x)]]).sum(1)]), torch.ones(2 * len(x)).double()
            )
        )(net(x).mean(1), net(x)[:, 0]),
    ),
    "two orders of one output": (
        MIXED, lambda net, x, y, yt, w, k, z: (lambda z: F.mse_loss(z[ORDER], z[ORDER.flip(0)]))(net(x).mean(1))
    ),
    "another loss added to divided ones": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: (losses(net, x, y) / len(x) + tokens(net, x, yt).mean(1)).sum()
    ),
    "two normalised parts": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            losses(net, x, y) * (w / w.sum()) + tokens(net, x, yt).mean(1) * (k.sum(1) / k.sum())
        ).sum(),
    ),
    "a clamp of weighted losses": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.mean())).clamp(max=1.2).mean()
    ),
    "weights above the least, in place": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            losses(net, x, y) * (lambda v: v.div_(v.sum()))(w - w.min())
        ).sum(),
    ),
    "weights over two sums, in place": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.sum()).div_(k.sum())).sum()
    ),
    "a sum times a mean, in place": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().mul_(w.mean())
    ),
    "a mean of other samples": (
        NOT_FOLLOWED, lambda net, x, y, yt, w, k, z: ((torch.eye(N).double() + 0.1) @ losses(net, x, y)).mean()
    ),
    "a count of a balanced mask": (
        UNDIVIDED,
        lambda net, x, y, yt, w, k, z: (losses(net, x, y) * HALF).sum() / (len(x) - HALF.sum()),
    ),
    "a mean of weights before the loss": (OF_BATCH, lambda net, x, y, yt, w, k, z: w.mean() * ce(net, x, y)),
    "a count before the loss": (OF_BATCH, lambda net, x, y, yt, w, k, z: torch.mul(k.sum(), ce(net, x, y))),
    "a mean over samples with as many rows as they like, over a mean of theirs": (
        "made of the whole batch|by what it runs over",
        lambda net, x, y, yt, w, k, z: (
            lambda rows: losses(net, x[rows], y[rows]).mean() / w.mean()
        )(torch.arange(len(x)).repeat_interleave(1 + (k[:, 0] > 0) + 2 * (k[:, 1] > 0))),
    ),
    "over the lengths of all, of half of the samples": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: summed(net(x[:4]).flatten(0, 1), yt[:4].flatten()) / w.sum()
    ),
    "a changed sum": (UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().add_(1)),
    "a root of a sum": (UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().sqrt_()),
    "another mask": (
        UNDIVIDED,
        lambda net, x, y, yt, w, k, z: (
            lambda mask, count: (tokens(net, x, yt) * mask.fill_(1)).sum() / count
        )(mask := k.clone(), mask.sum()),
    ),
    "a count that was read": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / (k.sum().item() + 1)
    ),
    "normalised twice": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.sum()) * (x.sum((1, 2)) / x.sum())).sum()
    ),
    "a mean of normalised weights": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (losses(net, x, y) * (w / w.sum())).mean()
    ),
    "over the length of sequences that come first": (
        UNDIVIDED,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x.transpose(0, 1)).transpose(1, 2), yt.t(), reduction="sum"
        ) / T,
    ),
    "unreduced, weights of the batch's classes": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x).mean(1), y, weight=1 / (torch.bincount(y, minlength=C) + 1.0).double(), reduction="none"
        ).mean(),
    ),
    "unreduced, samples by a threshold": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: losses(net, x[w > w.mean()], y[w > w.mean()]).mean()
    ),
    "unreduced, standardised targets": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: F.mse_loss(
            net(x).mean(1)[:, 0], (w - w.mean()) / w.std(), reduction="none"
        ).mean(),
    ),
    "selected rows over all": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: ce(net, x[w > 0.6], y[w > 0.6], "sum") / len(x)
    ),
    "selected tokens over all samples": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: F.cross_entropy(net(x)[k > 0], yt[k > 0], reduction="sum") / len(x)
    ),
    "over a variance": (OF_BATCH, lambda net, x, y, yt, w, k, z: ce(net, x, y) / w.var()),
    "by a share": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: ce(net, x[w > 0.6], y[w > 0.6]) * (w > 0.6).double().mean()
    ),
    "weights of the batch's classes": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x).mean(1), y, weight=1 / (torch.bincount(y, minlength=C) + 1.0).double()
        ),
    ),
    "over the largest loss": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (lambda ce: (ce / ce.detach().max()).mean())(losses(net, x, y))
    ),
    "the smallest losses by their rank": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda ids: ce(net, x[ids], y[ids]))(losses(net, x, y).argsort()[:4]),
    ),
    **{
        f"sorted samples, {name}": (
            OF_BATCH,
            lambda net, x, y, yt, w, k, z, of=of: (
                lambda order: (lambda ce: ce[of(w, w[order])].mean())(losses(net, x[order], y[order]))
            )(w.argsort()),
        )
        for name, of in {
            "the first of a mask": lambda w, own: (own > 0.3) & (torch.arange(len(w)) < 6),
            "a mask by halves": lambda w, own: torch.where(torch.arange(len(w)) < 4, own > 0.3, own > 9),
            "a mask that is cut": lambda w, own: (lambda m: (m.__setitem__(slice(4, None), False), m)[1])(own > 0),
            "by what was sorted": lambda w, own: w.sort().values > 0.5,
        }.items()
    },
    "the first ones of sorted samples": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (lambda ids: losses(net, x[ids], y[ids])[:4].mean())(w.argsort())
    ),
    "standardised targets": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: F.mse_loss(net(x).mean(1)[:, 0], (w - w.mean()) / w.std())
    ),
    "balanced tasks": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda a, b: a + a.detach() / b.detach() * b)(
            ce(net, x, y), F.mse_loss(net(x).mean(1), z)
        ),
    ),
    "by the accuracy": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: ce(net, x, y) * (1.5 - (net(x).mean(1).argmax(1) == y).double().mean()),
    ),
    "normalised weights": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (losses(net, x, y) * F.normalize(w, p=1, dim=0)).mean()
    ),
    "largest losses by their places": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda ce: ce[ce.detach().topk(4).indices].mean())(losses(net, x, y)),
    ),
    "from a rank on": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda ce: over_its_own_sum(ce, ce >= ce.detach().kthvalue(2).values))(
            losses(net, x, y)
        ),
    ),
    "from a rank on, sorted, then cast": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            lambda ce: over_its_own_sum(ce, ce.detach() >= ce.sort(descending=True).values.detach()[1])
        )(losses(net, x, y)),
    ),
    "from the middle of a row on": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: over_its_own_sum(
            losses(net, x, y), w >= 0.99 * w.sort().values.clamp(max=9).view(1, -1)[:, N // 2]
        ),
    ),
    "classes counted by unique": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x).mean(1), y, weight=1 / torch.cat([y, torch.arange(C)]).unique(return_counts=True)[1].double()
        ),
    ),
    "classes counted in place": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x).mean(1), y, weight=1 / torch.ones(C).double().scatter_add_(0, y, torch.ones(len(y)).double())
        ),
    ),
    "counts by embedding": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (F.embedding(y, counts(y)[:, None])[:, 0] * losses(net, x, y)).mean()
    ),
    "counts by a product": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: ((F.one_hot(y, C).double() @ counts(y)) * losses(net, x, y)).mean()
    ),
    "over the larger of two": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: ce(net, x, y) / torch.max(w.mean(), torch.tensor(0.01).double())
    ),
    "by keyword": (OF_BATCH, lambda net, x, y, yt, w, k, z: torch.mul(ce(net, x, y), other=w.mean())),
    "tasks by their softmax": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda both: (both.detach().softmax(0) * both).sum())(tasks(net, x, y, z)),
    ),
    "tasks over themselves": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (lambda both: (both / both.data).sum())(tasks(net, x, y, z))
    ),
    "between two tasks": (OF_BATCH, lambda net, x, y, yt, w, k, z: torch.lerp(*tasks(net, x, y, z), w.mean())),
    "over a sum and one": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / (k.sum() + 1)
    ),
    "over a root": (UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().sqrt()),
    "over more than the sum": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / k.sum().clamp(min=99)
    ),
    "over a guard that counts in a group": (
        UNDIVIDED,
        lambda net, x, y, yt, w, k, z: (
            lambda many: (tokens(net, x, yt).repeat(1, 400) * many).sum() / (many.sum() + 2e-3)
        )(k.repeat(1, 400)),
    ),
    "over a number with a guard that counts in a group": (
        UNDIVIDED, lambda net, x, y, yt, w, k, z: (tokens(net, x, yt) * k).sum() / (float(k.sum()) + 1e-3)
    ),
    "image and text": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: F.cross_entropy(net(x).mean(1) @ net(x)[:, 0].t(), torch.arange(len(x))),
    ),
    "distances of pairs": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: F.mse_loss(torch.cdist(net(x).mean(1), net(x).mean(1)), torch.cdist(z, z)),
    ),
    "relative confidence, detached in the end": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            lambda sure: (losses(net, x, y) * (sure / sure.mean()).detach()).mean()
        )(net(x).mean(1).softmax(1).amax(1)),
    ),
    "mixed by a matrix": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda mix: F.cross_entropy(net(mix @ x.mean(1)), mix @ z))(
            0.6 * torch.eye(len(x)).double() + 0.4 * torch.eye(len(x)).double().roll(1, 0)
        ),
    ),
    "mixed by a sparse matrix": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (
            lambda mix: F.cross_entropy(net(torch.sparse.mm(mix, x.mean(1))), torch.sparse.mm(mix, z))
        )(torch.eye(len(x)).double().roll(1, 0).to_sparse()),
    ),
    "put elsewhere by an operation of no kind": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(torch.linalg.solve(torch.eye(len(x)).double().roll(1, 0), x.mean(1))),
            torch.linalg.solve(torch.eye(len(x)).double().roll(1, 0), z),
        ),
    ),
    "samples that are surer than the mean": (
        OF_BATCH,
        lambda net, x, y, yt, w, k, z: (lambda sure: ce(net, x[sure >= sure.mean()], y[sure >= sure.mean()]))(
            net(x).mean(1).softmax(1).amax(1)
        ),
    ),
    "relative losses": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (lambda ce: (ce * (ce / ce.mean()).detach()).mean())(
            losses(net, x, y)
        )
    ),
    "hard negatives beside those of the batch": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            net(x)[:, 0] @ torch.cat([net(x)[:, 1], net(x)[:, 2]]).t(), torch.arange(len(x))
        ),
    ),
    "a hard negative of its own beside those of the batch": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: (
            lambda q, p, n: F.cross_entropy(
                torch.cat([q @ p.t(), (q * n).sum(1, keepdim=True)], 1), torch.arange(len(x))
            )
        )(*net(x).unbind(1)),
    ),
    "similarities by broadcasting": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            F.cosine_similarity(net(x)[:, :1], net(x)[None, :, 1], dim=-1), torch.arange(len(x))
        ),
    ),
    "similarities without a sample's own": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: (
            lambda s: F.cross_entropy(s[~torch.eye(len(s), dtype=torch.bool)].view(len(s), -1), 0 * y)
        )(net(x).mean(1) @ net(x)[:, 0].t()),
    ),
    "mean over the first axis": (
        "along the first axis",
        lambda net, x, y, yt, w, k, z: F.kl_div(
            net(x.transpose(0, 1)).log_softmax(-1), F.one_hot(yt.t(), C).double(), reduction="batchmean"
        ),
    ),
    "clamped": (BENT, lambda net, x, y, yt, w, k, z: ce(net, x, y).clamp(max=9.0)),
    "larger of two": (
        BENT, lambda net, x, y, yt, w, k, z: torch.max(ce(net, x, y), F.mse_loss(net(x).mean(1), z))
    ),
    "chosen by its value": (
        OF_BATCH, lambda net, x, y, yt, w, k, z: (lambda ce: torch.where(ce > 9, 2 * ce, ce))(ce(net, x, y))
    ),
    "worst output": (
        BENT, lambda net, x, y, yt, w, k, z: F.mse_loss(net(x).mean(1), z, reduction="none").mean(0).max()
    ),
    "a column over a row": ("mixes samples", lambda net, x, y, yt, w, k, z: F.mse_loss(net(x).mean(1)[:, :1], w)),
    "losses over weights in a column": (
        "cannot be followed", lambda net, x, y, yt, w, k, z: (losses(net, x, y) * w[:, None]).mean()
    ),
    "all pairs": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: (
            lambda p: F.binary_cross_entropy_with_logits(p[:, None] - p[None], (w[:, None] > w[None]).double())
        )(net(x).mean(1)[:, 0]),
    ),
    "with the next one": (
        "mixes samples",
        lambda net, x, y, yt, w, k, z: (lambda p: F.mse_loss(p, p.roll(1, 0).detach()))(net(x).mean(1)[:, 0]),
    ),
    "stated in another order": (
        "`losses`",
        lambda net, x, y, yt, w, k, z: stated(-net(x[ORDER]).mean(1).log_softmax(1).gather(1, y[ORDER][:, None])[:, 0]),
    ),
    "packed": (
        "cross_entropy",
        lambda net, x, y, yt, w, k, z: F.cross_entropy(
            *(
                pack_padded_sequence(v, torch.full((len(x),), T), batch_first=True, enforce_sorted=False).data
                for v in (net(x.reshape(-1, D)).view(-1, T, C), yt)
            )
        ),
    ),
}  # fmt: skip


ON_THE_CPU = {"sums added to 0", "sums added to 0 in place", "sums by the name of a state"}  # where the 0 is read


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.filterwarnings("ignore:The training step adds a term")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:The PyTorch API of nested tensors")  # of torch
def test_a_group_has_the_loss_that_the_step_returns_for_it(name, device):
    """Of two steps the first looks at everything; on a device the second one reads nothing."""
    if name in ON_THE_CPU and device == "nothing is read":
        with pytest.raises(UntappedLossError, match=UNDIVIDED):
            fit(RIGHT[name])
        return
    same(RIGHT[name])


def joined_views(samples: list[Any]) -> tuple[Tensor, Tensor]:
    """Two views of each sample in one tensor, which has not as many rows as the batch has samples."""
    x, y = (torch.stack(column) for column in zip(*((sample[0], sample[1]) for sample in samples), strict=True))
    return torch.cat([x[:, 0], x[:, 1]]), y


def over_their_maximum(net: Any, views: Tensor, y: Tensor) -> Tensor:
    first, second = net(views).chunk(2)
    weights = second.detach().norm(dim=1)
    return (F.cross_entropy(first, y, reduction="none") * weights / weights.max()).mean()


def matched(net: Any, views: Tensor, y: Tensor) -> Tensor:
    first, second = net(views).chunk(2)
    return F.cross_entropy(first @ second.T, torch.arange(len(y)))


@pytest.mark.parametrize(("said", "step"), [(MIXED, matched), (OF_BATCH, over_their_maximum)])
def test_what_a_network_makes_of_joined_views_is_of_samples(said, step):
    with pytest.raises((RowsError, UntappedLossError), match=said):
        fit(step, TensorDataset(*data()), collate=joined_views)


def test_parts_over_counts_that_are_read_and_happen_to_be_the_same():
    def step(net: Any, x: Tensor, y: Tensor, yt: Tensor, w: Tensor, k: Tensor, z: Tensor, half: Tensor) -> Tensor:
        ones, others, ce = half.sum().item(), (1 - half).sum().item(), losses(net, x, y)
        return (ce * half).sum() / ones + (ce * (1 - half)).sum() / others

    same(step, TensorDataset(*data(), HALF), loss="sum")


def test_a_batch_of_as_many_samples_as_classes_has_their_weights_too():
    def step(net: Any, x: Tensor, y: Tensor, *others: Tensor) -> Tensor:
        return (ALPHA[y] * losses(net, x, y)).mean()

    def trained(**options: Any) -> Tensor:
        model, groups = Model(step), torch.tensor([0, 1, 0, 1, 1, 0, 1])
        dataset = TensorDataset(*(column[: N - 1] for column in data()))
        run = trainer(GroupDRO("g", 2, step_size=0.5, **options))
        run.fit(model, DataLoader(tag(dataset, g=groups), batch_size=N - 1 - C))  # then C
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(trained(), trained(losses="split"), rtol=1e-9, atol=1e-9)


def test_a_first_batch_of_one_class_tells_nothing_of_the_next_ones():
    """Its rows stay where they are, and those of the next ones do not."""

    def step(net: Any, x: Tensor, y: Tensor) -> Tensor:
        scores = net(x).mean((1, 2))
        ones, zeros = scores[y == 1], scores[y == 0]
        labels = torch.cat([torch.ones_like(ones), torch.zeros_like(zeros)])
        return F.binary_cross_entropy_with_logits(torch.cat([ones, zeros]), labels)

    def trained(**options: Any) -> Tensor:
        model, y = Model(step), torch.tensor([0, 0, 0, 0, 0, 1, 1, 0])
        run = trainer(GroupDRO("g", 2, step_size=0.5, **options))
        run.fit(model, DataLoader(tag(TensorDataset(data()[0], y), g=G), batch_size=4))
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    torch.testing.assert_close(trained(), trained(losses="split"), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_what_a_group_would_have_otherwise_is_refused(name):
    said, step = REFUSED[name]
    options = {"loss": "sum"} if "task" in name or name == "larger of two" else {}
    with pytest.raises((UntappedLossError, RowsError, LossNotFoundError), match=said):
        fit(step, **options)


@pytest.mark.parametrize("name", ["over the largest loss", "by a number that is trained, their own sum"])
def test_the_step_of_a_compiled_module_is_looked_at_as_it_is_written(name):
    said, step = REFUSED[name]
    batches = DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N)
    with pytest.raises(UntappedLossError, match=said):
        trainer(GroupDRO("g", 2)).fit(torch.compile(Model(step)), batches)


@pytest.mark.parametrize("least", [1, 1e-2])
def test_a_batch_without_what_its_losses_are_divided_by_trains(least):
    """Such as one without positives: then the guard against 0 divides, for each group as for all."""

    def step(net, x, y, yt, w, k, z):
        return losses(net, x, y).sum() / (y > C).sum().clamp(min=least)

    (_, whole), (_, split) = fit(step), fit(step, losses="split")
    torch.testing.assert_close(whole, split, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("split", [list, lambda x: x.chunk(2)], ids=["sample by sample", "in chunks"])
def test_losses_of_parts_of_a_batch_do_not_add_up(split):
    """Each part has as many rows as the batch has samples, but they are of some of these."""

    def step(net, x, y, yt, w, k, z):
        xs, ys = split(x.repeat(1, 3, 1)), split(yt.repeat(1, 3))
        return sum(F.cross_entropy(net(a).flatten(0, -2), b.flatten()) for a, b in zip(xs, ys, strict=True)) / len(xs)

    with pytest.raises(AmbiguousLossError, match="to be of all 8 samples of the batch"):
        fit(step, loss="sum")
    fit(step, losses="split")


def test_as_many_tokens_as_samples():
    def time_first(net: Any, x: Tensor, y: Tensor, yt: Tensor, w: Tensor, k: Tensor, z: Tensor) -> Tensor:
        of_tokens = F.cross_entropy(net(x.transpose(0, 1)).transpose(1, 2), yt.t(), reduction="none")
        return (of_tokens * k.t()).sum() / k.sum()

    same(time_first, TensorDataset(*data(N)))


class Samples(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        x, y, _, w, *_ = data()
        return {"x": x[i], "y": y[i], "w": w[i]}


def test_lists_of_inputs_and_labels_are_stacked(device):
    def step(net: Any, inputs: Any, classes: Any, *others: Any) -> Tensor:
        return F.cross_entropy(net(torch.stack(inputs)).mean(1), torch.tensor([int(y) for y in classes]))

    same(step, collate=lambda samples: [list(column) for column in zip(*samples, strict=True)])


def test_a_batch_that_is_a_list_of_samples_may_be_padded():
    """Some of them are of the same length."""

    def step(net: Any, *batch: dict[str, Tensor]) -> Tensor:
        padded = nn.utils.rnn.pad_sequence([s["x"][: 1 + int(s["w"] > 0.5)] for s in batch], batch_first=True)
        return F.cross_entropy(net(padded)[:, 0], torch.stack([s["y"] for s in batch]))

    same(step, Samples(), collate=list)


def test_a_batch_that_is_a_list_of_samples_may_be_sorted():
    def step(net: Any, *batch: dict[str, Tensor]) -> Tensor:
        ordered = sorted(batch, key=lambda sample: -float(sample["w"]))
        return ce(net, torch.stack([s["x"] for s in ordered]), torch.stack([s["y"] for s in ordered]))

    same(step, Samples(), collate=list)


def test_the_batch_size_that_a_user_logs_with_is_that_of_all_passes():
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(16, T, D, generator=random).double() * 3, torch.randint(0, C, (16,), generator=random)
    groups = torch.tensor([0] * 7 + [1, 0] + [1] * 7)

    def logged(**options: Any) -> Tensor:
        model = Model(lambda net, x, y: None)

        def step(batch: Any, batch_idx: int) -> Tensor:
            loss = ce(model.net, *batch) * (1 if len(batch[1]) else 0)
            model.log("mine", loss, batch_size=len(batch[1]), on_step=False, on_epoch=True)
            return loss

        model.training_step = step  # type: ignore[method-assign]
        model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), 0.0)  # type: ignore[method-assign]
        run = trainer(GroupDRO("g", 2, **options))
        run.fit(model, DataLoader(tag(TensorDataset(x, y), g=groups), batch_size=8))
        return run.callback_metrics["mine"]

    torch.testing.assert_close(logged(losses="split"), logged())


def test_looking_at_every_operation_changes_nothing():
    """A teacher's running means, and the random numbers, are those of plain training."""

    def trained(*methods: Any) -> tuple[Tensor, Tensor, Tensor]:
        teacher = nn.BatchNorm1d(N).double()  # as many features as samples

        def step(net: Any, x: Tensor, y: Tensor, *others: Tensor) -> Tensor:
            with torch.no_grad():
                noise = F.dropout(torch.randn_like(teacher(x.flatten(1)[:, :N])).cumsum(0), 0.5)
                drawn = torch.normal(noise, 1.0)
            return ce(net, x, y) + 0 * drawn.sum()

        torch.manual_seed(3)
        model, dataset = Model(step), TensorDataset(*data())
        trainer(*methods).fit(model, DataLoader(tag(dataset, g=G) if methods else dataset, batch_size=N))
        return teacher.running_mean, teacher.running_var, torch.rand(4)  # type: ignore[return-value]

    for own, plain in zip(trained(GroupDRO("g", 2)), trained(), strict=True):
        assert torch.equal(own, plain)


# ------------------------------------------------------------ what is predicted


def arc(net: Any, x: Tensor, y: Tensor) -> Tensor:
    cosines, own = net(x).mean(1).clamp(-0.99, 0.99), F.one_hot(y, C).double()
    return F.cross_entropy(10 * (own * torch.cos(cosines.acos() + 0.5) + (1 - own) * cosines), y)


def mask(z: Tensor) -> Tensor:
    return (z < 0.3) * -1e9


def views(net: Any, x: Tensor) -> Any:
    return sum(net(torch.cat([x, x * 3])).mean(1).chunk(2)) / 2


PREDICTED: dict[str, tuple[Step, Step]] = {
    "difference of two columns": (
        lambda net, x, y, yt, w, k, z: F.binary_cross_entropy_with_logits(
            net(x).mean(1)[:, 1] - net(x).mean(1)[:, 0], (w > 0.6).double()
        ),
        lambda net, x, y, yt, w, k, z: (net(x).mean(1)[:, 1] > net(x).mean(1)[:, 0]) == (w > 0.6),
    ),
    "classes left out by addition": (
        lambda net, x, y, yt, w, k, z: F.cross_entropy(net(x).mean(1) + mask(z), z.argmax(1)),
        lambda net, x, y, yt, w, k, z: (net(x).mean(1) + mask(z)).argmax(1) == z.argmax(1),
    ),
    "the mean of two views by a sum": (
        lambda net, x, y, yt, w, k, z: F.cross_entropy(views(net, x), y),
        lambda net, x, y, yt, w, k, z: views(net, x).argmax(1) == y,
    ),
    "classes left out by a hundred": (
        lambda net, x, y, yt, w, k, z: F.cross_entropy(net(x).mean(1) - 100.0 * (z < 0.3), z.argmax(1)),
        lambda net, x, y, yt, w, k, z: (net(x).mean(1) - 100.0 * (z < 0.3)).argmax(1) == z.argmax(1),
    ),
    "hard examples alone": (
        lambda net, x, y, yt, w, k, z: (lambda ce: ce[ce > 0.9].mean())(losses(net, x, y)),
        lambda net, x, y, yt, w, k, z: net(x).mean(1).argmax(1) == y,
    ),
    "hard examples by a factor": (
        lambda net, x, y, yt, w, k, z: (lambda ce: (ce * (ce > 0.9).double()).mean())(losses(net, x, y)),
        lambda net, x, y, yt, w, k, z: net(x).mean(1).argmax(1) == y,
    ),
    "a margin written out": (
        lambda net, x, y, yt, w, k, z: arc(net, x, y),
        lambda net, x, y, yt, w, k, z: net(x).mean(1).argmax(1) == y,
    ),
}


@pytest.mark.parametrize("name", PREDICTED)
def test_monitors_score_what_the_network_predicts(name):
    step, right = PREDICTED[name]
    model, monitor = Validated(step), GroupMonitor("g", 2)
    dataset = TensorDataset(*data())
    loader = DataLoader(tag(dataset, g=G), batch_size=N)
    (found,) = trainer(monitor).validate(model, loader, verbose=False)
    with torch.no_grad():
        hits = right(model.net, *data()).double()
    for g in (0, 1):
        assert found[f"val/accuracy_by_group/{g}"] == pytest.approx(hits[g == G].mean().item())


class Still(Model):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


def recorded(step: Step, folder: Any) -> Any:
    """What a recorder and Just Train Twice, in both of its ways, have seen of a step."""
    loader = DataLoader(tag(TensorDataset(*data())), batch_size=N)
    trainer(SampleRecorder(str(folder / "table.npz"))).fit(Still(step), loader)
    both = [JustTrainTwice(epochs=1, upweight=5.0, observe=observe) for observe in ("training", "pass")]
    for twice in both:
        trainer(twice, max_epochs=2).fit(Still(step), loader)
    with np.load(folder / "table.npz") as table:
        return table["prediction"].tolist(), table["correct"].tolist(), *(twice.ids.tolist() for twice in both)


def test_shares_of_classes_are_one_label(tmp_path):
    soft = recorded(lambda net, x, y, *_: ce(net, x, F.one_hot(y, C).double()), tmp_path)
    assert soft == recorded(lambda net, x, y, *_: ce(net, x, y), tmp_path)


CHANGED: dict[str, Any] = {
    "prior": lambda z, y: z + torch.tensor([3.0, 0.0, -3.0]).double(),
    "margin": lambda z, y: 8 * (z - 0.5 * F.one_hot(y, C)),
    "in place": lambda z, y: z.sub_(2 * F.one_hot(y, C)),
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CHANGED)
def test_what_a_training_step_changes_for_its_loss_is_not_recorded(name, reduction, tmp_path):
    change, plain = CHANGED[name], recorded(lambda net, x, y, *_: ce(net, x, y), tmp_path)
    assert plain[0] != change(Model(ce).net(data()[0]).mean(1), data()[1]).argmax(1).tolist()

    def step(net: Any, x: Tensor, y: Tensor, *_: Any) -> Tensor:
        return F.cross_entropy(change(net(x).mean(1), y), y, reduction=reduction).mean()

    assert recorded(step, tmp_path) == plain


class Subtract(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, margin: Tensor) -> Tensor:
        return torch.from_numpy(z.detach().numpy() - margin.numpy())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


class Margin(torch.nn.Module):
    """Nobody can look into it."""

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return Subtract.apply(z, F.one_hot(y, C))


def test_predictions_that_were_given_the_labels_are_refused(tmp_path):
    model = Model(lambda net, x, y, *_: F.cross_entropy(model.margin(net(x).mean(1), y), y))
    model.margin = Margin()
    recording, loader = trainer(SampleRecorder(str(tmp_path / "t.npz"))), DataLoader(tag(TensorDataset(*data())), N)
    with pytest.raises(DebiasError, match=r"they tell the label. Add the margin in the step itself"):
        recording.fit(model, loader)


def test_losses_that_the_step_reduces_are_recorded_too(tmp_path):
    reduced = recorded(lambda net, x, y, *_: losses(net, x, y).mean(), tmp_path)
    assert reduced == recorded(lambda net, x, y, *_: ce(net, x, y), tmp_path)


def test_probabilities_are_no_logits(tmp_path):
    def binary(loss: Any, last: Any) -> Step:
        return lambda net, x, y, yt, w, k, z: loss(last(net(x).mean(1)[:, 0]), (w > 0.6).double())

    stated = recorded(binary(F.binary_cross_entropy, torch.sigmoid), tmp_path)
    assert stated == recorded(binary(F.binary_cross_entropy_with_logits, torch.clone), tmp_path)
    model = Model(binary(F.binary_cross_entropy, torch.sigmoid))
    with pytest.raises(DebiasError, match="reads probabilities"):
        trainer(IRM("g", 2)).fit(model, DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N))


def test_other_rows_are_said_to_be_others(tmp_path):
    model = Model(lambda net, x, y, *_: ce(net, x[ORDER], y[ORDER]))
    loader = DataLoader(tag(TensorDataset(*data())), batch_size=N)
    with pytest.raises(DebiasError, match=r"in the order of the batch for SampleRecorder"):
        trainer(SampleRecorder(str(tmp_path / "table.npz"))).fit(model, loader)


@pytest.mark.parametrize("loss", [F.mse_loss, F.binary_cross_entropy_with_logits])
def test_the_gradient_of_a_sample_is_that_of_its_own_loss(loss):
    """The same loss, summed by the step over the elements of a sample, and by torch over all."""

    def penalised(step: Step) -> Tensor:
        model, loader = Model(step), DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N)
        trainer(Fishr("g", 2, penalty_weight=1.0, start_step=0)).fit(model, loader)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    own = penalised(lambda net, x, y, yt, w, k, z: loss(net(x[:, 0]), z, reduction="none").sum(1).mean())
    whole = penalised(lambda net, x, y, yt, w, k, z: loss(net(x[:, 0]), z, reduction="sum") / len(x))
    torch.testing.assert_close(own, whole, rtol=1e-10, atol=1e-12)


def test_rows_of_losses_that_are_set_to_zero_are_masked_rows():
    """Of losses that were weighted before: a mask of the rows is not one of the classes."""

    def penalised(mask: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        def step(net: Any, x: Tensor, y: Tensor, yt: Tensor, w: Tensor, k: Tensor, z: Tensor) -> Tensor:
            of_elements = F.binary_cross_entropy_with_logits(net(x[:, 0]), z, reduction="none")
            return mask(of_elements * (1 + z), y == 0).mean()

        model, loader = Model(step), DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N)
        trainer(IRM("g", 2, penalty_weight=1.0)).fit(model, loader)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    def assigned(of_elements: Tensor, left_out: Tensor) -> Tensor:
        of_elements[left_out] = 0
        return of_elements

    filled = penalised(lambda of_elements, left_out: of_elements.masked_fill(left_out.unsqueeze(1), 0))
    torch.testing.assert_close(penalised(assigned), filled, rtol=1e-10, atol=1e-12)


def test_samples_on_another_axis_than_the_rows_are_refused():
    step = lambda net, x, y, yt, w, k, z: F.mse_loss(net(x.transpose(0, 1))[..., 0], k.t())  # noqa: E731
    with pytest.raises(RowsError, match="the samples lie along another"):
        trainer(IRM("g", 2)).fit(Model(step), DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N))


def test_logits_that_are_named_in_another_order_are_refused():
    class Sorted(Model):
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return {"logits": self.net(batch[0][ORDER]).mean(1)}

    monitor = GroupMonitor("g", 2, logits=lambda output: output["logits"], target=1)
    loader = DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N)
    with pytest.raises(RowsError, match="order of the batch"):
        trainer(monitor).validate(Sorted(lambda: None), loader, verbose=False)


def test_features_of_samples_in_another_order_are_refused():
    probe = AttributeProbe("g", 2, features="net")
    model = Validated(lambda net, x, y, *_: ce(net, x[ORDER], y[ORDER]))
    loader = DataLoader(tag(TensorDataset(*data()), g=G), batch_size=N)
    with pytest.raises(RowsError, match="order of the batch"):
        trainer(probe).validate(model, loader, verbose=False)
