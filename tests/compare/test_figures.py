"""Figures: what is drawn is what the table says, and nothing is cut or covered."""

from __future__ import annotations

import io
import itertools
import json
import math
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger
from scipy import stats

from _support.records import GROUPS, failed, log_weights, logged, made_up, record, save
from debias.cli.recipes import recipes_folder
from debias.compare.figures import FIGURES, by_group, group_weights, read_weights
from debias.compare.paper import DARK, LIGHT
from debias.compare.points import interval, worst_group, worst_vs_average
from debias.compare.records import find_records
from debias.compare.search import read_config
from debias.compare.table import label, make_comparison
from debias.compare.told import told

FEW = ("erm", "balanced", "group_dro")
MANY = (*FEW, "vrex", "irm", "coral", "mmd", "dann", "cdann", "fishr", "dsu", "mixstyle", "adv_style", "edge_view",
        "reweight", "group_mixup", "hessian_alignment", "domain_penalisation")  # fmt: skip


def compared(methods, rule="val_worst_group", **options):
    return make_comparison(made_up(methods, **options), rule)


def texts(figure):
    """All text that is not empty."""
    return [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]


def pixels(figure):
    """The figure as it is drawn, (height, width, 3)."""
    file = io.BytesIO()
    figure.savefig(file, dpi=100, format="png")
    file.seek(0)
    return matplotlib.image.imread(file)[..., :3]


def points(figure, rows):
    """Mean point of each method, by its label."""
    axes = figure.axes[0]
    return {c.get_label(): tuple(np.ravel(c.lines[0].get_xydata())) for c in axes.containers}


@pytest.mark.parametrize("methods", [FEW, MANY], ids=["3", "18"])
def test_worst_against_average_shows_means_and_seeds(methods):
    comparison = compared(methods)
    figure = worst_vs_average(comparison)
    found = points(figure, comparison.rows)
    assert found == {
        label(row.method): (pytest.approx(100 * row.average.mean), pytest.approx(100 * row.worst.mean))
        for row in comparison.rows
    }
    seeds = np.concatenate([c.get_offsets() for c in figure.axes[0].collections if len(c.get_offsets()) == 3])
    expected = [(100 * run.test.average, 100 * run.test.worst) for row in comparison.rows for run in row.runs]
    np.testing.assert_allclose(seeds, expected)
    (diagonal,) = [line for line in figure.axes[0].lines if line.get_linestyle() == "--"]
    assert diagonal.get_slope() == 1
    assert sorted(text.get_text() for text in figure.axes[0].texts) == sorted(found)


def forty():
    return compared([*FEW, *(f"a_method_with_number_{i}" for i in range(37))])


@pytest.mark.parametrize("comparison", [compared(FEW), compared(MANY), forty()], ids=["3", "18", "40"])
def test_names_beside_points_cover_nothing(comparison):
    figure = worst_vs_average(comparison)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]  # without the line to the point
    assert len(boxes) == len(comparison.rows)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(box.x0 > axes.get_window_extent().x1 for box in boxes)
    assert all(box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    for text, row in zip(axes.texts, sorted(comparison.rows, key=lambda r: -r.worst.mean), strict=True):
        assert text.get_text() == label(row.method)
        assert text.xy == (pytest.approx(100 * row.average.mean), pytest.approx(100 * row.worst.mean))


def means(figure):
    """Mean of each method in the sorted figure, from top to bottom: name, value."""
    axes = figure.axes[0]
    marks = [c for c in axes.collections if not c.get_label().startswith("_")]
    return [(c.get_label(), float(c.get_offsets()[0][0])) for c in sorted(marks, key=lambda c: c.get_offsets()[0][1])]


@pytest.mark.parametrize("comparison", [compared(FEW), compared(MANY[:14]), forty()], ids=["3", "14", "40"])
def test_worst_groups_are_sorted_with_intervals_and_references(comparison):
    figure = worst_group(comparison)
    axes = figure.axes[0]
    expected = sorted(((label(r.method), 100 * r.worst.mean) for r in comparison.rows), key=lambda pair: -pair[1])
    assert means(figure) == [(name, pytest.approx(value)) for name, value in expected]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [name for name, _ in expected]
    by_name = {label(row.method): row for row in comparison.rows}
    bars = [line for line in axes.lines if line.get_linestyle() == "-"]
    for (name, _), line in zip(expected, bars, strict=True):
        values = np.array([run.test.worst for run in by_name[name].runs])
        half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
        ends = 100 * np.clip([values.mean() - half, values.mean() + half], 0, 1)
        np.testing.assert_allclose(line.get_xdata(), ends)
    drawn = {line.get_linestyle(): line.get_xdata()[0] for line in axes.lines if line.get_linestyle() != "-"}
    assert drawn == {"--": pytest.approx(dict(expected)["ERM"]), ":": pytest.approx(dict(expected)["balanced ERM"])}
    figure.draw_without_rendering()
    names = [tick.get_window_extent() for tick in axes.get_yticklabels()]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(names, 2))


