"""Kinds of steps that were once wrong in silence, or refused without need, each in a few lines."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from debias import CORAL, IRM, MMD, Debiaser, DomainAdversarial, GroupDRO, HessianAlignment, VREx, tag
from debias.errors import DebiasError, HeadNotFoundError, RowsError, UntappedLossError

N, D, C = 8, 4, 3
random = torch.Generator().manual_seed(0)
X = torch.randn(N, D, generator=random).double()
Y = torch.arange(N) % C
Z = torch.rand(N, C, generator=random).double()
G = torch.arange(N) // 3 % 2
QUIET: Any = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1,
}  # fmt: skip


class Model(L.LightningModule):
    def __init__(self, step: Any = None) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(D, 5).double(), nn.Linear(5, C).double()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.step(self, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    step: Any, *callbacks: Any, data: Any = None, loaders: Any = None, **options: Any
) -> tuple[Model, dict[str, Tensor]]:
    model, trainer = Model(step), L.Trainer(callbacks=list(callbacks), **(QUIET | options))
    data = tag(TensorDataset(X, Y, Z), g=G) if data is None else data
    trainer.fit(model, DataLoader(data, batch_size=N) if loaders is None else loaders)
    return model, trainer.callback_metrics


def weights(*args: Any, **options: Any) -> Tensor:
    return fit(*args, **options)[0].head.weight.detach()


def plain(model: Model, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Reader(Debiaser):
    """Looks at losses and adds nothing."""

    def sample_ids(self, step: Any) -> Tensor:
        return step.ids("g", 2)

    def penalise(self, call: Any, step: Any) -> Tensor:
        with torch.no_grad():
            call.num.mean()
        return call.num.new_zeros(())


def test_who_reads_a_loss_first_takes_nothing_from_the_others():
    alone = weights(plain, VREx("g", 2))
    assert torch.equal(weights(plain, Reader(), VREx("g", 2)), alone)
    assert not torch.equal(weights(plain, Reader()), alone)


class ByColumn(Debiaser):
    """Weighs each sample by a column of the batch."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.early = early

    def begin(self, step: Any) -> None:
        if self.early:
            step.count(len(step.read(2)))

    def reweigh(self, calls: list[Any], step: Any) -> list[Tensor]:
        (call,) = calls
        return [(call.of_rows(step.read(2)[:, 0]) * call.num).sum() / call.den.sum()]


def test_values_of_samples_follow_rows_though_they_are_no_ids():
    def ordered(model: Model, batch: Any) -> Tensor:
        order = batch[0][:, 0].argsort()
        return F.cross_entropy(model(batch[0][order]), batch[1][order])

    torch.testing.assert_close(weights(ordered, ByColumn(True)), weights(plain, ByColumn(True)))
    with pytest.raises(RowsError, match=r"before the step.*`sample_ids\(step\)`"):
        fit(ordered, ByColumn(False), data=TensorDataset(X, Y, Z))


@pytest.mark.parametrize("tokens", [N, 3])
def test_a_sequence_first_network_has_as_many_tokens_as_samples(tokens):
    x = torch.randn(N, tokens, D, generator=torch.Generator().manual_seed(1)).double()
    onehot = F.one_hot(Y, C)

    def step(model: Model, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0].transpose(0, 1)).mean(0), batch[1].argmax(1))

    _, logged = fit(step, GroupDRO("g", 2), data=tag(TensorDataset(x, onehot), g=G))
    with torch.no_grad():
        losses = F.cross_entropy(Model()(x).mean(1), Y, reduction="none")
    for g in (0, 1):
        assert float(logged[f"train/loss_by_group/{g}"]) == pytest.approx(float(losses[g == G].mean()))


