"""A network that belongs to a callback: it disturbs nobody, resumes, and steps with the user's optimiser."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from _support.doubles import Adversary
from _support.fits import Classifier, parameters, same, train
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


@pytest.mark.parametrize("bad", [False, True])
def test_grad_scaler_unscales_and_skips(bad):
    """As for the user's own optimiser: gradients are divided by the scale, an infinite one skips the step."""
    one, plain = owned(), owned()
    network, reference = one.create(2, CPU, torch.float32), plain.create(2, CPU, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    user = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    scaler.scale(torch.zeros(1))  # the scaler's own lazy start
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        p.grad, q.grad = torch.full_like(p, 8.0), torch.full_like(q, 1.0)
    if bad:
        network[0].bias.grad[0] = torch.inf
    before = parameters(network)
    one.step(user, scaler)
    plain.step(user)
    assert same(parameters(network), before if bad else parameters(reference))
    assert all(p.grad is None for p in network.parameters())


# -------------------------------------------------------------------------------------------------- in a Trainer


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