def test_lower_is_better_puts_the_lowest_on_top():
    runs = [
        record(m, 0, test=logged("test", (v, v), ("a", "b"), "loss"), direction="min")
        for m, v in (("erm", 3.0), ("vrex", 2.0))
    ]
    assert [name for name, _ in means(worst_group(make_comparison(runs, "last")))] == ["vrex", "ERM"]


@pytest.mark.parametrize("value", [0.0, 0.001, 0.999, 1.0])
def test_percentages_stay_within_0_and_100(value):
    other = abs(value - 0.15)
    runs = [record(m, s, test=[value, abs(other - s / 9), value, value]) for m in FEW for s in (0, 1)]
    comparison = make_comparison(runs, "last")
    assert comparison.percent
    for draw, axes_of in ((worst_group, ("x",)), (worst_vs_average, ("x", "y")), (by_group, ("y",))):
        axes = draw(comparison).axes[0]
        for axis in axes_of:
            low, high = getattr(axes, f"get_{axis}lim")()
            assert 0 <= low < high <= 100
    lines = [line for line in worst_group(comparison).axes[0].lines if line.get_linestyle() == "-"]
    assert all(0 <= end <= 100 for line in lines for end in line.get_xdata())


def test_an_interval_of_one_seed_is_its_value():
    assert interval(compared(FEW, seeds=(1,)).rows[0].worst)[0] == compared(FEW, seeds=(1,)).rows[0].worst.mean


def spec_of(folder, run, config):
    content = {"id": run.id, "recipe": run.recipe, "method": run.method, "seed": run.seed, "params": {}}
    base = {"trainer": {"callbacks": [{"class_path": "debias.GroupMonitor", "init_args": {"group": "group"}}]}}
    content |= {"recipe_hash": run.recipe_hash, "held_out": None, "configs": [base, config]}
    (folder / run.id / "spec.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("method", "kind"),
    [
        ("erm", "nothing"), ("balanced", "groups"), ("group_dro", "groups"), ("vrex", "domains"), ("dann", "domains"),
        ("domain_penalisation", "groups"), ("eiil", "nothing"), ("jtt", "nothing"), ("identity_adversarial", "groups"),
        ("mixstyle", "nothing"), ("dfr", "groups"), ("afr", "nothing"),
    ],
)  # fmt: skip
def test_what_a_method_is_told_is_read_from_its_configuration(tmp_path, method, kind):
    save(made_up((method,)), tmp_path)
    config = read_config(recipes_folder() / "methods" / f"{method}.yaml")
    config.pop("search", None)
    for run in find_records([tmp_path]):
        spec_of(tmp_path, run, config)
    (row,) = make_comparison(find_records([tmp_path]), "last").rows
    assert told(row) == kind


