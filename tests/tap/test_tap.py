"""The tap changes nothing by itself: every loss variant, in any call style, keeps its value and its gradients."""

import gc
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from debias.errors import RowsError, UntappedLossError
from debias.tap.rows import RowTracker
from debias.tap.selection import reaching
from debias.tap.tap import LossTap

# Torch says so whenever its legacy arguments are used, and they are part of what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")

N, C, D = 7, 4, 3
generator = torch.Generator().manual_seed(0)


def rand(*shape, **kwargs):
    return torch.rand(*shape, generator=generator, dtype=torch.float64, **kwargs)


X = rand(N, C) - 0.5
Y = torch.tensor([0, 1, 2, 3, 0, -100, 2])
YC = torch.tensor([0, 1, 2, 3, 0, 1, 2])
W = rand(C) + 0.1
SOFT = torch.softmax(rand(N, C), 1)
PIXELS, PIXEL_TARGET = rand(N, C, D, D), torch.randint(0, C, (N, D, D), generator=generator)
PIXEL_IGNORED = torch.where(rand(N, D, D) < 0.3, 255, PIXEL_TARGET)
MASK = (rand(N) > 0.4).double()
MULTI = (rand(N, C) > 0.5).double()
SAMPLE_WEIGHT = rand(N) + 0.5

VARIANTS = {
    "ce": (X, lambda x: F.cross_entropy(x, YC)),
    "ce module": (X, lambda x: nn.CrossEntropyLoss()(x, YC)),
    "ce keywords": (X, lambda x: F.cross_entropy(input=x, target=YC)),
    "ce weight": (X, lambda x: F.cross_entropy(x, YC, weight=W)),
    "ce ignore": (X, lambda x: F.cross_entropy(x, Y)),
    "ce weight ignore smooth": (X, lambda x: F.cross_entropy(x, Y, weight=W, label_smoothing=0.1)),
    "ce smooth": (X, lambda x: F.cross_entropy(x, YC, label_smoothing=0.2)),
    "ce soft": (X, lambda x: F.cross_entropy(x, SOFT)),
    "ce soft weight smooth": (X, lambda x: F.cross_entropy(x, SOFT, weight=W, label_smoothing=0.1)),
    "ce sum": (X, lambda x: F.cross_entropy(x, Y, weight=W, reduction="sum")),
    "ce unbatched": (X[0], lambda x: F.cross_entropy(x, YC[0])),
    "ce pixels": (PIXELS, lambda x: F.cross_entropy(x, PIXEL_TARGET, weight=W)),
    "ce pixels ignore": (PIXELS, lambda x: F.cross_entropy(x, PIXEL_IGNORED, ignore_index=255, label_smoothing=0.1)),
    "ce legacy sum": (X, lambda x: F.cross_entropy(x, YC, size_average=False)),
    "ce legacy none mean": (X, lambda x: F.cross_entropy(x, YC, reduce=False).mean()),
    "nll": (X, lambda x: F.nll_loss(x.log_softmax(1), Y, weight=W)),
    "nll module": (PIXELS, lambda x: nn.NLLLoss(ignore_index=255)(x.log_softmax(1), PIXEL_IGNORED)),
    "bce": (X, lambda x: F.binary_cross_entropy(x.sigmoid(), MULTI, weight=W)),
    "bce logits": (X, lambda x: F.binary_cross_entropy_with_logits(x, MULTI, pos_weight=W)),
    "bce logits weight sum": (X, lambda x: F.binary_cross_entropy_with_logits(x, MULTI, weight=W, reduction="sum")),
    "mse": (X, lambda x: F.mse_loss(x, SOFT)),
    "mse weight": (X, lambda x: F.mse_loss(x, SOFT, weight=MULTI + 0.5)),
    "mse module none": (X, lambda x: nn.MSELoss(reduction="none")(x, SOFT).mean()),
    "l1": (X, lambda x: F.l1_loss(x, SOFT)),
    "smooth l1": (X, lambda x: F.smooth_l1_loss(x, SOFT, beta=0.3)),
    "huber weight": (X, lambda x: F.huber_loss(x, SOFT, delta=0.2, weight=MULTI + 0.5)),
    "huber": (X, lambda x: F.huber_loss(x, SOFT, delta=0.2)),
    "kl batchmean": (X, lambda x: F.kl_div(x.log_softmax(1), SOFT, reduction="batchmean")),
    "kl sum": (X, lambda x: F.kl_div(x.log_softmax(1), SOFT, reduction="sum")),
    "soft margin": (X, lambda x: F.soft_margin_loss(x, 2 * MULTI - 1)),
    "multi margin": (X, lambda x: F.multi_margin_loss(x, YC)),
    "multilabel soft margin": (X, lambda x: F.multilabel_soft_margin_loss(x, MULTI)),
    "gaussian nll": (X, lambda x: F.gaussian_nll_loss(x, SOFT, torch.ones_like(x))),
    "poisson nll": (X, lambda x: F.poisson_nll_loss(x, SOFT)),
    "none mean": (X, lambda x: F.cross_entropy(x, Y, weight=W, reduction="none").mean()),
    "none torch.mean": (X, lambda x: torch.mean(F.cross_entropy(x, YC, reduction="none"))),
    "none sum": (X, lambda x: F.cross_entropy(x, YC, reduction="none").sum()),
    "none mask own sum": (X, lambda x: (F.cross_entropy(x, YC, reduction="none") * MASK).sum() / MASK.sum()),
    "none mask mean": (X, lambda x: (MASK * F.cross_entropy(x, YC, reduction="none")).mean()),
    "none index": (X, lambda x: F.cross_entropy(x, YC, reduction="none")[MASK > 0].mean()),
    "none where": (X, lambda x: torch.where(MASK > 0, F.cross_entropy(x, YC, reduction="none"), 0.0).sum() / 3),
    "none fill": (X, lambda x: F.cross_entropy(x, YC, reduction="none").masked_fill(MASK < 1, 0).sum() / MASK.sum()),
    "none weights": (X, lambda x: 0.5 * (F.cross_entropy(x, YC, reduction="none") * SAMPLE_WEIGHT).mean()),
    "none rows then mean": (X, lambda x: F.mse_loss(x, SOFT, reduction="none").mean(1).mean()),
    "none flatten sum mean": (PIXELS, lambda x: F.mse_loss(x, x.detach() + 1,
    reduction="none").flatten(1).sum(1).mean()), "focal": (X, lambda x: _focal(x)),
    "scaled plus": (X, lambda x: 0.3 * F.cross_entropy(x, YC) + 0.01 * x.pow(2).sum()),
    "in place": (X, lambda x: F.cross_entropy(x, YC).mul_(0.5).add_(1.0)),
}  # fmt: skip


