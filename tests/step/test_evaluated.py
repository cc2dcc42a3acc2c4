"""What an evaluation step shows of its losses: elements that count, and predictions from before the criterion."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from debias.tap.predictions import Evaluated
from debias.tap.rows import RowTracker
from debias.tap.tap import LossTap

g = torch.Generator().manual_seed(0)
N, K = 6, 3
X, PRIOR = torch.randn(N, 4, generator=g), torch.randn(K, generator=g)
Y, CLASSES = (torch.rand(N, K, generator=g) > 0.5).float(), torch.arange(N) % K
KNOWN = torch.rand(N, K, generator=g) > 0.4
WEIGHT = nn.Parameter(torch.randn(K, generator=g))
SCALE = nn.Parameter(torch.tensor(1.5))
NET, OTHER = nn.Linear(4, K), nn.Linear(4, K)
with torch.no_grad():
    RAW, TWO = NET(X), NET(X) + OTHER(X)


def logged_unmasked():
    made = losses()
    made.mean(), made.detach().clone(), made.sum().isfinite()
    return (made * KNOWN).sum() / KNOWN.sum()


def logged_twice():
    made = losses()
    return (made * KNOWN).sum() / KNOWN.sum(), made.mean()


def call_of(step, *modules):
    """The loss of a step under inference mode, and what was counted and predicted."""
    tap = LossTap(training=False, evaluated=Evaluated())

    def saw(module, args, kwargs, output):
        tap.evaluated.predictions.saw(args, kwargs, output)

    handles = [m.register_forward_hook(saw, with_kwargs=True) for m in (NET, OTHER, *modules)]
    try:
        with torch.inference_mode(), tap:
            tap.evaluated.elements.returned = step()
    finally:
        for handle in handles:
            handle.remove()
    (call,) = tap.calls
    found = call.predicted, call.from_labels, call.counted
    tap.close()
    return found


# ---------------------------------------------------------------------------------------------------- what counts


def losses():
    return F.binary_cross_entropy_with_logits(NET(X), Y, reduction="none")


def in_place_product():
    made = losses()
    made *= KNOWN
    return made.sum()


def assigned():
    made = losses()
    made[~KNOWN] = 0
    return made.mean()


def focal():
    made = losses()
    return ((1 - torch.exp(-made)) ** 2 * made * KNOWN).mean()


def kept_in_a_table():
    """By class, as to log them: what is written there, or read by numbers of the losses, leaves no element out."""
    made = losses() * KNOWN
    table = torch.zeros(K)
    for k in range(K):
        table[k] = made[:, k].mean()
    table.masked_fill(table > 9, made.mean())
    torch.arange(99)[(made[:2, 0] * 9).long()]
    return made.sum()


def used_twice():
    made = losses() * KNOWN
    made.max()
    return made.sum(1), made.sum() / KNOWN.sum()


ROWS = KNOWN[:, :1].expand(N, K)
MASKED = {
    "product": (lambda: (losses() * KNOWN).sum() / KNOWN.sum(), KNOWN),
    "mask first": (lambda: (KNOWN.float() * losses()).mean(), KNOWN),
    "functions": (lambda: torch.sum(torch.mul(losses(), KNOWN)), KNOWN),
    "selection": (lambda: losses()[KNOWN].mean(), KNOWN),
    "masked_select": (lambda: torch.masked_select(losses(), KNOWN).mean(), KNOWN),
    "rows of means": (lambda: losses().mean(1)[KNOWN[:, 0]].mean(), ROWS),
    "mean of a sample's, then rows": (
        lambda: ((losses() * KNOWN).sum(1) / KNOWN.sum(1))[KNOWN[:, 0]].mean(), KNOWN & ROWS
    ),
    "keepdim": (lambda: (losses().sum(1, keepdim=True) * KNOWN[:, :1]).mean(), ROWS),
    "transposed": (lambda: (losses().T.reshape(-1) * KNOWN.T.reshape(-1)).sum(), KNOWN),
    "split": (lambda: [part.mean() for part in (losses() * KNOWN).split(2)], KNOWN),
    "mask as the losses are": (
        lambda: (lambda ce: (ce * KNOWN.to(ce)).sum() / KNOWN.type_as(ce).sum())(losses()), KNOWN
    ),
    "beside what is logged": (logged_unmasked, KNOWN),
    "masked_fill": (lambda: losses().masked_fill(~KNOWN, 0).sum(), KNOWN),
    "masked_fill by keywords": (
        lambda: losses().masked_fill(value=torch.zeros(()), mask=~KNOWN).sum(), KNOWN
    ),
    "kept in a table": (kept_in_a_table, KNOWN),
    "where": (lambda: torch.where(KNOWN, losses(), 0.0).sum(), KNOWN),
    "where a tensor": (lambda: torch.where(~KNOWN, torch.zeros(N, K), losses()).sum(), KNOWN),
    "its own where": (lambda: losses().where(KNOWN, torch.zeros(())).sum(), KNOWN),
    "in place": (in_place_product, KNOWN),
    "assigned": (assigned, KNOWN),
    "weights": (lambda: (losses() * (KNOWN * 2.5)).sum(), KNOWN),
    "divided by its size": (lambda: (losses() * (KNOWN / KNOWN.sum())).sum(), KNOWN),
    "weight=": (lambda: F.binary_cross_entropy_with_logits(NET(X), Y, weight=KNOWN.float()), KNOWN),
    "weight= and unreduced": (
        lambda: F.binary_cross_entropy_with_logits(NET(X), Y, weight=KNOWN.float(), reduction="none")[:, 0].sum(),
        KNOWN & torch.tensor([True, False, False]),
    ),
    "nanmean": (
        lambda: F.mse_loss(NET(X), torch.where(KNOWN, Y, torch.nan), reduction="none").nanmean(), KNOWN
    ),
    "nan_to_num": (
        lambda: F.mse_loss(NET(X), torch.where(KNOWN, Y, torch.nan), reduction="none").nan_to_num(0).sum(), KNOWN
    ),
    "focal": (focal, KNOWN),
    "scaled and cast": (lambda: ((losses().double() * KNOWN) / 3).sum(), KNOWN),
    "reduced by what is not followed": (
        lambda: torch.zeros(K).index_add_(0, CLASSES, losses().mul(KNOWN).sum(1)), KNOWN
    ),
    "two ends": (used_twice, KNOWN),
    "where the network makes no error": (
        lambda: (F.mse_loss(NET(X), RAW, reduction="none") * KNOWN).sum(), KNOWN
    ),
    "ignore_index": (
        lambda: F.cross_entropy(NET(X), CLASSES.masked_fill(CLASSES == 1, -100)), CLASSES != 1
    ),
    "a class without weight": (
        lambda: F.cross_entropy(NET(X), CLASSES, weight=torch.tensor([0.0, 1.0, 2.0])), CLASSES != 0
    ),
    "tokens": (
        lambda: (F.cross_entropy(NET(X), CLASSES, reduction="none").view(2, 3) * KNOWN[:2]).sum(1).mean(),
        KNOWN[:2].reshape(-1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MASKED)
def test_what_the_step_leaves_out_does_not_count(case):
    step, expected = MASKED[case]
    assert torch.equal(call_of(step)[2], expected)


ALL = {
    "mean": lambda: losses().mean(),
    "reduced by torch": lambda: F.binary_cross_entropy_with_logits(NET(X), Y),
    "a regulariser": lambda: losses().mean() + NET.weight.square().sum(),
    "weights that are not 0": lambda: (losses() * torch.rand(N, K)).sum(),
    "nothing": lambda: losses(),
    "logged masked and unmasked": logged_twice,
}


@pytest.mark.parametrize("case", ALL)
def test_all_elements_count(case):
    counted = call_of(ALL[case])[2]
    assert counted is None or bool(counted.all())


def test_a_factor_of_zero_where_the_loss_is_zero_leaves_nothing_out():
    """As that of a focal loss in the batch that the network is sure of; a mask leaves out such elements as well."""
    sure = torch.tensor([[30.0, -1.0], [30.0, 0.5]])
    y, mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])

    def step(factor):
        made = F.binary_cross_entropy_with_logits(sure, y, reduction="none")
        return (factor * made).mean()

    certain = (1 - torch.where(y > 0, sure.sigmoid(), 1 - sure.sigmoid())) ** 2
    assert (certain == 0).any()
    assert call_of(lambda: step(certain))[2].all()
    assert torch.equal(call_of(lambda: step(mask))[2], mask.bool())


def test_the_same_loss_reduced_in_parts_counts_in_all_of_them():
    def step():
        made = losses()
        return made[:2].mean(), made[2:5].mean()

    assert torch.equal(call_of(step)[2], (torch.arange(N) < 5)[:, None].expand(N, K))


# ---------------------------------------------------------------------------------------------------- what is predicted


class Margin(nn.Module):
    def forward(self, logits, target):
        return 4 * (logits - 0.5 * F.one_hot(target, K))


class Arc(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, 4))

    def forward(self, features, target):
        return F.linear(features, self.weight) - 0.5 * F.one_hot(target, K)


class Criterion(nn.Module):
    def forward(self, logits, target):
        return F.cross_entropy(logits + PRIOR, target)


def cross_entropy(change, target=CLASSES):
    return lambda: F.cross_entropy(change(NET(X)), target)


def added_in_place(logits):
    logits += PRIOR
    return logits


def subtracted_at_the_label(logits):
    logits[torch.arange(N), CLASSES] -= 0.5
    return logits


MASK = torch.tensor([0.0, -1e9, 0.0])


def masked_and_added_in_place(logits):
    logits = logits / 2
    logits += MASK
    logits += PRIOR
    return logits


def an_output_masked_and_added_in_place(logits):
    logits += MASK
    logits -= PRIOR
    return logits


def without_first_class(z):
    z[:, 0] = -1e9
    return z


def assigned_to_zeros(logits):
    made = torch.zeros_like(logits)
    made[: N // 2], made[N // 2 :] = logits[: N // 2], logits[N // 2 :]
    return made


def difference_of_columns(logits):
    return logits[:, [2, 0]] - logits[:, [0, 2]]


def chosen(logits):
    return 3 * torch.where(F.one_hot(CLASSES, K).bool(), logits - 0.5, logits)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("offset", PRIOR)

    def forward(self, features):
        return features[:, :K] @ torch.ones(K, K) + self.offset


class Opaque(nn.Module):
    """Computes where no function of torch is called, as compiled code does."""

    def forward(self, features, target):
        return torch.from_numpy(features.numpy()[:, :K] - 0.5)


MARGIN, ARC, CRITERION, SHIFTED, OPAQUE = Margin(), Arc(), Criterion(), Shifted(), Opaque()
CHANGED = {
    "prior": (cross_entropy(lambda z: z + PRIOR), RAW),
    "prior as the logits are": (cross_entropy(lambda z: z + PRIOR.double().to(z).expand_as(z)), RAW),
    "prior of the logits' kind": (cross_entropy(lambda z: z + z.new_tensor(PRIOR.tolist())), RAW),
    "margin scattered": (cross_entropy(lambda z: z - 2 * torch.zeros_like(z).scatter_(1, CLASSES[:, None], 1)), RAW),
    "mask of the logits' kind": (
        cross_entropy(lambda z: z + (1 - torch.tensor([1, 0, 1]).type_as(z)) * torch.finfo(z.dtype).min),
        RAW + torch.tensor([0, 1, 0]) * torch.finfo(RAW.dtype).min,
    ),
    "margin before a learned scale": (
        cross_entropy(lambda z: SCALE * (z - 0.5 * F.one_hot(CLASSES, K))),
        SCALE.detach() * RAW,
    ),
    "prior before a learned temperature": (
        cross_entropy(lambda z: (z + PRIOR) / SCALE.exp()),
        RAW / SCALE.detach().exp(),
    ),
    "prior before a difference": (
        cross_entropy(lambda z: difference_of_columns(z + PRIOR), CLASSES % 2),
        difference_of_columns(RAW),
    ),
    "subtracted from a prior": (cross_entropy(lambda z: PRIOR - z), -RAW),
    "subtracted from a number": (lambda: F.binary_cross_entropy_with_logits(1 - NET(X), Y), 1 - RAW),
    "another number for the label": (
        cross_entropy(lambda z: F.one_hot(CLASSES, K) * (0.9 * z) + (1 - F.one_hot(CLASSES, K)) * z),
        RAW,
    ),
    "prior, then made finite": (cross_entropy(lambda z: (z + PRIOR).nan_to_num()), RAW),
    "prior, then a class masked in place": (
        cross_entropy(lambda z: (z + PRIOR).index_fill_(1, torch.tensor([0]), -1e9)),
        RAW.index_fill(1, torch.tensor([0]), -1e9),
    ),
    "prior, then negated in place": (cross_entropy(lambda z: (z + PRIOR).neg_()), -RAW),
    "prior, then bounded": (cross_entropy(lambda z: F.hardtanh(z + PRIOR, -9.0, 9.0)), RAW),
    "prior first": (cross_entropy(lambda z: torch.add(PRIOR, z)), RAW),
    "prior in place": (cross_entropy(added_in_place), RAW),
    "mask and prior": (cross_entropy(lambda z: z + MASK + PRIOR), RAW + MASK),
    "prior and mask": (cross_entropy(lambda z: MASK + (PRIOR + z)), RAW + MASK),
    "mask and prior in place": (cross_entropy(masked_and_added_in_place), RAW / 2 + MASK),
    "mask and prior in place of an output": (cross_entropy(an_output_masked_and_added_in_place), RAW + MASK),
    "mask, shaped": (cross_entropy(lambda z: (z.view(2, 3, K) + MASK).view(-1, K) + PRIOR), RAW + MASK),
    "difference of masked columns": (
        cross_entropy(lambda z: difference_of_columns(z + MASK), CLASSES % 2),
        difference_of_columns(RAW),
    ),
    "mask alone": (cross_entropy(lambda z: z + MASK), RAW + MASK),
    "margin at the label": (cross_entropy(subtracted_at_the_label), RAW),
    "margin and scale": (cross_entropy(lambda z: 8 * (z - 0.5 * F.one_hot(CLASSES, K))), 8 * RAW),
    "chosen by the label": (cross_entropy(chosen), 3 * RAW),
    "pooled, then a margin": (
        cross_entropy(lambda z: torch.stack([z, z - 1], 2).max(2).values - 0.5 * F.one_hot(CLASSES, K)),
        RAW,
    ),
    "two networks and a prior": (lambda: F.cross_entropy((NET(X) + OTHER(X)) / 2 + PRIOR, CLASSES), TWO / 2),
    "several networks and a prior": (
        lambda: F.cross_entropy(torch.stack([NET(X), OTHER(X)]).sum(0) + PRIOR, CLASSES),
        TWO,
    ),
    "log-probabilities": (lambda: F.nll_loss((NET(X) + PRIOR).log_softmax(1), CLASSES), RAW.log_softmax(1)),
    "reshaped": (lambda: F.cross_entropy((NET(X).view(2, 3, K) + PRIOR).view(-1, K), CLASSES), RAW),
    "offset of a binary logit": (lambda: F.binary_cross_entropy_with_logits(NET(X) - 0.3, Y), RAW),
    "criterion": (lambda: CRITERION(NET(X), CLASSES), RAW),
    "margin of a child": (lambda: F.cross_entropy(MARGIN(NET(X), CLASSES), CLASSES), 4 * RAW),
    "margin of a child, labels flattened": (
        lambda: F.cross_entropy(MARGIN(NET(X), CLASSES), CLASSES.view(2, -1).view(-1)),
        4 * RAW,
    ),
    "margin of a layer": (lambda: F.cross_entropy(ARC(X, CLASSES), CLASSES), X @ ARC.weight.detach().T),
    "no module": (lambda: F.cross_entropy(X @ NET.weight.T + PRIOR, CLASSES), X @ NET.weight.detach().T),
}


@pytest.mark.parametrize("case", CHANGED)
def test_predictions_are_those_from_before_the_criterion(case):
    step, expected = CHANGED[case]
    predicted, from_labels, _ = call_of(step, MARGIN, ARC, CRITERION)
    torch.testing.assert_close(predicted, expected)
    assert not from_labels


KEPT = {
    "plain": cross_entropy(lambda z: z),
    "temperature": cross_entropy(lambda z: z / 2),
    "learned offset": cross_entropy(lambda z: z + WEIGHT),
    "learned offset, reshaped": cross_entropy(lambda z: z + WEIGHT.view(1, K).exp()),
    "skip connection": cross_entropy(lambda z: z + X @ OTHER.weight.T),
    "activation": cross_entropy(lambda z: z * torch.relu(OTHER(X))),
    "a child with buffers": lambda: F.cross_entropy(SHIFTED(X), CLASSES),
    "masked classes": cross_entropy(lambda z: z.masked_fill(torch.tensor([True, False, False]), -1e9)),
    "masked by where": cross_entropy(lambda z: torch.where(torch.tensor([True, True, False]), z, -1e9)),
    "a class that is assigned a number": cross_entropy(without_first_class),
    "classes set to a number": cross_entropy(lambda z: z.index_fill(1, torch.tensor([0]), -1e9)),
    "difference of columns": cross_entropy(difference_of_columns, CLASSES % 2),
    "sum of columns": cross_entropy(lambda z: torch.stack([sum([z[:, 0], z[:, 1]]), z[:, 2]], 1), CLASSES % 2),
    "brought to probabilities": lambda: F.binary_cross_entropy((NET(X).tanh() + 1) / 2, Y),
    "one minus a probability": lambda: F.binary_cross_entropy(1 - NET(X).sigmoid(), Y),
    "put into zeros": cross_entropy(lambda z: z.new_zeros(N, K).index_copy_(0, torch.arange(N), z)),
    "assigned to zeros": cross_entropy(lambda z: assigned_to_zeros(z)),
    "two networks": lambda: F.cross_entropy(NET(X) + OTHER(X), CLASSES),
    "scaled to the units of a number": lambda: F.mse_loss(NET(X) * torch.rand(K) + PRIOR, Y),
    "probabilities": lambda: F.nll_loss(NET(X).softmax(1).log(), CLASSES),
}


@pytest.mark.parametrize("case", KEPT)
def test_logits_that_are_the_prediction_are_left_alone(case):
    assert call_of(KEPT[case], SHIFTED)[:2] == (None, False)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_a_loss_has_read_is_kept_when_the_step_changes_it_afterwards(mode):
    order = torch.arange(N).flip(0)
    with mode():
        x, y = X.clone(), CLASSES.clone()
        with LossTap(training=False, tracker=RowTracker((x, y), N)) as tap:
            logits, labels = NET(x[order]), y[order]
            made = F.cross_entropy(logits, labels, reduction="none")
            before = logits.clone(), labels.clone(), made.clone()
            made.zero_(), logits.sigmoid_(), labels.zero_()
    (call,) = tap.calls
    torch.testing.assert_close((call.logits, call.target, call.num), before)
    assert torch.equal(call.rows, order)


def test_losses_that_the_step_reduces_itself_are_not_divided_by_the_weights_of_their_classes():
    with LossTap(training=False) as tap:
        value = F.cross_entropy(NET(X), CLASSES, weight=torch.tensor([0.5, 1.0, 2.0]), reduction="none").mean()
    (call,) = tap.calls
    torch.testing.assert_close(call.num.sum() / call.den.sum(), value)


def test_what_was_predicted_is_kept_when_the_step_changes_it_afterwards():
    def step():
        logits = NET(X)
        F.cross_entropy(logits + PRIOR, CLASSES)
        logits.sigmoid_()

    torch.testing.assert_close(call_of(step)[0], RAW)


def test_logits_of_a_child_that_was_given_the_labels():
    assert call_of(lambda: F.cross_entropy(OPAQUE(X, CLASSES), CLASSES), OPAQUE)[:2] == (None, True)
    assert call_of(lambda: F.cross_entropy(OPAQUE(X, CLASSES), CLASSES.clone()), OPAQUE)[:2] == (None, False)