def test_a_spec_that_cannot_be_read_says_nothing(tmp_path):
    save(made_up(("erm",), seeds=(0,)), tmp_path)
    runs = find_records([tmp_path])
    (row,) = make_comparison(runs, "last").rows
    place = tmp_path / "erm-0" / "spec.json"
    for damaged in ("{", '{"configs": 3}', "[" * 3000 + "]" * 3000):
        place.write_text(damaged)
        assert told(row) is None
    nested = {}
    for _ in range(900):
        nested = {"a": nested}
    spec_of(tmp_path, runs[0], nested)
    assert told(row) in (None, "nothing")


def test_colours_and_markers_say_what_a_method_is_told(tmp_path):
    methods = ("erm", "balanced", "group_dro", "vrex", "irm")
    save(made_up(methods), tmp_path)
    for run in find_records([tmp_path]):
        if run.method != "irm":
            config = read_config(recipes_folder() / "methods" / f"{run.method}.yaml")
            config.pop("search", None)
            spec_of(tmp_path, run, config)
    comparison = make_comparison(find_records([tmp_path]), "last")
    for paper in (LIGHT, DARK):
        figure = worst_vs_average(comparison, paper)
        found = {c.get_label(): (c.lines[0].get_color(), c.lines[0].get_marker()) for c in figure.axes[0].containers}
        assert found["balanced ERM"] == found["group_dro"]
        kinds = [found[name] for name in ("ERM", "group_dro", "vrex", "irm")]
        for (shade, marker), (other, another) in itertools.combinations(kinds, 2):
            assert shade != other
            assert marker != another
        legend = [text.get_text() for text in worst_group(comparison, paper).legends[0].get_texts()]
        assert sorted(legend) == ["ERM", "balanced ERM", "not known", "told domains", "told groups", "told nothing"]


@pytest.mark.parametrize("paper", [LIGHT, DARK], ids=["light", "dark"])
@pytest.mark.parametrize("methods", [FEW, MANY], ids=["3", "18"])
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_is_cut_and_all_text_is_legible(tmp_path, name, methods, paper):
    runs = made_up(methods)
    save(runs, tmp_path)
    for run in runs:
        if run.method in ("group_dro", "reweight"):
            log_weights(tmp_path, run)
    figure = FIGURES[name](make_comparison(find_records([tmp_path]), "oracle"), paper)
    image, background = pixels(figure), matplotlib.colors.to_rgb(paper.background)
    for edge in (image[0], image[-1], image[:, 0], image[:, -1]):  # what is cut reaches it
        np.testing.assert_allclose(edge, np.broadcast_to(background, edge.shape), atol=1 / 255)
    assert any("ORACLE" in text.get_text() for text in texts(figure))
    cells = [t for t in figure.axes[0].texts if "±" in t.get_text()]
    assert len(cells) == (18 * (2 + len(GROUPS)) if (name, methods) == ("by_group", MANY) else 0)
    for text in texts(figure):
        if text not in cells:
            assert contrast(text.get_color(), paper.background) > 4.5, text.get_text()
    if cells:
        meshes = [m.to_rgba(np.asarray(m.get_array()))[..., :3] for m in figure.axes[0].collections]
        for text, color in zip(cells, np.concatenate(meshes, axis=1).reshape(-1, 3), strict=True):
            assert contrast(text.get_color(), color) > 3.5, text.get_text()


