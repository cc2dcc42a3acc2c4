"""Crafted shifts: drawn by key alone, always a change, in range; transforms against other libraries and brute force."""

from __future__ import annotations

import colorsys
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.cluster import KMeans

from _support.blobs import images
from debias.errors import DebiasError
from debias.ops.shifts import (
    FAMILIES,
    FOLDS,
    UnitImages,
    crafted_shift,
    families_of,
    filters,
    held_out_mean,
    pixels,
    sample_keys,
    scenes,
    select_setting,
    shifted_batch,
    transforms_of,
    two_fold_score,
)
from debias.ops.shifts.draws import Draws

TRANSFORMS = [
    pytest.param(t, c, id=f"{family}-{getattr(t, '__name__', 'median')}-{i}-{c}")
    for family in FAMILIES
    for c in (1, 3)
    for i, t in enumerate(transforms_of(family, c))
]


def keys(n, name="test", seed=0):
    return sample_keys(torch.arange(n), name, seed=seed)


# -- draws -----------------------------------------------------------------------------------------


def mixed(x):
    """The hash, in Python's integers."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


@given(st.lists(st.integers(0, 2**62), min_size=1, max_size=5), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_keys_are_those_of_exact_integers(indices, seed):
    import zlib

    start = zlib.crc32(f"{seed}/blur".encode())
    expected = [mixed(mixed((i % 2**32) ^ start) ^ (i >> 32) % 2**32) for i in indices]
    assert sample_keys(torch.tensor(indices), "blur", seed=seed).tolist() == expected


def test_keys_differ_by_index_name_and_seed():
    found = torch.cat([keys(1000), keys(1000, "other"), keys(1000, seed=1)])
    assert len(found.unique()) >= 2998
    assert found.min() >= 0
    assert found.max() < 2**32


def test_an_image_draws_the_same_in_any_batch():
    all_keys, some = keys(9), torch.tensor([4, 0, 7])
    one, other = Draws(all_keys), Draws(all_keys[some])
    for draw in (
        lambda d: d.uniform(-1, 2, 3, 5, 5),
        lambda d: d.normal(4, 4),
        lambda d: d.signed(1, 2),
        lambda d: d.either((0, 1), (5, 6), 1, 1, 1),
        lambda d: d.mask(torch.tensor(0.3), 1, 6, 6),
    ):
        assert torch.equal(draw(one)[some], draw(other))


def test_draws_are_distributed_as_they_say():
    d = Draws(keys(40))
    u = d.uniform(2, 4, 5000)
    assert u.min() >= 2
    assert u.max() < 4
    assert abs(float(u.mean()) - 3) < 0.01
    assert torch.histc(u, 20).div(u.numel() / 20).sub(1).abs().max() < 0.03
    n = d.normal(5000)
    assert abs(float(n.mean())) < 0.01
    assert abs(float(n.std()) - 1) < 0.01
    assert abs(float((n.abs() < 1.96).float().mean()) - 0.95) < 0.003
    # neither neighbours of an image, nor images, nor calls go together
    again = d.uniform(2, 4, 5000)
    for a, b in ((u[:, 1:], u[:, :-1]), (u[1:], u[:-1]), (u, again)):
        assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01
    assert d.signed(1, 2, 5000).abs().min() >= 1
    assert abs(float(d.signed(1, 2, 5000).mean())) < 0.02
    either = d.either((0, 1), (3, 4), 5000)
    assert not ((either >= 1) & (either < 3)).any()
    assert abs(float((either < 2).float().mean()) - 0.5) < 0.01
    assert abs(float(d.mask(0.3, 5000).float().mean()) - 0.3) < 0.01


# -- all transforms --------------------------------------------------------------------------------


def test_the_ten_families_and_their_folds():
    assert FAMILIES == (
        "arithmetic", "artistic", "blur", "colour", "contrast",
        "convolutional", "edges", "geometric", "segmentation", "weather",
    )  # fmt: skip
    assert FOLDS["first"] + FOLDS["second"] == FOLDS["all"] == FAMILIES
    assert len(FOLDS["first"]) == 5
    assert sum(len(transforms_of(family, 3)) for family in FAMILIES) == 69


@pytest.mark.parametrize(("transform", "channels"), TRANSFORMS)
@pytest.mark.parametrize("shape", [(12, 12), (33, 21)])
def test_a_transform_changes_images_and_stays_finite(transform, channels, shape):
    top, left = (33 - shape[0]) // 2, (33 - shape[1]) // 2
    x = images(6, channels, 33)[:, :, top : top + shape[0], left : left + shape[1]].contiguous()
    before = x.clone()
    y = transform(x, Draws(keys(6)))
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert torch.equal(x, before)
    change = (y.clamp(0, 1) - x).abs().mean((1, 2, 3))
    assert change.mean() > 0.002, change
    assert (change > 0).all()


@pytest.mark.parametrize(("transform", "channels"), TRANSFORMS)
def test_a_transform_of_an_image_does_not_depend_on_the_batch(transform, channels):
    x, k = images(5, channels), keys(5)
    whole = transform(x, Draws(k))
    alone = torch.cat([transform(x[i : i + 1], Draws(k[i : i + 1])) for i in range(5)])
    torch.testing.assert_close(whole, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_family_is_drawn_by_key_alone(family, channels):
    x, k = images(24, channels), keys(24)
    y = crafted_shift(x, family, k)
    assert y.min() >= 0
    assert y.max() <= 1
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(crafted_shift(x[order], family, k[order]), y[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(crafted_shift(x[7:9], family, k[7:9]), y[7:9], rtol=1e-5, atol=1e-5)
    same_image = crafted_shift(x[:1].expand(24, -1, -1, -1), family, k)
    assert len({tuple(image.flatten().tolist()) for image in same_image}) > (2 if family == "edges" else 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    x, k = images(8, 3), keys(8)
    y = crafted_shift(x.to(dtype), "weather", k)
    assert y.dtype == dtype
    tolerance = 0.05 if dtype in (torch.float16, torch.bfloat16) else 1e-5
    assert (y.float() - crafted_shift(x.to(dtype).float(), "weather", k)).abs().mean() < tolerance


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_default_dtype_changes_nothing(default_dtype, channels, monkeypatch):
    """Lightning's `precision="bf16-true"` and the like set it in a step. Every transform by itself."""
    x, k = images(4, channels).float(), keys(4)
    for family in FAMILIES:
        for i, transform in enumerate(transforms_of(family, channels)):
            monkeypatch.setattr(sys.modules["debias.ops.shifts"], "transforms_of", lambda *_, t=transform: (t,))
            found = crafted_shift(x, family, k)
            assert torch.get_default_dtype() == default_dtype
            torch.set_default_dtype(torch.float32)
            expected = crafted_shift(x, family, k)
            torch.set_default_dtype(default_dtype)
            assert torch.equal(found, expected), (family, i)


