"""A network that belongs to a callback: it disturbs nobody, resumes, and steps with the user's optimiser."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from _support.doubles import Adversary
from _support.fits import Classifier, make_trainer, parameters, problem, same, tagged, train
from debias import AdvStyle, IdentityAdversarial
from debias.errors import DebiasError
from debias.step.owned import OwnedModule

CPU = torch.device("cpu")


def build(width):
    return nn.Sequential(nn.Linear(width, 3), nn.Dropout(0.1))


def owned(**options):
    return OwnedModule(build, **options)


def stepped(one, n=1, *, lr=0.5, scaler=None):
    """Create it and take `n` steps on fixed gradients."""
    network = one.create(2, CPU, torch.float32)
    user = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    for i in range(n):
        for p in network.parameters():
            p.grad = torch.full_like(p, i + 1.0)
        one.step(user, scaler)
    return network


def test_creation_depends_on_its_seed_alone_and_leaves_the_global_state():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = owned(seed=3).create(2, CPU, torch.float64)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first.state_dict(), owned(seed=3).create(2, CPU, torch.float64).state_dict())
    assert not same(first.state_dict(), owned(seed=4).create(2, CPU, torch.float64).state_dict())
    assert first[0].weight.dtype == torch.float64


def test_it_is_created_once():
    one = owned()
    assert one.create(2, CPU, torch.float32) is one.create(2, CPU, torch.float32)


@pytest.mark.parametrize(("options", "expected"), [({}, 0.5), ({"lr_ratio": 10.0}, 5.0), ({"lr": 0.01}, 0.01)])
def test_learning_rate(options, expected):
    one = owned(**options)
    before = copy.deepcopy(one.create(2, CPU, torch.float32).state_dict())
    after = stepped(one)
    torch.testing.assert_close(before["0.weight"] - after[0].weight, torch.full((3, 2), expected))


def test_gradients_are_cleared_and_missing_ones_are_zero():
    one = owned(optimizer=torch.optim.SGD)
    network = stepped(one)
    assert all(p.grad is None for p in network.parameters())
    before = parameters(network)
    one.step(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5))
    assert same(before, parameters(network))


def test_state_goes_on_where_it_was_whether_loaded_before_or_after_creation():
    whole = owned()
    stepped(whole, 2)
    state = copy.deepcopy(whole.state_dict())
    stepped(whole, 1)
    early, late = owned(), owned(seed=9)
    early.load_state_dict(copy.deepcopy(state))  # as torch does, an optimiser goes on with the tensors it is given
    assert same(early.state_dict(), state)  # saved again before it was created
    stepped(late, 5)
    late.load_state_dict(copy.deepcopy(state))
    for one in (early, late):
        stepped(one, 1)
        assert same(one.state_dict(), whole.state_dict())


def test_a_state_from_before_creation_resets_everything():
    one, fresh = owned(), owned()
    stepped(one, 3)
    one.load_state_dict({})
    assert one.module is None
    assert one.optimizer is None
    assert one.state_dict() == {}
    assert same(stepped(one, 1).state_dict(), stepped(fresh, 1).state_dict())


def test_another_network_is_refused():
    state = owned()
    stepped(state)
    wide = OwnedModule(lambda width: nn.Linear(width, 7))
    wide.load_state_dict(state.state_dict())
    with pytest.raises(DebiasError, match="saved network to fit the one of this run"):
        wide.create(2, CPU, torch.float32)


def test_features_of_another_width_are_refused():
    one = owned()
    one.create(2, CPU, torch.float32)
    with pytest.raises(DebiasError, match=r"width 2, which .* was made for, but got 3\. Make a new instance"):
        one.create(3, CPU, torch.float32)
    one.load_state_dict({})
    assert one.create(3, CPU, torch.float32)[0].in_features == 3


def test_on_another_device_or_in_another_dtype_network_and_state_move():
    one, plain = owned(), owned()
    stepped(one, 2)
    stepped(plain, 2)
    one.create(2, CPU, torch.float64)
    assert {p.dtype for p in one.module.parameters()} == {torch.float64}
    assert {x["momentum_buffer"].dtype for x in one.optimizer.state.values()} == {torch.float64}
    one.create(2, CPU, torch.float32)
    assert same(stepped(one, 1).state_dict(), stepped(plain, 1).state_dict())
    assert same(one.state_dict(), plain.state_dict())
    one.create(2, torch.device("meta"), torch.float32)
    devices = {p.device.type for p in one.module.parameters()}
    assert devices | {x["momentum_buffer"].device.type for x in one.optimizer.state.values()} == {"meta"}
    assert [id(p) for p in one.module.parameters()] == [id(p) for p in one.optimizer.param_groups[0]["params"]]


def test_a_new_fit_has_the_same_network_and_a_fresh_optimiser():
    made = [torch.optim.SGD, torch.optim.AdamW]
    one = owned(optimizer=lambda parameters, lr: made.pop(0)(parameters, lr=lr))
    network = stepped(one, 2)
    before = parameters(network)
    one.new_fit()
    assert one.create(2, CPU, torch.float32) is network
    assert same(parameters(network), before)
    assert type(one.optimizer) is torch.optim.AdamW
    assert not one.optimizer.state
    one.create(2, CPU, torch.float32)  # but once a fit
    assert made == []


def test_a_new_fit_forgets_the_gradients_of_one_that_ended_before_its_step():
    one = owned()
    network = one.create(2, CPU, torch.float32)
    network(torch.ones(1, 2)).sum().backward()
    one.new_fit()
    assert all(p.grad is None for p in one.create(2, CPU, torch.float32).parameters())


@pytest.mark.parametrize("order", ["loaded, fit begun", "fit begun, loaded", "fitted, loaded, fit begun", "all"])
def test_a_loaded_state_goes_on_in_a_new_fit(order):
    whole = owned()
    stepped(whole, 2)
    state = copy.deepcopy(whole.state_dict())
    stepped(whole, 1)
    one = owned(seed=9)
    if order.startswith("fitted") or order == "all":
        stepped(one, 5)
    if order in ("fit begun, loaded", "all"):
        one.new_fit()
        one.load_state_dict(state)
    else:
        one.load_state_dict(state)
        one.new_fit()
    stepped(one, 1)
    assert same(one.state_dict(), whole.state_dict())


def test_the_state_of_another_optimiser_is_left_out_and_the_network_goes_on():
    whole, one = owned(), owned(optimizer=torch.optim.AdamW)
    before = parameters(stepped(whole, 2))
    one.load_state_dict(whole.state_dict())
    assert same(parameters(one.create(2, CPU, torch.float32)), before)
    assert not one.optimizer.state
    stepped(one, 1)


def made_by_rank(rank):
    torch.manual_seed(rank)
    network = nn.Sequential(nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last), nn.BatchNorm2d(2))
    network[1].running_mean.normal_()
    one = OwnedModule(lambda width: network)
    own = parameters(network)
    one.create(3, CPU, torch.float64)
    return (
        own,
        parameters(one.module),
        sum(p is q for p, q in zip(network.parameters(), one.module.parameters(), strict=True)),
    )


def test_a_network_of_the_users_own_is_that_of_the_first_rank(ranks):
    (own, first, kept), (other, second, _) = ranks.run(made_by_rank)
    assert not same(own, other)
    assert same(first, second)
    assert same({k: v.double() if v.is_floating_point() else v for k, v in own.items()}, first)
    assert kept == 4


@pytest.mark.parametrize("bad", [False, True])
def test_grad_scaler_unscales_and_skips(bad):
    """As for the user's own optimiser: gradients are divided by the scale, an infinite one skips the step."""
    one, plain = owned(), owned()
    network, reference = one.create(2, CPU, torch.float32), plain.create(2, CPU, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    user = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    user.param_groups[0]["params"][0].grad = torch.ones(1)
    scaler.scale(torch.zeros(1))  # the scaler's own lazy start
    scaler.unscale_(user)  # as Lightning does
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        p.grad, q.grad = torch.full_like(p, 8.0), torch.full_like(q, 1.0)
    if bad:
        network[0].bias.grad[0] = torch.inf
    before = parameters(network)
    one.step(user, scaler)
    plain.step(user)
    assert same(parameters(network), before if bad else parameters(reference))
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("bad", [False, True])
def test_where_the_users_step_is_skipped_this_one_is_too(bad, fused):
    """A fused optimiser looks for infinite gradients in its own step, which comes later."""
    one = owned(optimizer=torch.optim.SGD)
    network = one.create(2, CPU, torch.float32)
    users = nn.Linear(2, 1)
    user = torch.optim.AdamW(users.parameters(), lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(1))
    for p in (*network.parameters(), *users.parameters()):
        p.grad = torch.full_like(p, 8.0)
    if bad:
        users.weight.grad[0, 1] = torch.inf
    if not fused:
        scaler.unscale_(user)
    before, users_before = parameters(network), parameters(users)
    one.step(user, scaler)
    if fused:
        assert bad or users.weight.grad.unique().tolist() == [8.0]  # looked at, not unscaled
    scaler.step(user)
    scaler.update()
    assert same(users_before, parameters(users)) == same(before, parameters(network)) == bad
    assert scaler.get_scale() == (4.0 if bad else 8.0)


# -------------------------------------------------------------------------------------------------- in a Trainer


class Silent(Classifier):
    """Returns no loss from the second batch on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss if batch_idx == 0 else None


class Kept(L.Callback):
    """Where everything that is trained is after each batch."""

    def __init__(self, method):
        self.method = method
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        networks = [parameters(owned.module) for owned in self.method.owned.values()]
        self.seen.append((parameters(module), networks))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")
@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", ["adversary", "AdvStyle"])
def test_a_step_without_a_loss_moves_nothing(name, scaled, accumulated):
    """Neither momentum nor weight decay; and the scaler goes on."""
    method = Adversary("person", 5, lr=0.1) if name == "adversary" else AdvStyle("backbone.1", p_adversarial=1, p_dsu=0)
    kept = Kept(method)
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))] if scaled else []
    trainer = make_trainer(
        [method, kept], max_epochs=2, plugins=plugins, accumulate_grad_batches=accumulated, limit_train_batches=4
    )
    data = DataLoader(tagged(problem(64, dtype=torch.float32)), batch_size=16)
    trainer.fit(Silent().float(), data, DataLoader(tagged(problem(16, dtype=torch.float32)), batch_size=16))
    first, second = kept.seen[:4], kept.seen[4:]
    assert len(second) == 4
    # Without a scaler, Lightning steps on what an earlier micro-batch has left; with one it does not.
    for epoch in (first, second):
        start = epoch[1] if accumulated == 2 else epoch[0]
        assert all(same(start, later) for later in epoch[2:])
    assert same(first[-1], second[0]) == (accumulated == 2)
    if accumulated == 2 and scaled:
        assert same(first[-1], second[-1])


def test_a_second_fit_with_another_optimiser():
    model, method = Classifier(), IdentityAdversarial("person", 5)
    train(model, [method])
    network = method.owned["adversary"].module
    before = parameters(network)
    model.configure_optimizers = lambda: torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, [method], limit_train_batches=1)
    assert type(method.owned["adversary"].optimizer) is torch.optim.AdamW
    assert method.owned["adversary"].module is network
    moved = max(float((before[k] - v).abs().max()) for k, v in parameters(network).items())
    assert 0 < moved < 0.0101  # the first step of AdamW

    model.backbone, model.head = nn.Linear(4, 12).double(), nn.Linear(12, 2).double()
    with pytest.raises(DebiasError, match=r"width 6.*but got 12\. Make a new instance"):
        train(model, [method])


SCHEDULERS = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda step: 0.9**step]),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
}


class WithScheduler(Classifier):
    def __init__(self, name):
        super().__init__()
        self.name = name

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": SCHEDULERS[self.name](optimizer), "interval": "step"}]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_users_optimiser_and_schedule_are_untouched(scheduler):
    def run(callbacks, *, bare=False):
        model = WithScheduler(scheduler)
        trainer = train(model, callbacks, bare=bare, max_epochs=2)
        groups = trainer.optimizers[0].param_groups
        return (
            trainer.lr_scheduler_configs[0].scheduler.state_dict(),
            [len(g["params"]) for g in groups],
            groups[0]["lr"],
        )

    def without_functions(state):
        return {k: v for k, v in state.items() if not callable(v) and k not in ("_schedulers", "lr_lambdas")}

    (state, sizes, lr), (plain, plain_sizes, plain_lr) = run([Adversary("person", 5)]), run([], bare=True)
    assert (sizes, lr) == (plain_sizes, plain_lr)
    assert same(without_functions(state), without_functions(plain))


def test_it_learns_and_follows_the_users_learning_rate():
    adversary = Adversary("person", 5)
    model = WithScheduler("lambda")
    trainer = train(model, [adversary], max_epochs=2)
    network = adversary.owned["adversary"]
    assert not same(
        parameters(network.module), parameters(Adversary("person", 5).owned["adversary"].create(6, CPU, torch.float64))
    )
    # The last step was made with the rate before the scheduler's last move.
    assert network.optimizer.param_groups[0]["lr"] == pytest.approx(trainer.optimizers[0].param_groups[0]["lr"] / 0.9)