def contrast(a, b):
    """WCAG's contrast ratio of two colours."""

    def luminance(color):
        rgb = np.array(matplotlib.colors.to_rgb(color))
        return float(np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_bars_of_few_methods_and_heatmap_of_many():
    few, many = compared(FEW), compared(MANY)
    bars = by_group(few).axes[0].containers
    for row, bar in zip(few.rows, bars, strict=True):
        heights = [patch.get_height() for patch in bar]
        np.testing.assert_allclose(heights, [100 * row.by_group[name].mean for name in GROUPS])
    axes = by_group(many).axes[0]
    cells = np.concatenate([np.asarray(mesh.get_array()) for mesh in axes.collections], axis=1)
    expected = [[row.average.mean, row.worst.mean, *(row.by_group[g].mean for g in GROUPS)] for row in many.rows]
    np.testing.assert_allclose(cells, 100 * np.array(expected))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [label(row.method) for row in many.rows]


def test_many_domains_and_groups_without_samples():
    names = [f"domain {i}" for i in range(47)]
    runs = made_up(FEW, groups=names)
    figure = by_group(make_comparison(runs, "last"))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["average", "worst group", *names]
    empty = [record(m, s, test=[0.5, math.nan, 0.7, 0.8]) for m in MANY for s in (0, 1)]
    cells = [t.get_text() for t in by_group(make_comparison(empty, "last")).axes[0].texts]
    assert len(cells) == 18 * (1 + len(GROUPS))
    assert not any("nan" in cell for cell in cells)
    assert by_group(make_comparison(empty[:2], "last")) is not None


def test_one_seed_and_failed_methods():
    comparison = make_comparison([*made_up(FEW, seeds=(4,)), failed("irm", 4)], "last")
    figure = worst_vs_average(comparison)
    assert set(points(figure, comparison.rows)) == {"ERM", "balanced ERM", "group_dro"}
    assert "deviation" not in figure.axes[0].get_title(loc="left")
    assert len(by_group(comparison).axes[0].containers) == 3


def test_nothing_to_draw():
    comparison = make_comparison([record("erm", 0, test={})], "last")
    assert worst_vs_average(comparison) is None
    assert by_group(comparison) is None
    assert group_weights(comparison) is None


def test_raw_metrics_are_not_scaled():
    runs = [record("erm", 0, test=logged("test", (3.0, 5.0), ("a", "b"), "loss"))]
    figure = worst_vs_average(make_comparison(runs, "last"))
    assert points(figure, ())["ERM"] == (4.0, 3.0)
    assert "%" not in figure.axes[0].get_xlabel()


def test_weights_are_means_over_seeds_with_one_deviation(tmp_path):
    runs = made_up(("erm", "group_dro", "domain_penalisation"), seeds=(0, 1))
    save(runs, tmp_path)
    for run in runs:
        if run.method != "erm":
            log_weights(tmp_path, run, "domain_weight" if "domain" in run.method else "group_weight")
    figure = group_weights(make_comparison(find_records([tmp_path]), "last"))
    assert [axes.get_title() for axes in figure.axes] == ["domain_penalisation", "group_dro"]
    read = [read_weights(tmp_path / f"group_dro-{s}")[GROUPS[3]] for s in (0, 1)]
    values = np.array([[r[step] for step in range(0, 200, 10)] for r in read])
    line = next(line for line in figure.axes[1].lines if line.get_label() == GROUPS[3])
    np.testing.assert_allclose(line.get_xdata(), range(0, 200, 10))
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    band = figure.axes[1].collections[3].get_paths()[0].vertices
    at_end = band[band[:, 0] == 190][:, 1]
    mean, std = values.mean(0)[-1], values.std(0, ddof=1)[-1]
    assert (at_end.min(), at_end.max()) == pytest.approx((mean - std, mean + std))


def test_weights_are_read_as_lightning_writes_them(tmp_path):
    logger = CSVLogger(tmp_path, name="csv", version="")
    for step in (0, 5):
        logger.log_metrics({"train/loss": 1.0, "train/average_loss": 2.0}, step)
        values = {"train/group_weight/digit 0-4, red": 0.25 + step, "train/place/group_weight/b": 0.5}
        logger.log_metrics(values | {"train/loss_by_group/b": 3.0, "train/vrex_penalty_weight": 4.0}, step + 1)
    logger.save()
    assert (tmp_path / "csv" / "metrics.csv").exists()
    assert read_weights(tmp_path) == {"digit 0-4, red": {1: 0.25, 6: 5.25}, "b": {1: 0.5, 6: 0.5}}
    assert read_weights(tmp_path / "csv" / "nothing") == {}


def test_runs_without_a_folder_have_no_weights():
    runs = [replace(run, folder=None) for run in made_up(FEW)]
    assert group_weights(make_comparison(runs, "last")) is None