def test_the_default_dtype_is_put_back_after_an_error(default_dtype, monkeypatch):
    def fail(x, d):
        raise ValueError("out of memory")

    monkeypatch.setattr(sys.modules["debias.ops.shifts"], "transforms_of", lambda *_: (fail,))
    with pytest.raises(ValueError, match="out of memory"):
        crafted_shift(images(2).float(), "blur", keys(2))
    assert torch.get_default_dtype() == default_dtype


def test_every_transform_of_a_family_is_drawn(monkeypatch):
    drawn = Counter()
    seen = [lambda x, d, i=i: (drawn.update({i: len(x)}), x)[1] for i in range(7)]
    monkeypatch.setitem(sys.modules["debias.ops.shifts"]._TRANSFORMS, "blur", tuple(seen))
    crafted_shift(images(700, 1, 4), "blur", keys(700))
    assert set(drawn) == set(range(7))
    assert all(60 < count < 140 for count in drawn.values())


def test_autocast_changes_nothing():
    x, k = images(16, 3), keys(16)
    for family in FAMILIES:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(crafted_shift(x, family, k), crafted_shift(x, family, k))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = crafted_shift(x, family, k)
        torch.testing.assert_close(inside, crafted_shift(x, family, k))


def test_sources():
    x, k = images(9, 3), keys(9)
    sources = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    y = shifted_batch(x, ("blur", "edges"), sources, k)
    assert torch.equal(y[sources == 0], x[sources == 0])
    torch.testing.assert_close(y[sources == 1], crafted_shift(x[sources == 1], "blur", k[sources == 1]))
    torch.testing.assert_close(y[sources == 2], crafted_shift(x[sources == 2], "edges", k[sources == 2]))


# -- single transforms, computed another way -------------------------------------------------------


class Fixed(Draws):
    """Draws whose uniform numbers are given."""

    def __init__(self, n, *values):
        super().__init__(keys(n))
        self.values = list(values)

    def uniform(self, low, high, *shape):
        value = torch.as_tensor(self.values.pop(0), dtype=torch.float32)
        return value.reshape(-1, *shape) if value.numel() > 1 else value.expand(self.keys.shape[0], *shape)

    def signed(self, low, high, *shape):
        return self.uniform(low, high, *shape)

    def either(self, low, high, *shape):
        return self.uniform(*low, *shape)


