"""Criteria for rare classes against their worked examples, autograd and loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from _support.fits import Classifier, deviation, parameters, problem, train
from debias import LDAM, ClassBalanced, CosineLinear, FocalLoss, LogitAdjustment
from debias.errors import DebiasError
from debias.functional import class_balanced_weights, focal_loss, ldam_loss, ldam_margins, logit_adjustment

N = torch.tensor([5000.0, 500, 50], dtype=torch.float64)
Z = torch.tensor([[0.2, 0.1, 0.3]], dtype=torch.float64)
Y = torch.tensor([2])


def test_worked_examples():
    assert F.cross_entropy(Z, Y).item() == pytest.approx(1.001943, abs=1e-6)
    assert F.cross_entropy(Z + logit_adjustment(N), Y).item() == pytest.approx(4.601875, abs=1e-6)
    assert F.cross_entropy(Z + N.log(), Y).item() == pytest.approx(4.601875, abs=1e-6)  # the balanced softmax
    margins = ldam_margins(N)
    assert margins.tolist() == pytest.approx([0.1581, 0.2812, 0.5], abs=5e-5)
    assert ldam_loss(Z, Y, margins).item() == pytest.approx(12.048593, abs=1e-6)
    assert ldam_loss(Z, Y, 0 * margins).item() == pytest.approx(0.050946, abs=1e-6)
    assert class_balanced_weights(N, beta=0.9999).tolist() == pytest.approx([0.0341, 0.2752, 2.6907], abs=5e-5)
    assert class_balanced_weights(N, beta=0.999).tolist() == pytest.approx([0.1256, 0.3170, 2.5574], abs=5e-5)
    assert focal_loss(Z, Y, gamma=1).item() == pytest.approx(0.634064, abs=1e-6)
    assert focal_loss(Z, Y, gamma=2).item() == pytest.approx(0.401258, abs=1e-6)


def test_class_balanced_weights_against_a_loop():
    for beta in (0.0, 0.9, 0.999):
        raw = [(1 - beta) / (1 - beta**n) for n in N.tolist()]
        expected = [3 * r / sum(raw) for r in raw]
        assert class_balanced_weights(N, beta=beta).tolist() == pytest.approx(expected, rel=1e-12)
    assert class_balanced_weights(torch.tensor([7.0, 0.0])).tolist() == pytest.approx([2, 0])
    assert class_balanced_weights(torch.tensor([7, 0]), beta=0.0).tolist() == [2, 0]
    # Counts are integers, as torch.bincount gives them.
    assert class_balanced_weights(N.long()).tolist() == pytest.approx(class_balanced_weights(N).tolist(), rel=1e-5)


def test_ldam_against_a_loop():
    z = torch.tensor([[0.9, -0.2, 0.1], [0.3, 0.5, 0.4]], dtype=torch.float64)
    y, m = [1, 2], ldam_margins(N).tolist()
    for i in range(2):
        logits = [30 * (z[i, c].item() - (m[c] if c == y[i] else 0)) for c in range(3)]
        expected = math.log(math.fsum(math.exp(x - logits[y[i]]) for x in logits))
        found = ldam_loss(z, torch.tensor(y), torch.tensor(m, dtype=torch.float64))[i].item()
        assert found == pytest.approx(expected, rel=1e-12)


def test_focal_loss_of_binary_outputs_and_of_certain_ones():
    z = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)
    p = torch.where(y > 0, z.sigmoid(), 1 - z.sigmoid())
    torch.testing.assert_close(focal_loss(z, y, gamma=1.5), -((1 - p) ** 1.5) * p.log())
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, y, gamma=2.0), z)
    # p is 1 to rounding: the factor is still that of the loss, 1 - p = l to first order
    small = focal_loss(torch.tensor([40.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64), gamma=1.0)
    assert small.item() == pytest.approx(math.exp(-80), rel=1e-6)


def test_the_adjusted_loss_is_minimal_at_balanced_probabilities():
    """Trained to the end on one input with labels in proportion to N, the logits do not lean to any class."""
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    pi = (N / N.sum()).unsqueeze(0)
    F.cross_entropy(z + logit_adjustment(N), pi).backward()
    assert z.grad.abs().max() < 1e-12
    assert logit_adjustment(torch.tensor([3.0, 0.0])).isfinite().all()


# -- the callbacks against modules whose own loss is the criterion -----------------------------------


class Own(Classifier):
    """Writes the criterion itself."""

    def __init__(self, criterion, head=None, scale=1.0):
        super().__init__()
        self.criterion, self.scale = criterion, scale
        if head is not None:
            self.head = head

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.scale * self.criterion(self(x), y, self.current_epoch)


def plain(z, y, epoch):
    return F.cross_entropy(z, y)


COUNTS = torch.bincount(problem()[:][1], minlength=2).double()
PI = (COUNTS / COUNTS.sum()).log()
BALANCED = class_balanced_weights(COUNTS, beta=0.9)
CALLBACKS = {
    "logit adjustment": (lambda: LogitAdjustment(2, tau=1.5), lambda z, y, e: F.cross_entropy(z + 1.5 * PI, y)),
    "class balanced": (lambda: ClassBalanced(2, beta=0.9), lambda z, y, e: F.cross_entropy(z, y, weight=BALANCED)),
    "deferred": (
        lambda: ClassBalanced(2, beta=0.9, start_epoch=1),
        lambda z, y, e: F.cross_entropy(z, y, weight=BALANCED if e else None),
    ),
    "focal": (lambda: FocalLoss(1.5), lambda z, y, e: focal_loss(z, y, gamma=1.5).mean()),
    "counts given": (
        lambda: LogitAdjustment(2, class_counts=[9, 1]),
        lambda z, y, e: F.cross_entropy(z + torch.tensor([0.9, 0.1], dtype=torch.float64).log(), y),
    ),
}


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_callback_is_the_criterion_in_the_step(name, scale):
    callback, criterion = CALLBACKS[name]
    own, watched = Own(criterion, scale=scale), Own(plain, scale=scale)
    train(own, bare=True, max_epochs=3)
    train(watched, [callback()], max_epochs=3)
    assert deviation(parameters(own), parameters(watched)) < 1e-12


def cosines():
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return CosineLinear(6, 2).double()


@pytest.mark.parametrize("start", [None, 1])
def test_ldam_with_a_cosine_head(start):
    def criterion(z, y, epoch):
        losses = ldam_loss(z, y, ldam_margins(COUNTS, max_margin=0.3), scale=4.0)
        weights = BALANCED[y] if start is not None and epoch >= start else torch.ones(len(y), dtype=torch.float64)
        return (weights * losses).sum() / weights.sum()

    own, watched = Own(criterion, cosines()), Own(plain, cosines())
    train(own, bare=True, max_epochs=3)
    train(watched, [LDAM(2, max_margin=0.3, scale=4.0, beta=0.9, reweight_epoch=start)], max_epochs=3)
    assert deviation(parameters(own), parameters(watched)) < 1e-12
    assert (cosines()(torch.randn(5, 6).double()).abs() <= 1).all()


@pytest.mark.parametrize("choice", [1, lambda call: call.name == "cross_entropy"])
def test_one_of_several_losses_is_replaced_and_keeps_its_factor(choice):
    def auxiliary(z):
        return 0.3 * F.mse_loss(z, torch.ones_like(z))

    own = Own(lambda z, y, e: auxiliary(z) + 0.5 * F.cross_entropy(z + PI, y))
    watched = Own(lambda z, y, e: auxiliary(z) + 0.5 * F.cross_entropy(z, y))
    train(own, bare=True, max_epochs=3)
    train(watched, [LogitAdjustment(2, loss=choice)], max_epochs=3)
    assert deviation(parameters(own), parameters(watched)) < 1e-12
    with pytest.raises(DebiasError, match="compute one loss for LogitAdjustment, but got 2"):
        train(watched, [LogitAdjustment(2)])


def test_bad_input():
    with pytest.raises(DebiasError, match=r"logits that are cosines for LDAM.*CosineLinear"):
        train(Own(lambda z, y, e: F.cross_entropy(9 + z, y)), [LDAM(2)])
    with pytest.raises(DebiasError, match="`n_classes=3`"):
        train(Own(plain), [LogitAdjustment(3, class_counts=[1, 1, 1])])
    with pytest.raises(DebiasError, match="cross-entropy over"):
        train(Own(lambda z, y, e: F.mse_loss(z[:, 0], y.double())), [ClassBalanced(2)])
    with pytest.raises(DebiasError, match=r"training samples.*renumber the classes, so that `n_classes` counts"):
        train(Own(plain), [ClassBalanced(3)])
    with pytest.raises(DebiasError, match="`beta`"):
        ClassBalanced(2, beta=1.0)