STILL = {
    "permuted axes": lambda x, y: (x.permute(0, 2, 1).permute(0, 2, 1), y.argmax(1)),
    "mirrored": lambda x, y: (x.flip(-1), y.max(1).indices),
    "moved axis": lambda x, y: (x.movedim(1, 2).movedim(2, 1), torch.tensor(y.argmax(1).tolist())),
    "columns in another order": lambda x, y: (x[:, torch.tensor([1, 0])], torch.tensor(y.argmax(1).tolist())),
    "rolled inside": lambda x, y: (x.roll(1, 2), torch.from_numpy(y.argmax(1).numpy().copy())),
}


@pytest.mark.parametrize("name", STILL)
def test_moves_that_keep_the_batch_axis_put_nothing_in_another_order(name):
    x, onehot = X.view(N, 2, 2), F.one_hot(Y, C)

    def step(model: Model, batch: Any) -> Tensor:
        moved, target = STILL[name](*batch)
        return F.cross_entropy(model(moved.flatten(1)), target)

    fit(step, GroupDRO("g", 2), data=tag(TensorDataset(x, onehot), g=G))


MIXED = {
    "in place, as torchvision's MixUp": lambda x: x.roll(1, 0).mul_(0.3).add_(x.mul(0.7)),
    "in place of the batch": lambda x: x.mul_(0.7).add_(x.flip(0) * 0.3),
    "in an expression": lambda x: 0.7 * x + 0.3 * x.roll(1, 0),
    "pasted, as CutMix": lambda x: x.clone().index_put_((torch.arange(N), torch.zeros(N).long()), x.roll(1, 0)[:, 0]),
    "copied": lambda x: x.copy_(x.flip(0).clone()),
    "put elsewhere": lambda x: x.clone().index_put_((torch.arange(N).flip(0),), x.clone()),
    "copied, then scaled": lambda x: x.clone().copy_(x.flip(0)).mul_(2),
}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_samples_are_refused(name, backend):
    torch._dynamo.reset()
    mixed = torch.compile(MIXED[name], backend=backend) if backend else MIXED[name]

    def step(model: Model, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), mixed(batch[2].clone()))

    # Compiled, an operation may be seen that is known to no list: then what it makes is of the whole batch.
    with pytest.raises((RowsError, UntappedLossError), match=r"rows of `mse_loss`|target of `mse_loss`"):
        fit(step, GroupDRO("g", 2))


@pytest.mark.parametrize("how", [lambda s: s.t(), lambda s: s.t()[torch.arange(N).flip(0)], lambda s: s.mT.flip(0)])
def test_an_index_that_has_moved_to_another_axis_is_no_row(how):
    """Similarities of all pairs: rows of the transpose are those of the second factor."""

    def step(model: Model, batch: Any) -> Tensor:
        z = model(batch[0])
        return F.cross_entropy(how(z @ batch[2].mT), torch.arange(N))

    try:
        _, logged = fit(step, GroupDRO("g", 2))
    except RowsError:
        return
    with torch.no_grad():
        losses = F.cross_entropy(how(Model()(X) @ Z.mT), torch.arange(N), reduction="none")
    rows = how(torch.arange(N).expand(N, N))[:, 0]
    expected = float(losses[G[rows] == 0].mean())
    assert float(logged["train/loss_by_group/0"]) == pytest.approx(expected)


def test_ids_of_one_loader_are_not_those_of_another():
    loaders = {
        "labelled": DataLoader(tag(TensorDataset(X, Y), g=G), batch_size=N),
        "other": DataLoader(TensorDataset(X + 1, Y), batch_size=N),
    }

    def of(name: str) -> Any:
        return lambda model, batch: F.cross_entropy(model(batch[name][0]), batch[name][1])

    combined = CombinedLoader(loaders, "min_size")
    expected = weights(plain, GroupDRO("g", 2, step_size=1.0), data=tag(TensorDataset(X, Y), g=G))
    found = weights(of("labelled"), GroupDRO("g", 2, step_size=1.0), loaders=combined)
    torch.testing.assert_close(found, expected)
    with pytest.raises(RowsError, match="rows of `cross_entropy`"):
        fit(of("other"), GroupDRO("g", 2), loaders=CombinedLoader(loaders, "min_size"))