def test_gaussian_blur_is_scipys():
    x = images(2, 1, 40)
    y = filters.smooth(x, torch.tensor([[1.3], [2.0]]), 2.0)
    for i, sigma in enumerate((1.3, 2.0)):
        expected = ndimage.gaussian_filter(x[i, 0].numpy(), sigma, mode="nearest", radius=5)
        np.testing.assert_allclose(y[i, 0].numpy(), expected, atol=1e-5)


def test_average_of_an_odd_box_is_scipys():
    x = images(1, 1, 40)
    y = filters.average_blur(x, Fixed(1, 3.0))
    np.testing.assert_allclose(y[0, 0].numpy(), ndimage.uniform_filter(x[0, 0].numpy(), 3, mode="nearest"), atol=1e-5)


def test_median_is_scipys():
    x = images(1, 1, 40)
    y = filters.median_blur(x, Draws(keys(1)), at_224=3)
    np.testing.assert_allclose(y[0, 0].numpy(), ndimage.median_filter(x[0, 0].numpy(), 3, mode="nearest"), atol=1e-6)


def test_mean_shift_by_brute_force():
    x = images(1, 3, 9)
    y = filters.mean_shift(x, Fixed(1, 0.2))
    source = np.pad(x[0].numpy(), ((0, 0), (2, 2), (2, 2)), mode="edge")
    place = x[0].numpy().copy()
    for _ in range(3):
        moved = place.copy()
        for r in range(9):
            for c in range(9):
                window = source[:, r : r + 5, c : c + 5].reshape(3, -1)
                near = ((window - place[:, r, c, None]) ** 2).mean(0) < 0.2**2
                moved[:, r, c] = window[:, near].mean(1) if near.any() else 0
        place = moved
    np.testing.assert_allclose(y[0].numpy(), place, atol=1e-5)


def test_rotation_and_translation_are_scipys():
    x = images(1, 1, 31)
    angle = np.radians(30)
    y = scenes.rotate(x, Fixed(1, angle))[0, 0].numpy()
    expected = ndimage.rotate(x[0, 0].numpy(), 30, order=1, reshape=False, mode="constant")
    mirrored = ndimage.rotate(x[0, 0].numpy(), -30, order=1, reshape=False, mode="constant")
    inner = slice(8, 23)
    assert min(np.abs(y - e)[inner, inner].max() for e in (expected, mirrored)) < 1e-4
    moved = scenes.translate(x, Fixed(1, [2 / 31, -3 / 31]))[0, 0].numpy()
    np.testing.assert_allclose(moved, ndimage.shift(x[0, 0].numpy(), (-3, 2), order=1), atol=1e-5)


def test_rotation_keeps_angles_on_a_wide_image():
    """A square stays a square: sides that were sheared would differ."""
    x = torch.zeros(1, 1, 40, 80)
    x[:, :, 10:30, 30:50] = 1
    y = scenes.rotate(x, Fixed(1, np.pi / 4))[0, 0] > 0.5
    rows, columns = y.nonzero().unbind(1)
    assert abs(int(rows.max() - rows.min()) - int(columns.max() - columns.min())) <= 1
    assert abs(int(y.sum()) - 400) <= 20


def test_hue_and_saturation_are_colorsys():
    x = images(2, 3, 5)
    y = pixels.hue_and_saturation(x, Fixed(2, 0.3, 0.4))
    for i in range(2):
        for r in range(5):
            for c in range(5):
                h, s, v = colorsys.rgb_to_hsv(*x[i, :, r, c].tolist())
                expected = colorsys.hsv_to_rgb((h + 0.3) % 1, min(1, 0.4 * s), v)
                np.testing.assert_allclose(y[i, :, r, c].numpy(), expected, atol=1e-4)


def test_clusters_are_scikit_learns():
    points = torch.rand(2, 60, 3, generator=torch.Generator().manual_seed(0))
    centres = points[:, :5]
    labels = pixels.lloyd(points, centres, steps=50)
    for i in range(2):
        fitted = KMeans(5, init=centres[i].numpy(), n_init=1, max_iter=100, tol=0).fit(points[i].numpy())
        assert labels[i].tolist() == fitted.labels_.tolist()


