"""Learning from Failure: the worked example, and generalised cross-entropy against autograd."""

import pytest
import torch
import torch.nn.functional as F

from debias.functional import failure_weights, generalized_cross_entropy

CLASSES = torch.tensor([0, 0, 1, 1])
STEP_2 = torch.tensor([0.05, 2.4, 0.1, 1.4], dtype=torch.float64), torch.tensor([0.4, 0.7, 0.3, 0.6]).double()


def class_maximum(x):
    return torch.stack([x[c == CLASSES].max() for c in CLASSES])


def test_worked_example():
    first = torch.tensor([0.1, 2, 0.2, 1], dtype=torch.float64), torch.tensor([0.5, 1, 0.4, 0.8], dtype=torch.float64)
    a_b, a_d = (0.7 * x + 0.3 * y for x, y in zip(first, STEP_2, strict=True))
    assert a_b.tolist() == pytest.approx([0.085, 2.12, 0.17, 1.12])
    assert a_d.tolist() == pytest.approx([0.47, 0.91, 0.37, 0.74])
    w = failure_weights(a_b, a_d, biased_scale=class_maximum(a_b), main_scale=class_maximum(a_d))
    assert w.tolist() == pytest.approx([0.0720, 0.5, 0.2329, 0.5], abs=5e-5)
    assert failure_weights(*STEP_2).tolist() == pytest.approx([0.111, 0.774, 0.25, 0.7], abs=5e-4)


def test_two_losses_of_zero_have_no_weight():
    zeros = torch.zeros(2)
    assert failure_weights(zeros, zeros, biased_scale=zeros, main_scale=zeros).tolist() == [0, 0]


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_generalised_cross_entropy(q):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(6, 3, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(3, (6,), generator=g)
    p = z.softmax(1).gather(1, y[:, None]).squeeze(1)
    torch.testing.assert_close(generalized_cross_entropy(z, y, q=q), (1 - p**q) / q)
    (grad,) = torch.autograd.grad(generalized_cross_entropy(z, y, q=q).sum(), z)
    (plain,) = torch.autograd.grad((p.detach() ** q * F.cross_entropy(z, y, reduction="none")).sum(), z)
    torch.testing.assert_close(grad, plain)
    assert torch.autograd.gradcheck(lambda z: generalized_cross_entropy(z, y, q=q), z)


def test_it_goes_to_cross_entropy():
    z, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    torch.testing.assert_close(
        generalized_cross_entropy(z, y, q=1e-9), F.cross_entropy(z, y, reduction="none"), rtol=1e-6, atol=1e-8
    )
