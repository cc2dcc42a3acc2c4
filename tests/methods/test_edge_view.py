"""EdgeView: Canny against loops and SciPy, the weighted loss of both views, what a step sees."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from _support.fits import make_trainer, parameters, same
from _support.images import Pictures as TwoChannels
from _support.images import batches, images
from debias import EdgeView, EdgeViewLayer, GroupDRO, GroupMixup, tag
from debias.errors import BatchKeyError, DebiasError
from debias.functional import canny_edges, otsu_threshold
from debias.ops.edges import _gaussian, _is_maximum


def picture(n=3, size=(17, 23), seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, *size, generator=generator, dtype=torch.float64)
    return torch.stack([torch.from_numpy(ndimage.gaussian_filter(image.numpy(), 1.5)) for image in noise])


# ------------------------------------------------------------ the parts of Canny


@pytest.mark.parametrize("sigmas", [[0.0, 1.0, 2.0], [0.5, 0.5, 1.5]])
def test_smoothing_is_scipys(sigmas):
    x = picture()
    found = _gaussian(x, torch.tensor(sigmas))
    for image, out, sigma in zip(x, found, sigmas, strict=True):
        expected = ndimage.gaussian_filter(image.numpy(), sigma, mode="nearest", radius=8) if sigma else image.numpy()
        np.testing.assert_allclose(out.numpy(), expected, atol=1e-12)


def test_otsu_by_the_definition():
    values = torch.stack([picture(1)[0] ** 2, torch.rand(17, 23, dtype=torch.float64)])
    found = otsu_threshold(values, bins=32)
    for image, cut in zip(values.flatten(1).tolist(), found.tolist(), strict=True):
        width = max(image) / 32
        bins = [min(int(v / width), 31) for v in image]

        def within(k, bins=bins):
            sides = [b for b in bins if b <= k], [b for b in bins if b > k]
            return sum(sum((b - sum(s) / len(s)) ** 2 for b in s) for s in sides if s)

        best = min(range(32), key=within)
        assert cut == pytest.approx((best + 0.5) * width)


def looped_canny(grey, cut, low, high, steps):
    """Sobel, maxima across the edge and hysteresis, pixel by pixel."""
    h, w = grey.shape
    get = lambda image, i, j: image[min(max(i, 0), h - 1)][min(max(j, 0), w - 1)]  # noqa: E731
    g = grey.tolist()
    across, down = np.zeros((h, w)), np.zeros((h, w))
    for i in range(h):
        for j in range(w):
            for k, weight in ((-1, 1), (0, 2), (1, 1)):
                across[i, j] += weight * (get(g, i + k, j + 1) - get(g, i + k, j - 1)) / 4
                down[i, j] += weight * (get(g, i + 1, j + k) - get(g, i - 1, j + k)) / 4
    size = np.hypot(across, down)
    at = lambda i, j: size[i, j] if 0 <= i < h and 0 <= j < w else 0.0  # noqa: E731
    weak, strong = np.zeros((h, w), bool), np.zeros((h, w), bool)
    for i in range(h):
        for j in range(w):
            y, x = down[i, j], across[i, j]
            if size[i, j] <= 1e-6:
                continue
            scale = max(abs(y), abs(x))
            dy, dx = y / scale, x / scale  # one of them is 1 or -1: a step to the next row or column
            if dy < 0 if abs(y) > abs(x) else dx < 0:
                dy, dx = -dy, -dx
            sides = []
            for s in (1, -1):
                if abs(y) > abs(x):
                    j0, part = math.floor(s * dx), s * dx - math.floor(s * dx)
                    sides.append((1 - part) * at(i + s, j + j0) + part * at(i + s, j + j0 + 1))
                else:
                    i0, part = math.floor(s * dy), s * dy - math.floor(s * dy)
                    sides.append((1 - part) * at(i + i0, j + s) + part * at(i + i0 + 1, j + s))
            if size[i, j] >= sides[0] - 1e-12 and size[i, j] > sides[1] + 1e-12:
                weak[i, j], strong[i, j] = size[i, j] >= low * cut, size[i, j] >= high * cut
    edges = weak & strong
    for _ in range(steps):
        edges = ndimage.binary_dilation(edges, np.ones((3, 3))) & weak
    return edges, size


@pytest.mark.parametrize("steps", [0, 2, 16])
def test_edges_by_the_definition(steps):
    x = picture(4, seed=2)
    low, high = torch.tensor([0.5, 0.4, 0.8, 0.1]), torch.tensor([1.5, 1.2, 1.3, 2.0])
    cuts = []

    def mean(magnitude):
        cuts.append(magnitude.mean((1, 2)))
        return cuts[-1]

    found = canny_edges(x, sigma=torch.zeros(4), threshold=mean, low=low, high=high, hysteresis_steps=steps)
    for i in range(4):
        expected, size = looped_canny(x[i], float(cuts[0][i]), float(low[i]), float(high[i]), steps)
        assert float(cuts[0][i]) == pytest.approx(size.mean())
        assert (found[i].numpy() == expected).all()
        assert found[i].any()


def test_a_square_has_a_thin_outline():
    grey = torch.zeros(1, 20, 20)
    grey[:, 6:14, 5:15] = 1
    one = torch.ones(1)
    found = canny_edges(grey, sigma=one, threshold=otsu_threshold, low=0.5 * one, high=1.2 * one)[0]
    assert not found[9:11, 8:12].any()
    assert not found[:3].any()
    assert found[10].sum() == 2
    assert found[:, 7].sum() == 2


def test_an_image_of_one_grey_has_no_edges():
    one = torch.ones(2)
    for x in (torch.full((2, 8, 8), 0.3), torch.full((2, 1, 1), 0.3), torch.full((2, 2, 2), 0.3)):
        assert not canny_edges(x, sigma=one, threshold=otsu_threshold, low=0.5 * one, high=1.5 * one).any()


def test_a_maximum_is_kept_once_on_a_plateau():
    magnitude = torch.tensor([[[0.0, 1.0, 1.0, 0.0]]])
    assert _is_maximum(magnitude, torch.ones_like(magnitude), torch.zeros_like(magnitude)).sum() >= 1
    assert _is_maximum(magnitude, torch.ones_like(magnitude), torch.zeros_like(magnitude))[0, 0, 1:3].sum() == 1


# ------------------------------------------------------------ edge maps


def test_maps_are_white_with_black_edges_in_the_values_of_the_images():
    x = picture(6).view(2, 3, 17, 23)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.1]
    shift, scale = torch.tensor(mean).view(3, 1, 1).double(), torch.tensor(std).view(3, 1, 1).double()
    plain, normal = EdgeViewLayer(), EdgeViewLayer(mean, std)
    drawn = plain.draw(0, 2)
    maps = plain.edges(x, drawn)
    assert maps.unique().tolist() == [0, 1]
    assert torch.equal(maps[:, 0], maps[:, 1])
    other = normal.edges((x - shift) / scale, drawn) * scale + shift
    assert (other.round() == maps).double().mean() > 0.995
    torch.testing.assert_close(other.round(), other, atol=1e-6, rtol=0)
    assert plain.edges(x[:1].float(), drawn[:, :1]).dtype == torch.float32


def test_draws_cover_what_they_are_drawn_from():
    sigma, rule, low, high = EdgeViewLayer().draw(3, 2000)
    assert sigma.unique().tolist() == [0, 1, 2]
    assert rule.unique().tolist() == [0, 1]
    torch.testing.assert_close(low + high, torch.full_like(low, 2.0))
    assert float(low.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(low.std()) == pytest.approx(0.2, rel=0.05)


def test_an_empty_batch_stays_empty():
    assert EdgeViewLayer()(torch.zeros(0, 3, 8, 8)).shape == (0, 3, 8, 8)


def test_every_image_has_its_own_draw():
    """What an image becomes does not depend on the others of the batch."""
    x = picture(5).unsqueeze(1)
    layer = EdgeViewLayer()
    drawn = layer.draw(0, 5)
    alone = torch.cat([layer.edges(x[i : i + 1], drawn[:, i : i + 1]) for i in range(5)])
    assert torch.equal(layer.edges(x, drawn), alone)
    assert layer(x).shape == x.shape


# ------------------------------------------------------------ the callback


class Pictures(TwoChannels):
    """On images of one channel."""

    def forward(self, x):
        return super().forward(torch.cat([x, x], 1))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            self.logits.append(self(batch[0]))
        return loss

    def __init__(self):
        super().__init__()
        self.logits = []


def loader(n=12, **tags):
    data = images(n, size=9)
    x, y = data.tensors
    place = torch.arange(n) // 2 % 3
    dataset = tag(torch.utils.data.TensorDataset(x[:, :1].contiguous(), y), place=place, **tags)
    return torch.utils.data.DataLoader(dataset, batch_size=6)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_both_views_in_one_batch_with_a_weighted_loss(weight):
    model = Pictures()
    make_trainer([EdgeView(weight=weight)]).fit(model, loader())
    for (x, y, loss), logits, tagged in zip(model.seen, model.logits, loader(), strict=True):
        images_, labels = tagged.batch
        assert torch.equal(x[:6], images_)
        assert torch.equal(y, torch.cat([labels, labels]))
        assert x[6:].unique().tolist() == [0, 1]
        losses = F.cross_entropy(logits, y, reduction="none")
        torch.testing.assert_close(loss, (losses[:6].sum() + weight * losses[6:].sum()) / 12)


def test_groups_follow_the_views():
    model, plain = Pictures(), Pictures()
    dro = GroupDRO("place", 3, step_size=0.4)
    make_trainer([EdgeView(weight=0.5), dro]).fit(model, loader())
    weights = torch.zeros(3, dtype=torch.float64)
    optimizer = plain.configure_optimizers()
    for (x, y, _), tagged in zip(model.seen, loader(), strict=True):
        place = tagged.tags["place"].repeat(2)
        losses = F.cross_entropy(plain(x), y, reduction="none") * torch.tensor([1.0] * 6 + [0.5] * 6).double()
        means = torch.stack([losses[place == g].sum() / (place == g).sum() for g in range(3)])
        weights = torch.log_softmax(weights + 0.4 * means.detach(), 0)
        optimizer.zero_grad()
        (weights.exp() * means).sum().backward()
        optimizer.step()
    torch.testing.assert_close(dro.module.weights, weights.exp())
    for key, value in parameters(plain).items():
        torch.testing.assert_close(parameters(model)[key], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", [0, 1])
def test_with_mixing_in_either_order(order):
    """Augmenters act in the order of the list."""
    methods = [EdgeView(weight=0.5), GroupMixup("place")]
    model = Pictures()
    make_trainer([*(methods if order == 0 else methods[::-1]), GroupDRO("place", 3)]).fit(model, loader())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert all(len(x) == 12 for x, _, _ in model.seen)
    edges = [x[6:] for x, _, _ in model.seen]
    # First edges, then mixing: maps are mixed too and are no longer black and white.
    assert all((len(maps.unique()) > 2) == (order == 0) for maps in edges)


def test_batches_of_any_layout_are_repeated():
    class Layout(Pictures):
        def training_step(self, batch, batch_idx):
            assert list(batch) == ["image", "label", "names", "scale"]
            assert batch["names"][:6] == batch["names"][6:]
            assert len(batch["names"]) == 12
            assert batch["scale"].shape == (2,)
            return super().training_step((batch["image"], batch["label"]), batch_idx)

    def collate(samples):
        x, y = torch.utils.data.default_collate(samples)
        return {"image": x, "label": y, "names": [str(i) for i in range(len(y))], "scale": torch.ones(2)}

    source = loader().dataset.dataset
    make_trainer([EdgeView("image")]).fit(Layout(), torch.utils.data.DataLoader(source, 6, collate_fn=collate))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weight": -1}, "`weight` to be a number >= 0"),
        ({"mean": [0.5]}, "`mean` and `std` to be given together"),
        ({"mean": [0.5], "std": [0.0]}, "`std` to be positive"),
        ({"sigmas": [3.0]}, "`sigmas` to be numbers from 0 to 2"),
        ({"sigmas": []}, "`sigmas` to be numbers from 0 to 2"),
        ({"rules": ["yen"]}, "`rules` to be of 'otsu' and 'mean', but got"),
        ({"jitter": -0.1}, "`jitter` to be a number >= 0"),
        ({"hysteresis_steps": 1.5}, "`hysteresis_steps` to be an integer >= 0"),
    ],
)
def test_arguments_are_checked(options, match):
    with pytest.raises(DebiasError, match=match):
        EdgeView(**options)


def test_what_is_no_image_is_refused_before_the_step():
    class Never(TwoChannels):
        def training_step(self, batch, batch_idx):
            raise AssertionError

    with pytest.raises(BatchKeyError, match=r"`input=0` to be images .* but got a tensor of shape \(8, 2, 6, 6\)"):
        make_trainer([EdgeView()]).fit(Never(), batches())
    with pytest.raises(BatchKeyError, match=r"`input=1` to be images"):
        make_trainer([EdgeView(1)]).fit(Never(), batches())
    with pytest.raises(DebiasError, match="hold 1 numbers, one a channel of the images, but got 3"):
        make_trainer([EdgeView(mean=[0.5] * 3, std=[0.5] * 3)]).fit(Never(), loader())


def test_a_weight_of_zero_still_counts_the_maps_in_the_divisor():
    """As published: the sum over both views is divided by twice the number of images."""
    model = Pictures()
    make_trainer([EdgeView(weight=0.0)]).fit(model, loader())
    (x, y, loss), logits = model.seen[0], model.logits[0]
    torch.testing.assert_close(loss, F.cross_entropy(logits[:6], y[:6]) / 2)
    assert not same(x[:6], x[6:])