def test_segments_get_their_mean_colour():
    x = images(2, 3, 7)
    labels = torch.randint(0, 4, (2, 49), generator=torch.Generator().manual_seed(0))
    y = pixels.segment_means(x, labels, 6).flatten(2)
    for i in range(2):
        for label in range(4):
            here = labels[i] == label
            expected = x[i].flatten(1)[:, here].mean(1, keepdim=True).expand(-1, int(here.sum()))
            torch.testing.assert_close(y[i][:, here], expected)


def test_voronoi_cells_are_those_of_the_nearest_point():
    x = images(1, 1, 9)
    points = torch.tensor([[[-0.5, -0.5], [0.5, 0.2], [0.1, 0.8]]])
    y = scenes._voronoi(x, points, Fixed(1, 2.0, 0.5))  # all segments are replaced
    cells = np.zeros((9, 9), dtype=int)
    for r in range(9):
        for c in range(9):
            at = np.array([(c + 0.5) * 2 / 9 - 1, (r + 0.5) * 2 / 9 - 1])
            cells[r, c] = ((points[0].numpy() - at) ** 2).sum(1).argmin()
    for cell in range(3):
        np.testing.assert_allclose(y[0, 0].numpy()[cells == cell], x[0, 0].numpy()[cells == cell].mean(), atol=1e-6)