def dice(model: Model, batch: Any) -> Tensor:
    p = model(batch[0]).sigmoid()
    return 1 - 2 * (p * batch[2]).sum() / (p.sum() + batch[2].sum())


def test_half_a_loss_is_told_of():
    def step(model: Model, batch: Any) -> Tensor:
        return plain(model, batch) + dice(model, batch)

    with pytest.warns(UserWarning, match=r"GroupDRO leaves it as it is.*`loss=0`.*losses='split'"):
        fit(step, GroupDRO("g", 2))
    with pytest.raises(UntappedLossError, match=r"whole loss.*VREx.*`loss=0`"):
        fit(step, VREx("g", 2))
    fit(step, VREx("g", 2, loss=0))
    fit(step, GroupDRO("g", 2, losses="split"))
    fit(lambda m, b: plain(m, b) + sum(p.pow(2).sum() for p in m.parameters()), VREx("g", 2))


@pytest.mark.parametrize(
    "method",
    [
        lambda: CORAL("g", 2, features="body"),
        lambda: MMD("g", 2, features="body"),
        lambda: CORAL("g", 2, head="head"),
        lambda: DomainAdversarial("g", 2, features="body", schedule="constant"),
    ],
)
@pytest.mark.parametrize("loss", [dice, lambda m, b: m(b[0]).logsumexp(0).sum(), lambda m, b: m(b[0]).std()])
def test_methods_that_read_features_work_beside_any_loss(method, loss):
    bare = fit(loss, data=TensorDataset(X, Y, Z))[0]
    assert not torch.equal(fit(loss, method())[0].body.weight, bare.body.weight)


@pytest.mark.parametrize("where", [{"features": "body"}, {"head": "head"}])
def test_features_of_a_list_of_one_part(where):
    def step(model: Model, batch: Any) -> Tensor:
        return F.cross_entropy(torch.cat([model(x) for x in batch[0].split(N)]), batch[1])

    assert torch.equal(weights(step, CORAL("g", 2, **where)), weights(plain, CORAL("g", 2, **where)))


def test_the_prediction_is_what_requires_a_gradient():
    def step(model: Model, batch: Any, *, swapped: bool) -> Tensor:
        pair = model(batch[0]), batch[2]
        return F.mse_loss(*(reversed(pair) if swapped else pair))

    for method in (IRM, HessianAlignment):
        found = [weights(lambda m, b, s=s: step(m, b, swapped=s), method("g", 2)) for s in (False, True)]
        torch.testing.assert_close(*found)


def test_numbers_of_the_batch_that_a_later_epoch_makes():
    """As where a network learns from the samples of small losses, once it has learned a little."""

    def step(model: Model, batch: Any) -> Tensor:
        x, y, _ = batch
        if model.current_epoch:
            kept = F.cross_entropy(model(x), y, reduction="none").argsort()[: N // 2]
            x, y = x[kept], y[kept]
        return F.cross_entropy(model(x), y)

    fit(step, GroupDRO("g", 2), max_epochs=1)
    with pytest.raises(UntappedLossError, match="made of the whole batch"):
        fit(step, GroupDRO("g", 2), max_epochs=2)


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (lambda m, b: F.mse_loss(m(b[0]) - b[2], torch.zeros(N, C)), "hide the prediction"),
        (lambda m, b: F.mse_loss(torch.zeros(N, C), 2 * (b[2] - m(b[0])).view(N, C)), "hide the prediction"),
        (lambda m, b: F.mse_loss(m(b[0]) - b[2], torch.zeros(N, C), reduction="none").mean(), "hide the prediction"),
        (lambda m, b: F.nll_loss(m(b[0]), b[1]), "no log-probabilities"),
        (lambda m, b: F.nll_loss(m(b[0]).sigmoid(), b[1], reduction="none").mean(), "no log-probabilities"),
    ],
)
def test_a_loss_that_hides_the_prediction_is_refused(step, match):
    with pytest.raises(DebiasError, match=match):
        fit(step, IRM("g", 2))


