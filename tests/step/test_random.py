"""Draws are a function of seed, name, micro-batch, place and rank, are replayed, and disturb nobody."""

from __future__ import annotations

import pytest
import torch

from debias import DSU, CraftedShifts, MixStyle
from debias.errors import DebiasError
from debias.methods.adv_style import AdvStyleLayer
from debias.methods.dsu import DSULayer
from debias.methods.group_mixup import GroupMixupLayer
from debias.methods.mixstyle import MixStyleLayer
from debias.step.random import StepRandom

CPU = torch.device("cpu")


def sample(generator):
    return torch.rand(4, generator=generator)


def draw(random, counter=0, place="layer", **options):
    random.start(counter)
    return random.draw(place, CPU, sample, **options)


def test_a_new_process_at_the_same_micro_batch_draws_the_same():
    whole = StepRandom(0, "MixStyle")
    drawn = [draw(whole, counter) for counter in range(5)]
    assert torch.equal(draw(StepRandom(0, "MixStyle"), 3), drawn[3])
    assert len({tuple(d.tolist()) for d in drawn}) == 5


@pytest.mark.parametrize(
    "other",
    [
        lambda: draw(StepRandom(1, "MixStyle")),
        lambda: draw(StepRandom(0, "DSU")),
        lambda: draw(StepRandom(0, "MixStyle"), 1),
        lambda: draw(StepRandom(0, "MixStyle"), place="other"),
        lambda: draw(StepRandom(0, "MixStyle"), shared=True),
    ],
    ids=["seed", "name", "micro-batch", "place", "shared"],
)
def test_everything_that_may_differ_makes_a_difference(other):
    assert not torch.equal(draw(StepRandom(0, "MixStyle")), other())


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    draw(StepRandom(0, "MixStyle"))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_draws_at_one_place_differ():
    random = StepRandom(0, "MixStyle")
    assert not torch.equal(draw(random), random.draw("layer", CPU, sample))


def test_a_recomputation_sees_the_draw_of_the_forward_pass():
    random = StepRandom(0, "MixStyle")
    first = draw(random)
    random.end_forward()
    assert random.draw("layer", CPU, sample) is first
    assert random.draw("layer", CPU, sample) is first
    assert not torch.equal(draw(random, 1), first)


def test_recomputing_a_layer_that_ran_twice_is_refused():
    random = StepRandom(0, "MixStyle")
    draw(random)
    random.draw("layer", CPU, sample)
    random.end_forward()
    with pytest.raises(
        DebiasError, match="'layer' to run once in a step with activation checkpointing, but it ran 2 times"
    ):
        random.draw("layer", CPU, sample)


def _draws(rank):
    random = StepRandom(0, "MixStyle")
    return draw(random), draw(random, shared=True)


def test_ranks_draw_differently_unless_the_draw_is_shared(ranks):
    (own, shared), (other, same) = ranks.run(_draws)
    assert not torch.equal(own, other)
    assert torch.equal(shared, same)
    assert torch.equal(own, draw(StepRandom(0, "MixStyle")))


def test_a_compiled_layer_draws_as_a_plain_one():
    random = StepRandom(0, "MixStyle")

    def layer(x):
        return x * random.draw("layer", CPU, sample)

    x = torch.ones(4, requires_grad=True)
    random.start(0)
    plain = layer(x)
    torch._dynamo.reset()
    random.start(0)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(x), plain, rtol=0, atol=0)


X = torch.randn(64, 2, 3, 3, generator=torch.Generator().manual_seed(0))
ADV_STYLE = AdvStyleLayer(2)
DOMAINS = torch.arange(64) % 2
LABELS = torch.arange(64) // 2 % 2


def dsu():
    method = DSU(p=1.0)
    method.random.start(0)
    return method.change(X, "layer")


def mixstyle():
    method = MixStyle(domain="site")
    method.random.start(0)
    return torch.stack(method._draw("layer", CPU, 512, torch.arange(512) % 2, shared=False))


def crafted_shifts():
    pytest.importorskip("kornia", reason="crafted shifts need Python 3.11")
    return CraftedShifts()._draw(512, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize(
    "drawn",
    [
        lambda: GroupMixupLayer("same_label")(X, LABELS, DOMAINS)[1],
        lambda: MixStyleLayer(p=0.99)(X, DOMAINS),
        lambda: DSULayer(p=0.99)(X),
        lambda: ADV_STYLE(X),
        crafted_shifts,
        dsu,
        mixstyle,
    ],
    ids=["GroupMixup", "MixStyleLayer", "DSULayer", "AdvStyleLayer", "CraftedShifts", "DSU", "MixStyle"],
)
def test_the_default_dtype_does_not_change_draws(drawn):
    """`precision="bf16-true"` sets it in a step; bfloat16 has 256 numbers in [0, 1), and ties are not fair."""

    def run(seed, dtype):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            return drawn()
        finally:
            torch.set_default_dtype(torch.float32)

    for seed in range(3):
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(run(seed, dtype), run(seed, torch.float32))