def test_jigsaw_moves_whole_cells_to_places_nearby():
    cells = torch.arange(100.0).view(1, 1, 10, 10)
    y = scenes.jigsaw(cells.repeat_interleave(3, 2).repeat_interleave(3, 3), Draws(keys(1)))[0, 0]
    small = y[::3, ::3]
    torch.testing.assert_close(y, small.repeat_interleave(3, 0).repeat_interleave(3, 1))
    assert sorted(small.flatten().round().int().tolist()) == list(range(100))
    moved = (small.round().int() - torch.arange(100).view(10, 10)).abs()
    assert (moved > 0).float().mean() > 0.5
    assert (moved // 10).max() <= 5


def test_polar_makes_rings_into_stripes():
    axis = torch.linspace(-1, 1, 41)
    rings = torch.sin(8 * (axis.view(-1, 1) ** 2 + axis**2).sqrt()).view(1, 1, 41, 41)
    y = scenes.polar(rings, Fixed(1, 1.0, [0.0, 0.0]))[0, 0, :, 2:36]
    assert y.std(0).max() < 0.05
    assert y.std(1).min() > 0.3


def test_arithmetic_by_hand():
    x = images(1, 1, 6)
    v = x[0, 0].tolist()
    cases = [
        (pixels.add, (-0.3,), lambda p: p - 0.3),
        (pixels.multiply, (2.5,), lambda p: 2.5 * p),
        (pixels.solarize, (0.4,), lambda p: 1 - p if p >= 0.4 * max(map(max, v)) else p),
        (pixels.gamma, (2.0,), lambda p: p**2),
        (pixels.linear_contrast, (3.0,), lambda p: 0.5 + 3 * (p - 0.5)),
        (pixels.sigmoid_contrast, (10.0, 0.5), lambda p: 1 / (1 + np.exp(-10 * (p - 0.5)))),
        (pixels.log_contrast, (1.5,), lambda p: 1.5 * np.log2(1 + p)),
        (pixels.quantize, (3.2,), lambda p: np.round(3 * p) / 3),
        (pixels.invert, (), lambda p: 1 - p),
    ]
    for transform, values, expected in cases:
        y = transform(x, Fixed(1, *values))[0, 0]
        np.testing.assert_allclose(y.numpy(), [[expected(p) for p in row] for row in v], atol=1e-5)


def test_cutout_covers_what_it_says():
    x = torch.zeros(1, 1, 10, 20)
    y = pixels.cutout(x, Fixed(1, [0.3, 0.5], [1.0, 0.0], 0.7))[0, 0]
    assert (y[7:, :10] == 0.7).all()
    assert int((y == 0.7).sum()) == 30


def test_edges_lie_where_the_steps_are():
    x = torch.zeros(2, 1, 24, 24)
    x[:, :, :, 12:] = 1
    y = filters.canny_edges(x, Draws(keys(2)))
    for image in y[:, 0]:
        edge = image if image.mean() < 0.5 else 1 - image
        assert edge[:, :10].sum() == edge[:, 14:].sum() == 0
        assert (edge[4:-4, 10:14].sum(1) == 1).all()
    assert set(y.unique().tolist()) <= {0.0, 1.0}


# -- bringing images to [0, 1] ---------------------------------------------------------------------


def test_normalisation_is_undone_and_done_again():
    unit = UnitImages([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    x = images(4, 3)
    normal = (x - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    torch.testing.assert_close(unit.open(normal), x)
    torch.testing.assert_close(unit.close(x, normal), normal)
    assert unit.outside(unit.open(normal)) == 0
    assert UnitImages(None, None).outside(normal) == 4
    half = unit.open(normal.half())
    assert unit.outside(half) == 0
    assert unit.close(half, normal.half()).dtype == torch.float16


def test_bytes():
    unit = UnitImages(None, None)
    x = (images(2, 1) * 255).to(torch.uint8)
    assert torch.equal(unit.close(unit.open(x), x), x)


def test_outside_counts_images_and_sees_nan():
    x = images(4, 1)
    x[1, 0, 2, 2], x[2, 0, 1, 1] = 1.5, torch.nan
    assert UnitImages(None, None).outside(x) == 2


# -- selection -------------------------------------------------------------------------------------


def test_scores():
    accuracy = {"blur": 0.9, "edges": 0.5, "weather": 0.7}
    assert held_out_mean(accuracy) == pytest.approx(0.7)
    assert held_out_mean(accuracy, ["blur", "weather"]) == 0.5
    first = (FOLDS["first"], dict.fromkeys(FOLDS["first"], 1.0) | dict.fromkeys(FOLDS["second"], 0.25))
    second = (FOLDS["second"], dict.fromkeys(FOLDS["first"], 0.5) | dict.fromkeys(FOLDS["second"], 1.0))
    assert two_fold_score([first, second]) == pytest.approx((5 * 0.25 + 5 * 0.5) / 10)
    assert two_fold_score([((), accuracy)]) == pytest.approx(0.7)


def test_of_tied_settings_the_middle_one_is_selected():
    assert select_setting({0.1: 0.5, 0.2: 0.7, 0.3: 0.7, 0.4: 0.7, 0.5: 0.6}) == 0.3
    assert select_setting({"a": 0.5, "b": 0.4}) == "a"


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: crafted_shift(images(2), "colors", keys(2)), "`family` to be one of arithmetic,.*but got 'colors'"),
        (lambda: crafted_shift(images(2, 2), "blur", keys(2)), r"C 1 or 3.*but got \(2, 2, 12, 12\)"),
        (lambda: crafted_shift(images(2)[:, 0], "blur", keys(2)), r"\(N, C, H, W\).*unsqueeze"),
        (lambda: crafted_shift(images(2).long(), "blur", keys(2)), "floating-point images.*torch.int64"),
        (lambda: families_of("third", argument="folds"), r"`folds` to be 'first', 'second', 'all' .*\['third'\]"),
        (lambda: families_of(["blur", "blur"]), "different names"),
        (lambda: families_of([]), r"but got \[\]"),
        (lambda: UnitImages(0.5, None), "both `mean` and `std`, or neither"),
        (lambda: UnitImages(0.5, 0.0), "`std` to be positive"),
        (lambda: UnitImages([0.5, 0.5], 1.0).open(images(2, 3)), "one for each of the 3 channels, but got 2"),
        (lambda: held_out_mean({"blur": 1.0}, ["blur"]), "a family that the run was not trained on"),
        (lambda: two_fold_score([(["blur"], {"blur": 1.0})]), "a run that was not trained on 'blur', but all 1 were"),
        (lambda: two_fold_score([((), {"blur": 1.0}), ((), {})]), "report the same families"),
        (lambda: two_fold_score([]), "at least one run"),
        (lambda: select_setting({}), "at least one setting"),
        (lambda: select_setting({1: float("nan")}), "no NaN"),
    ],
)
def test_errors(call, message):
    with pytest.raises(DebiasError, match=message):
        call()


def test_a_missing_kornia_names_the_extra(monkeypatch):
    for name in ("kornia.filters", "kornia.enhance", "kornia.color"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DebiasError, match=r"`kornia` to be installed.*pip install 'lightning-debias\[augment\]'"):
        UnitImages(None, None)


@pytest.mark.parametrize("found", ["0.8.2", "0.7.4"])
def test_an_older_kornia_is_refused(monkeypatch, found):
    """Its CLAHE and Canny's edges are others."""
    monkeypatch.setattr("kornia.__version__", found)
    with pytest.raises(DebiasError, match=f"it is {found}, and 0.8.3 or newer is needed"):
        crafted_shift(torch.rand(64, 3, 16, 16), "blur", torch.arange(64))