def test_a_prediction_may_be_a_difference_and_targets_may_be_0():
    fit(lambda m, b: F.mse_loss(m(b[0]) - 1, b[2]), IRM("g", 2))
    fit(lambda m, b: F.mse_loss(m(b[0]), torch.zeros(N, C)), IRM("g", 2))
    fit(lambda m, b: F.nll_loss(m(b[0]).softmax(1).log(), b[1]), IRM("g", 2))


def test_stated_logits_have_their_classes_along_axis_1():
    def step(model: Model, batch: Any, *, turned: bool = False) -> dict[str, Tensor]:
        logits, targets = model(batch[0]).view(N // 2, 2, C), batch[1].view(N // 2, 2)
        loss = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).mean()
        return {"loss": loss, "logits": logits.transpose(1, 2) if turned else logits, "targets": targets}

    data = tag(TensorDataset(X.view(N // 2, 2, D), Y.view(N // 2, 2), Z.view(N // 2, 2, C)), g=G[: N // 2])
    with pytest.raises(RowsError, match=r"along axis 1.*`logits.transpose\(1, 2\)`"):
        fit(step, GroupDRO("g", 2), data=data)
    fit(lambda m, b: step(m, b, turned=True), GroupDRO("g", 2), data=data)


def test_a_head_behind_log_softmax():
    found = [
        weights(step, HessianAlignment("g", 2))
        for step in (
            plain,
            lambda m, b: F.nll_loss(m(b[0]).log_softmax(1), b[1]),
            lambda m, b: F.cross_entropy(m(b[0])[:, :C], b[1]),
        )
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_losses_of_several_shapes_in_one_step():
    """A reconstruction, drawn several times, and a prior's."""

    def step(model: Model, batch: Any) -> Tensor:
        z = model(batch[0])
        terms = [F.mse_loss(z.expand(3, N, C), batch[2].expand(3, N, C)), F.mse_loss(z, torch.zeros_like(z))]
        return terms[0] + 0.1 * terms[1]

    fit(step, GroupDRO("g", 2, loss=1))


def test_two_regression_targets_under_a_penalty_on_the_head():
    def step(model: Model, batch: Any) -> Tensor:
        z = model(batch[0])
        return F.mse_loss(z[:, 0], batch[2][:, 0]) + F.mse_loss(z[:, 1], batch[2][:, 1])

    with pytest.raises(DebiasError):
        fit(step, HessianAlignment("g", 2, loss="sum"))


def test_keys_to_be_crossed_from_hydra():
    keys, counts = OmegaConf.create(["g", 1]), OmegaConf.create([2, C])
    assert GroupDRO(keys, counts).module.n_groups == 2 * C
    fit(plain, GroupDRO(keys, counts))


def test_folds_begin_afresh_and_a_module_goes_on():
    method = GroupDRO("g", 2, step_size=1.0)
    first = weights(plain, method)
    assert torch.equal(weights(plain, method), first)
    start = method.module.log_weights.clone()
    model = Model(plain)
    L.Trainer(callbacks=[method], **QUIET).fit(model, DataLoader(tag(TensorDataset(X, Y, Z), g=G), batch_size=N))
    once = method.module.log_weights.clone()
    L.Trainer(callbacks=[method], **QUIET).fit(model, DataLoader(tag(TensorDataset(X, Y, Z), g=G), batch_size=N))
    assert torch.equal(once, start)
    assert not torch.equal(method.module.log_weights, once)
    saved = copy.deepcopy(method.state_dict())
    other = GroupDRO("g", 2, step_size=1.0)
    other.load_state_dict(saved)
    fit(plain, other)
    assert not torch.equal(other.module.log_weights, once)  # what was loaded counts


def test_an_adversary_is_that_of_one_module():
    method = DomainAdversarial("g", 2)
    first = weights(plain, method, max_epochs=4)
    assert torch.equal(weights(plain, method, max_epochs=4), first)


def test_passes_per_group_log_what_one_pass_logs():
    def step(model: Model, batch: Any) -> Tensor:
        loss = plain(model, batch)
        model.log("mine", loss)
        model.log_dict({"twice": 2 * loss})
        return loss.reshape(1)

    _, split = fit(step, GroupDRO("g", 2, losses="split"))
    _, whole = fit(lambda m, b: step(m, b).squeeze(), GroupDRO("g", 2))
    for name in ("mine", "twice"):
        torch.testing.assert_close(split[name], whole[name])


def test_two_of_a_class_mean_their_own_losses():
    def step(model: Model, batch: Any) -> Tensor:
        z = model(batch[0])
        return F.cross_entropy(z, batch[1]) + F.mse_loss(z, batch[2])

    methods = [VREx("g", 2, loss=0, name="a"), VREx("g", 2, loss=1, name="b")]
    _, both = fit(step, *methods)
    for method in methods:
        alone = fit(step, VREx("g", 2, loss=method.loss, name=method.name))[1]
        torch.testing.assert_close(both[f"train/vrex_penalty/{method.name}"], alone["train/vrex_penalty"])


def test_features_that_have_to_be_pooled_say_so():
    with pytest.raises(HeadNotFoundError, match="shape"):
        fit(lambda m, b: dice(m, (b[0].unsqueeze(1), b[1], b[2].unsqueeze(1))), CORAL("g", 2, features="body"))


POOLED: dict[str, tuple[tuple[int, ...], Any]] = {
    "mean of tokens": ((N, 5, 6), lambda h: h.mean(1)),
    "first token": ((N, 5, 6), lambda h: h[:, 0]),
    "mean of maps": ((N, 6, 2, 3), lambda h: h.mean((2, 3))),
}


@pytest.mark.parametrize("what", POOLED)
@pytest.mark.parametrize(
    "method",
    [
        lambda **options: CORAL("g", 2, **options),
        lambda **options: MMD("g", 2, **options),
        lambda **options: DomainAdversarial("g", 2, schedule="constant", **options),
    ],
)
def test_features_of_tokens_and_maps_are_pooled_as_stated(what, method):
    shape, pool = POOLED[what]

    spread = torch.randn(5, *shape[1:], generator=torch.Generator().manual_seed(1)).double()

    def step(model: Model, batch: Any) -> Tensor:
        wide = torch.einsum("nd,d...->n...", model.body(batch[0]).tanh(), spread)
        features = model.get_submodule("pooled")(model.get_submodule("wide")(wide))
        return F.cross_entropy(model.head(features[:, :5]), batch[1])

    class Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return pool(x)

    def trained(**options: Any) -> Tensor:
        model = Model(step)
        model.wide, model.pooled = nn.Identity(), Pool()
        trainer = L.Trainer(callbacks=[method(**options)], **QUIET)
        trainer.fit(model, DataLoader(tag(TensorDataset(X, Y, Z), g=G), batch_size=N))
        return model.body.weight.detach()

    own = trained(features="pooled")
    stated = trained(features="wide", pool=what.split()[0])
    torch.testing.assert_close(stated, own, rtol=1e-12, atol=1e-12)
    with pytest.raises(HeadNotFoundError, match=r"shape \(N, D\).*`pool='mean'` or `pool='first'`"):
        trained(features="wide")
    with pytest.raises(HeadNotFoundError, match=r"with `pool='mean'`, but got shape \(8, 6\)\. Leave `pool` out"):
        trained(features="pooled", pool="mean")


def test_a_way_of_pooling_has_features_that_it_pools():
    with pytest.raises(DebiasError, match=r"`features` to be named with `pool='mean'`"):
        CORAL("g", 2, pool="mean")
    with pytest.raises(DebiasError, match="'mean' or 'first', but got 'max'"):
        CORAL("g", 2, features="body", pool="max")