def _focal(x):
    loss = F.cross_entropy(x, YC, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def _value_and_grad(x, run):
    x = x.clone().requires_grad_()
    loss = run(x)
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


# Sums whose divisor is no number of rows and no sum of weights or of a mask.
UNDIVIDED = {"ce sum", "ce legacy sum", "bce logits weight sum", "kl sum", "none sum", "none where"}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("tracked", [False, True])
def test_a_loss_put_together_again_is_the_original(name, tracked):
    x, run = VARIANTS[name]
    expected = _value_and_grad(x, run)
    x = x.clone().requires_grad_()
    tap = LossTap(tracker=RowTracker((x, YC), N) if tracked and x.ndim > 1 else None)
    with tap:
        loss = run(x)
    torch.testing.assert_close(loss.detach(), expected[0], rtol=0, atol=0)
    found = reaching(tap, loss)
    (call,) = found.calls
    assert not found.lost
    if name in UNDIVIDED:
        with pytest.raises(UntappedLossError, match="divide the sum"):
            found.multiply([call])
        return
    found.multiply([call])
    again = found.replaced([call], call.mean())
    grad = torch.autograd.grad(again, x)
    torch.testing.assert_close((again.detach(), *grad), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_recomputed_without_a_method_that_needs_it(name):
    x, run = VARIANTS[name]
    expected = _value_and_grad(x, run)

    def watched(x):
        with LossTap():
            return run(x)

    for a, b in zip(_value_and_grad(x, watched), expected, strict=True):
        assert torch.equal(a, b)


def test_per_sample_parts_against_a_loop():
    """num and den of every sample equal those of the sample alone, weights, ignored pixels and all."""
    tap = LossTap(tracker=RowTracker((PIXELS, PIXEL_IGNORED), N))
    x = PIXELS.clone().requires_grad_()
    with tap:
        F.cross_entropy(x, PIXEL_IGNORED, weight=W, ignore_index=255)
    (call,) = tap.calls
    for i in range(N):
        kept = PIXEL_IGNORED[i] != 255
        num = sum(
            -W[PIXEL_TARGET[i, a, b]] * PIXELS[i, :, a, b].log_softmax(0)[PIXEL_TARGET[i, a, b]]
            for a, b in kept.nonzero()
        )
        torch.testing.assert_close(call.num[i].detach(), num + torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(call.den[i], W[PIXEL_TARGET[i][kept]].sum())


@pytest.mark.parametrize("end", [lambda ls, m: (ls * m).sum() / m.sum().clamp(min=1), lambda ls, m: ls[m > 0].mean()])
def test_the_mean_of_nothing_is_nothing_where_the_step_reduces(end):
    """The step may have guarded what it divides by; torch's own mean of nothing is NaN."""
    x, none = X.clone().requires_grad_(), torch.zeros(N, dtype=torch.float64)
    with LossTap() as tap:
        end(F.cross_entropy(x, YC, reduction="none"), none)
        F.cross_entropy(x, torch.full((N,), -100))
    assert tap.calls[0].mean().detach().item() == 0
    assert tap.calls[1].mean().isnan()


def test_losses_without_gradient_do_not_count():
    tap = LossTap()
    with tap:
        F.cross_entropy(X, YC)
        with torch.no_grad():
            F.cross_entropy(X.clone().requires_grad_(), YC)
    assert tap.calls == []


def test_evaluation_sees_every_loss_without_computing_anything_more():
    tap = LossTap(training=False)
    with tap, torch.no_grad():
        F.cross_entropy(X, YC)
        F.mse_loss(X, SOFT, reduction="none")
    assert [(call.name, call.logits is X) for call in tap.calls] == [("cross_entropy", True), ("mse_loss", True)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_per_sample_losses_are_at_least_float32(dtype):
    tap = LossTap()
    with tap:
        F.cross_entropy(X.to(dtype).requires_grad_(), YC)
    assert tap.calls[0].num.dtype == torch.float32
    expected = F.cross_entropy(X.to(dtype).float(), YC, reduction="none")
    torch.testing.assert_close(tap.calls[0].num, expected)


def test_autocast_is_off_while_losses_are_taken_apart():
    tap = LossTap()
    x = X.float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), tap:
        F.mse_loss(x, SOFT.float())
        num = tap.calls[0].num
    torch.testing.assert_close(num, F.mse_loss(x, SOFT.float(), reduction="none").sum(1))


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(batch, n, step, rows=None):
    tap = LossTap(tracker=RowTracker(batch, n), rows=rows)
    with tap:
        step()
    call = tap.calls[-1]
    num = call.num  # resolves the rows
    return None if call.rows is None else call.rows.tolist(), num


def test_rows_of_tokens_are_interleaved():
    y = torch.arange(12).view(4, 3) % C
    logits = rand(4, 3, C).requires_grad_()
    rows, _ = _rows((y,), 4, lambda: F.cross_entropy(logits.view(-1, C), y.view(-1)))
    assert rows == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_rows_of_time_first_tokens_are_tiled():
    y = torch.arange(12).view(4, 3) % C
    logits = rand(3, 4, C).requires_grad_()
    rows, _ = _rows((y,), 4, lambda: F.cross_entropy(logits.reshape(-1, C), y.t().reshape(-1)))
    assert rows == [0, 1, 2, 3] * 3


def test_rows_of_time_first_losses_that_are_not_flattened():
    y = torch.arange(8).view(4, 2) % C
    logits = rand(2, C, 4).requires_grad_()
    rows, num = _rows((y,), 4, lambda: F.cross_entropy(logits, y.T))
    assert rows == [0, 1, 2, 3] * 2
    assert num.shape == (8,)


def test_rows_of_two_views_are_tiled():
    y = torch.tensor([0, 1, 2])
    logits = rand(6, C).requires_grad_()
    rows, _ = _rows((y,), 3, lambda: F.cross_entropy(logits, torch.cat([y, y])))
    assert rows == [0, 1, 2, 0, 1, 2]


def test_rows_of_a_shuffled_batch_follow_the_shuffle():
    y = torch.tensor([0, 1, 2])
    order = torch.tensor([2, 0, 1])
    logits = rand(3, C).requires_grad_()
    rows, _ = _rows((y,), 3, lambda: F.cross_entropy(logits, y[order]))
    assert rows == [2, 0, 1]


def test_rows_of_masked_tokens():
    y = torch.tensor([[0, 1], [2, 3], [1, 1]])
    keep = torch.tensor([[True, False], [True, True], [False, False]])
    logits = rand(3, 2, C).requires_grad_()
    rows, _ = _rows((y,), 3, lambda: F.cross_entropy(logits[keep], y[keep]))
    assert rows == [0, 1, 1]


@pytest.mark.parametrize("how", [lambda y: y.roll(1), lambda y: torch.roll(y, 4), lambda y: y.roll(1, 0), torch.flipud])
def test_rows_of_rolled_tokens(how):
    """Without an axis the elements of all rows are rolled as one."""
    y = rand(2, 3)
    rows, _ = _rows((y,), 2, lambda: F.mse_loss(rand(2, 3).requires_grad_(), how(y)))
    assert torch.equal(
        torch.tensor(rows).view(2, -1), how(torch.arange(2).repeat_interleave(3).view(2, 3))[:, : len(rows) // 2]
    )


def test_rows_of_contrastive_pairs_come_from_the_concatenated_views():
    first, second = rand(3, 5), rand(3, 5)
    net = nn.Linear(5, 5).double()

    def step():
        z = net(torch.cat([first, second]))
        F.cross_entropy(z @ z.mT, torch.arange(6).roll(3))

    rows, _ = _rows((first, second), 3, step)
    assert rows == [0, 1, 2, 0, 1, 2]


def test_rows_of_lists_with_one_element_per_image():
    labels = [torch.tensor([0, 1, 2]), torch.tensor([3])]
    logits = rand(4, C).requires_grad_()
    rows, _ = _rows(([rand(3, 2, 2), rand(3, 2, 2)], labels), 2, lambda: F.cross_entropy(logits, torch.cat(labels)))
    assert rows == [0, 0, 0, 1]


def test_rows_through_an_unreduced_loss():
    y = torch.tensor([[0, 1, 1], [2, 3, 0]])
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    logits = rand(2, 3, C).requires_grad_()

    def step():
        losses = F.cross_entropy(logits.view(-1, C), y.view(-1), reduction="none").view(2, 3)
        return (losses * mask).sum() / mask.sum()

    tap = LossTap(tracker=RowTracker((y,), 2))
    with tap:
        step()
    (call,) = tap.calls
    assert call.num.shape == (2,)
    assert call.rows is None
    assert call.den.tolist() == mask.sum(1).tolist()


@pytest.mark.parametrize(("n", "i"), [(1, 0), (3, 1)])
def test_rows_of_the_loss_of_one_sample(n, i):
    """As in a last batch of one, where ``squeeze()`` takes the axis of the samples away."""
    y, logits = torch.rand(n, 1).double(), rand(n, 1).requires_grad_()

    def step():
        one = slice(i, i + 1)
        return F.binary_cross_entropy_with_logits(logits[one].squeeze(), y[one].squeeze())

    assert _rows((y,), n, step)[0] == [i]


def test_rows_that_are_picked_by_a_column_of_the_batch():
    first, second, place = rand(3, 2), rand(3, 2), torch.tensor([4, 0, 2])
    prediction = rand(3, 2).requires_grad_()
    batch = first, second, place
    rows, _ = _rows(batch, 3, lambda: F.mse_loss(prediction, torch.cat([first, second])[place]))
    assert rows == [1, 1, 0, 0, 2, 2]


def test_means_of_as_many_columns_as_samples_are_no_rows():
    x = rand(3, 3)
    with pytest.raises(RowsError, match="to be those of the batch"):
        _rows((x,), 3, lambda: F.mse_loss(rand(3).requires_grad_(), x.mean(0)))


@pytest.mark.parametrize("members", [1, 2, 3, 5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_that_is_spread_over_predictions(members, reduction):
    """Of an ensemble ``(M, N, C)``: the rows of the loss are members, also where there are as many as samples."""
    y, made = torch.rand(3, 2).double(), rand(members, 3, 2).requires_grad_()

    def step(target):
        return F.smooth_l1_loss(made, target, reduction=reduction).mean()

    with pytest.warns(UserWarning, match="target size"), pytest.raises(RowsError, match="expand_as"):
        _rows((y,), 3, lambda: step(y))
    assert _rows((y,), 3, lambda: step(y.expand_as(made)))[0] == [0, 0, 1, 1, 2, 2] * members


def test_losses_that_are_divided_by_nothing():
    """As by the length of an empty mask: torch gives infinity, and no error."""
    logits, target = rand(3, C).requires_grad_(), torch.arange(3) % C
    with LossTap(tracker=RowTracker((target,), 3)) as tap:
        loss = (F.cross_entropy(logits, target, reduction="none") / 0).mean()
    assert loss.isinf()
    assert tap.calls[0].num.isinf().all()


def test_unchanged_rows_need_no_index():
    y = torch.tensor([[0], [1], [2]])
    logits = rand(3, C).requires_grad_()
    for target in (lambda: y.squeeze(1), lambda: y[:, 0], lambda: y.view(3), lambda: y.long().flatten()):
        rows, _ = _rows((y,), 3, lambda target=target: F.cross_entropy(logits, target()))
        assert rows is None


def test_a_move_that_moves_nothing():
    """Flattening a tensor with one axis returns the tensor itself."""
    y, net = torch.tensor([0.0, 1.0, 1.0]).double(), nn.Linear(5, 1).double()
    logits = net(rand(3, 5))[:, 0].sigmoid()
    assert logits.flatten() is logits
    rows, _ = _rows((y,), 3, lambda: F.binary_cross_entropy_with_logits(logits.flatten(), y.sqrt().flatten()))
    assert rows is None


@pytest.mark.parametrize("of_batch", [True, False])
def test_long_chains_are_followed_in_short(of_batch):
    """What is used twice in each of many operations is looked at once."""
    x = rand(4, 3)
    y = x if of_batch else nn.Linear(3, 3).double()(x)
    with LossTap(tracker=RowTracker((x,), 4)) as tap:
        for _ in range(40):
            y = y + y * y.sigmoid()
        F.mse_loss(rand(4, 3).requires_grad_(), y)
    assert tap.calls[0].rows is None


@pytest.mark.parametrize("step", [lambda y: y, lambda y: _filled(slice(None), lambda y: y)(y)])
def test_nothing_is_left_to_the_garbage_collector(step):
    gc.collect()
    gc.disable()
    try:
        net, y = nn.Linear(3, 4), torch.arange(3)
        with LossTap(tracker=RowTracker((y,), 3)) as tap:
            logits = net(rand(3, 3).float())
            tap.tracker.follow(logits)  # as of a layer that somebody watches
            F.cross_entropy(logits.flatten().view(3, 4), step(y))
        _ = tap.calls[0].rows
        tracker = weakref.ref(tap.tracker)
        tap.close()
        assert tracker() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("name", ["mul_", "multiply_", "__imul__", "divide_"])
def test_numbers_of_the_whole_batch_in_place(name):
    w = rand(4).abs()
    with LossTap(tracker=RowTracker((w,), 4), careful=True) as tap:
        losses = F.mse_loss(rand(4).requires_grad_(), rand(4), reduction="none") * 1.0
        _ = getattr(losses, name)(w / w.max()).sum() / w.sum()
    assert tap.calls[0].record.of_batch


ORDER = torch.tensor([2, 0, 3, 1])
FEW = torch.tensor([True, False, True, True])


def _put(key, value):
    def edit(y):
        target = y.clone()
        target[key] = value(y)
        return target

    return edit


def _filled(key, value):
    def edit(y):
        target = torch.zeros_like(y)
        target[key] = value(y)
        return target

    return edit


ELSEWHERE = {
    "in another order": _put(ORDER, lambda y: y),
    "turned round": _put(slice(None), lambda y: y.flip(0)),
    "into a new tensor": _filled(ORDER, lambda y: y),
    "a row in each column": lambda y: _put((slice(None), slice(4)), lambda z: y.double())(F.one_hot(y, 4).double()),
    "of a memory": _put(slice(2), lambda y: torch.tensor([3, 3])),
    "of a tensor, in another order": _put(ORDER, lambda y: torch.tensor([3, 3, 0, 1])),
}
IN_PLACE = {
    "some": _put(FEW, lambda y: y[FEW]),
    "a column": lambda y: _put((slice(None), 0), lambda z: y.double())(F.one_hot(y, 4).double()),
    "some of the classes": lambda y: _put((FEW, slice(2)), lambda z: z[FEW, :2])(F.one_hot(y, 4).double()),
    "a number": _put(ORDER[:2], lambda y: 0),
    "back in order": _put(ORDER, lambda y: y[ORDER]),
    "of a tensor": _put(slice(None), lambda y: torch.tensor([3, 3, 0, 1])),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", [*ELSEWHERE, *IN_PLACE])
def test_rows_that_are_assigned(name, inference):
    """Under inference mode no tensor counts its changes."""
    with torch.inference_mode(inference):
        y, logits = torch.arange(4), X[:4].clone().requires_grad_(not inference)
        with LossTap(training=not inference, tracker=RowTracker((y,), 4)) as tap:
            F.cross_entropy(logits, (ELSEWHERE | IN_PLACE)[name](y))
        if name in IN_PLACE:
            assert tap.calls[0].rows is None
            return
        with pytest.raises(RowsError, match="mixes samples with each other"):
            tap.calls[0].rows  # noqa: B018


def test_a_column_of_unknown_origin_is_of_the_rows_that_it_is_assigned_to():
    y = torch.arange(4)
    tracker = RowTracker((y,), 4)
    with LossTap(tracker=tracker):
        target = F.one_hot(y[ORDER], 4)
        target[:, 0] = torch.tensor([3, 3, 0, 1])
    assert tracker.resolve([target], 4)[:, 0].tolist() == ORDER.tolist()


@pytest.mark.parametrize(
    ("put", "known"),
    [
        (lambda y: torch.zeros(4, 4).scatter_(1, y[:, None], 1.0), True),
        (lambda y: torch.zeros(4, 4).scatter(1, y[:, None], 1.0), True),
        (lambda y: (y[:, None] + torch.zeros(4, 4)).scatter(0, y.argsort()[:, None], 1.0), False),
        (lambda y: torch.zeros_like(y).index_copy_(0, y.argsort(), y), False),
        (lambda y: torch.fft.fftshift(x=y), False),
    ],
)
def test_rows_that_are_put_elsewhere_in_a_compiled_step(put, known):
    torch.compiler.reset()
    y = torch.tensor([0, 2, 3, 1])
    tracker = RowTracker((y,), 4)
    with LossTap(tracker=tracker):
        made = torch.compile(put, backend="eager")(y)
    assert (tracker.resolve([made], 4) is None) == known


def test_unknown_rows_are_an_error_with_both_shapes():
    logits = rand(6, C).requires_grad_()
    with pytest.raises(RowsError, match=r"loss has shape \(6,\) and the batch 3 ids.*rows='tiled'"):
        _rows((torch.zeros(3),), 3, lambda: F.cross_entropy(logits, torch.zeros(6).long()))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("tiled", [0, 1, 2, 0, 1, 2]),
        ("interleaved", [0, 0, 1, 1, 2, 2]),
        (lambda call, n: torch.tensor([2, 2, 1, 1, 0, 0]), [2, 2, 1, 1, 0, 0]),
    ],
)
def test_rows_can_be_told(rows, expected):
    logits = rand(6, C).requires_grad_()
    found, _ = _rows((torch.zeros(3),), 3, lambda: F.cross_entropy(logits, torch.zeros(6).long()), rows)
    assert found == expected


def test_rows_that_are_told_wrongly():
    logits = rand(7, C).requires_grad_()
    with pytest.raises(RowsError, match="multiple of the 3 samples"):
        _rows((torch.zeros(3),), 3, lambda: F.cross_entropy(logits, torch.zeros(7).long()), "tiled")
    with pytest.raises(RowsError, match=r"int64 sample numbers of shape \(7,\)"):
        _rows(
            (torch.zeros(3),),
            3,
            lambda: F.cross_entropy(logits, torch.zeros(7).long()),
            lambda call, n: torch.zeros(3).long(),
        )


def test_a_loss_of_one_number_is_not_divided_by_the_weights_of_the_samples():
    logits, weights = X.clone().requires_grad_(), SAMPLE_WEIGHT.clone()
    with LossTap(tracker=RowTracker((logits, YC, weights), N)) as tap:
        loss = F.cross_entropy(logits[0], YC[0], reduction="sum") / weights.sum()
    with pytest.raises(UntappedLossError, match="nothing of that kind divides it"):
        reaching(tap, loss).multiply(tap.calls)


@pytest.mark.parametrize(
    "key", [np.array([2, 0, 1]), (2, 0, 1), range(3)[::-1], [2, 0, 1]], ids=lambda key: type(key).__name__
)
def test_rows_that_are_picked_behind_an_ellipsis(key):
    """Of a tensor with one axis an ellipsis stands for none."""
    y = torch.tensor([0, 2, 1])
    tracker = RowTracker((y,), 3)
    with LossTap(tracker=tracker):
        picked = y[..., key]
    assert tracker.resolve([picked], 3).tolist() == list(key)


def test_one_row_behind_an_ellipsis_is_of_one_sample():
    """Also where it has as many columns as there are samples."""
    x = torch.randn(3, 3)
    tracker = RowTracker((x,), 3)
    with LossTap(tracker=tracker):
        row = x[..., 1, :]
    assert tracker.resolve([row], 3).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dim", [0, -2])
def test_a_memory_that_is_joined_with_the_batch_is_of_no_sample(dim):
    """Also where it has as many rows, and the axis is counted from the end."""
    x, memory = torch.randn(3, 2), torch.randn(3, 2)
    with LossTap(tracker=RowTracker((x,), 3)) as tap:
        joined = torch.cat([x, memory], dim=dim)
        F.mse_loss(nn.Linear(2, 2)(joined), joined)
    with pytest.raises(RowsError, match=r"shape \(6, 2\)"):
        _ = tap.calls[0].rows


@pytest.mark.parametrize(
    "mix",
    [
        lambda y: torch.add(y, other=y.flip(0)),
        lambda y: torch.max(y, other=y.flip(0)),
        lambda y: torch.lerp(y, end=y.flip(0), weight=0.5),
        lambda y: torch.where(y > 1, input=y, other=y.flip(0)),
        lambda y: torch.add(y, y.flip(0), out=torch.empty_like(y)),
        lambda y: y - y[:1],
        lambda y: y - y[0],
        lambda y: y.cumprod(0),
        lambda y: y.cummax(0).values,
    ],
    ids=["add", "max", "lerp", "where", "out", "first row", "first sample", "cumprod", "cummax"],
)
def test_samples_that_are_mixed_with_each_other_by_name_or_spread(mix):
    for y in (torch.randn(3, 1), torch.randn(3)):
        tracker = RowTracker((y,), 3)
        with LossTap(tracker=tracker):
            mixed = mix(y)
        assert tracker.resolve([mixed], 3) is False


def test_a_mask_that_is_spread_over_its_rows_leaves_them():
    y, mask = torch.randn(3, 2), torch.ones(3, 1)
    tracker = RowTracker((y, mask), 3, everything=False)
    with LossTap(tracker=tracker):
        masked = y * mask
    assert tracker.resolve([masked], 3) is None


@pytest.mark.parametrize("reduce", [lambda y: y[0, 0].sum(0), lambda y: y[:, 1:].sum(1), lambda y: y.ravel()])
def test_what_is_left_of_rows_can_be_followed(reduce):
    """Of one number, of no columns; and another name of a reshape."""
    y = torch.randn(3, 1)
    tracker = RowTracker((y,), 3)
    with LossTap(tracker=tracker):
        left = reduce(y)
    index = tracker.index(left)
    assert index is None or index.shape == left.shape


def test_features_that_may_be_another_loaders_are_of_no_sample():
    """Where that has as many samples, and what was made of them cannot be followed."""
    x, other = torch.randn(3, 2), torch.randn(3, 2)
    tracker = RowTracker(x, 3, strangers=[other])
    with LossTap(tracker=tracker):
        features = nn.Linear(2, 2)(given := torch.from_numpy(other.numpy() * 2))
    assert tracker.of_layer(features, [given]) is False


SELECTED = {
    "masks": lambda s, y: [s[y == 1], s[y == 0]],
    "selected by masks": lambda s, y: [s.masked_select(y == 1), s.masked_select(y == 0)],
    "split": lambda s, y: s.split([1, 3])[::-1],
    "narrowed": lambda s, y: [s.narrow(0, 2, 2), s.narrow(0, 0, 2)],
    "unbound": lambda s, y: [row[None] for row in s.unbind()[::-1]],
    "single": lambda s, y: [s[i : i + 1] for i in (3, 1, 0, 2)],
}


@pytest.mark.parametrize("name", SELECTED)
def test_parts_of_a_networks_output_are_followed_in_later_steps_too(name):
    """Also where each part has fewer rows than the batch."""
    part, x, y = SELECTED[name], torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with LossTap(tracker=RowTracker((x, y), 4, everything=False)) as tap:
        logits = torch.cat(list(part(nn.Linear(3, 1)(x).squeeze(1), y)))
        F.binary_cross_entropy_with_logits(logits, torch.ones(4))
    assert tap.calls[0].rows.tolist() == torch.cat(list(part(torch.arange(4), y))).tolist()


@pytest.mark.parametrize("everything", [True, False])
def test_outputs_for_parts_of_the_batch_that_are_joined_are_of_unknown_rows(everything, device):
    net, x, y = nn.Linear(3, 1), torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    with LossTap(tracker=RowTracker((x, y), 4, everything=everything)) as tap:
        logits = torch.cat([net(x[y == 1]), net(x[y == 0])])
        F.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
    with pytest.raises(RowsError, match="cannot be followed"):
        tap.calls[0].rows  # noqa: B018


@pytest.mark.parametrize(
    "part",
    [
        lambda h: h.chunk(2, dim=-1),
        lambda h: h.split(2, 1),
        lambda h: h.unbind(1),
        lambda h: h.select(-1, 0),
        lambda h: h[:, 0],
        lambda h: torch.cat([h, h], 1),
        lambda h: h.transpose(0, 1),
    ],
)
def test_later_steps_keep_nothing_of_a_network_that_keeps_its_rows(part):
    x = torch.randn(4, 3)
    with LossTap(tracker=RowTracker((x,), 4, everything=False)):
        h = nn.Linear(3, 6)(x)
        made, kept = part(h), weakref.ref(h)
        del h, made
        assert kept() is None


def test_inputs_that_are_put_together_time_first_leave_a_layers_rows():
    x, steps = torch.randn(4, 3, 2), torch.zeros(3, 4, 2)
    tracker = RowTracker((x,), 4)
    with LossTap(tracker=tracker):
        for t in range(3):
            steps[t] = x[:, t]
        output = nn.GRU(2, 5)(steps)[1].squeeze(0)
    assert tracker.of_layer(output, [steps]) is None


class NoOperations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} was computed")


def test_no_numbers_are_made_to_know_that_a_target_is_the_batchs():
    x, y = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    tracker = RowTracker((x, y), 4, everything=False)
    with NoOperations():
        assert tracker.resolve([y], 4) is None
