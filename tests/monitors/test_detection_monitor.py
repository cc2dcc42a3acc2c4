"""Detection monitors on a tiny detector: what they log is what its predictions give, and nothing is changed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

pytest.importorskip("pycocotools")
pytest.importorskip("torchvision")

from PIL import Image
from torch.utils.data import DataLoader
from torchvision.ops import box_iou

from _support.fits import make_trainer, parameters, same
from _support.runs import ddp
from _support.scenes import DOMAINS, Scenes, pairs, scene
from debias import BoxStability, DetectionMonitor, EvalSampler, GroupDRO, tag
from debias.errors import BatchKeyError, DebiasError, HeadNotFoundError, LossNotFoundError
from debias.metrics import DetectionAccuracy, GroupMeanAveragePrecision
from debias.models.detector import Detector
from debias.monitors.box_stability import box_stability
from debias.step.watcher import MAX_LOGGED_GROUPS


class Found(Detector):
    """A detector that finds something without training: no least score."""

    def __init__(self, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__("tiny_fcos", 3, options={"score_thresh": 0.0, "detections_per_img": 5, **options})
        self.double()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Knowing(torch.nn.Module):
    """Predicts boxes near the true ones; the further off, the higher the number of the scene."""

    def __init__(self):
        super().__init__()
        self.scenes = [scene(i) for i in range(10)]

    def forward(self, images):
        results = []
        for image in images:
            i, target = next((i, t) for i, (x, t) in enumerate(self.scenes) if torch.equal(x, image))
            scores = torch.full((len(target["labels"]),), 0.95 - i / 20, dtype=torch.float64)
            results.append({"boxes": target["boxes"] + i / 3, "scores": scores, "labels": target["labels"]})
        return results


class Known(Found):
    def __init__(self):
        super().__init__()
        self.network = Knowing()


class Direct(Found):
    """Calls the network itself, not `forward`."""

    def validation_step(self, batch, batch_idx):
        self.network(batch[0])


class Several(Found):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])


class KnownDirect(Direct, Known):
    pass


def data():
    dataset = tag(Scenes(), site=DOMAINS)
    return DataLoader(dataset, 4, sampler=EvalSampler(dataset), collate_fn=pairs)


def validate(model, callbacks, **options):
    trainer = make_trainer(callbacks, **options)
    (logged,) = trainer.validate(model, data(), verbose=False)
    return logged


NAMES = ["field", "lab", "roof"]


def monitor(**options):
    return DetectionMonitor("site", 3, **{"domain_names": NAMES, "score_threshold": 0.0, **options})


@pytest.mark.parametrize(("model", "options"), [(Known, {}), (KnownDirect, {"predictions": "network"})])
def test_logs_what_the_predictions_give(model, options):
    module = model()
    logged = validate(module, [monitor(**options)])
    images, targets = pairs([scene(i) for i in range(10)])
    module.eval()
    with torch.no_grad():
        found = [module.network([image])[0] for image in images]
    metrics = [GroupMeanAveragePrecision(3), DetectionAccuracy(3, score_threshold=0.0)]
    for metric in metrics:
        metric.update(found, targets, DOMAINS)
    precision, accuracy = (metric.compute() for metric in metrics)
    assert logged["val/map"] == pytest.approx(float(precision["map"]), rel=1e-6)
    assert logged["val/worst_domain_map_50"] == pytest.approx(float(precision["worst_group_map_50"]), rel=1e-6)
    assert logged["val/average_domain_accuracy"] == pytest.approx(float(accuracy["average_domain_accuracy"]), rel=1e-6)
    for i, name in enumerate(NAMES):
        by_domain = float(precision["map_50_by_group"][i]), float(accuracy["detection_accuracy_by_group"][i])
        found_here = logged[f"val/map_50_by_domain/{name}"], logged[f"val/detection_accuracy_by_domain/{name}"]
        assert found_here == pytest.approx(by_domain, rel=1e-6, nan_ok=True)
    assert float(precision["map_50"]) > 0


def test_monitors_change_nothing():
    runs = []
    for callbacks in ([], [monitor(draw=1), BoxStability(["network.backbone.2", "network.backbone.8"])]):
        model = Found()
        trainer = make_trainer([*callbacks, GroupDRO("site", 3, losses="heads")], max_epochs=1)
        trainer.fit(model, data(), data())
        runs.append(parameters(model))
        assert not any(m._forward_hooks for m in model.modules())
    assert same(*runs)


def test_works_on_a_plain_baseline_and_skips_the_sanity_check(tmp_path):
    trainer = make_trainer([monitor()], num_sanity_val_steps=1, max_epochs=1)
    trainer.fit(Found(), data(), data())
    assert "val/map" in trainer.callback_metrics


def test_draws_a_row_for_each_domain(tmp_path):
    """True boxes green; predicted ones red and, half a pixel or more away, on top."""
    logged = []

    from lightning.pytorch.loggers.logger import DummyLogger

    class Images(DummyLogger):
        def log_image(self, key, images, step):
            logged.append((key, images[0].shape))

    validate(Known(), [monitor(draw=2)], default_root_dir=tmp_path, logger=Images())
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "detections" / "val-epoch=0.png"))).permute(2, 0, 1)
    assert picture.shape == (3, 3 * 66, 2 * 66)
    assert logged == [("val/detections", (198, 132, 3))]
    corner = scene(1)[1]["boxes"][0].int().tolist()  # scene 1 is the first of domain 1, the second row
    assert picture[:, 66 + corner[1], corner[0] + 3].tolist() == [0, 160, 0]
    assert any(tuple(c) == (220, 0, 0) for c in picture.flatten(1).T.tolist())


def test_errors_say_what_to_do():
    with pytest.raises(LossNotFoundError, match=r"Pass `predictions='dotted.path'`"):
        validate(Direct(), [monitor()])
    with pytest.raises(BatchKeyError, match="`targets=0` to name a list of dictionaries"):
        validate(Found(), [monitor(targets=0)])
    with pytest.raises(BatchKeyError, match="`domain='place'`"):
        validate(Found(), [DetectionMonitor("place", 3)])
    with pytest.raises(DebiasError, match="`domain_names` to hold 2 different names"):
        DetectionMonitor("site", 2, domain_names=["a"])


def on_rank(rank):
    logged = validate(Known(), [monitor()], strategy=ddp(), devices=2)
    callbacks = [BoxStability(["network.backbone.2"], rate=0.3, score_threshold=0.0)]
    return logged | validate(Found(), callbacks, strategy=ddp(), devices=2)


def test_two_ranks_are_one_process(ranks):
    first, second = ranks.run(on_rank)
    whole = validate(Known(), [monitor()])
    assert first == pytest.approx(second, nan_ok=True)
    assert {k: v for k, v in first.items() if "stability" not in k} == pytest.approx(whole, nan_ok=True)
    assert 0 < first["val/box_stability"] < 1


# -- box stability
# ---------------------------------------------------------------------------------------------


def by_permutations(a, b):
    overlaps = box_iou(a.double(), b.double())
    if len(a) > len(b):
        overlaps = torch.cat([overlaps, torch.zeros(len(a), len(a) - len(b), dtype=torch.float64)], 1)
    orders = itertools.permutations(range(overlaps.shape[1]), len(a))
    return max(math.fsum(float(overlaps[i, j]) for i, j in enumerate(order)) for order in orders) / len(a)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 3), (4, 2), (2, 5), (3, 0)])
def test_box_stability_is_the_best_matching(n, m):
    g = torch.Generator().manual_seed(n * 10 + m)
    for _ in range(5):
        a, b = (torch.rand(k, 4, generator=g) for k in (n, m))
        a[:, 2:], b[:, 2:] = a[:, :2] + a[:, 2:], b[:, :2] + b[:, 2:]
        assert float(box_stability(a, b)) == pytest.approx(by_permutations(a, b), abs=1e-12)


class Fixed(Found):
    """Predicts boxes that depend on one layer alone."""

    def __init__(self):
        super().__init__()
        self.spare, self.seen = torch.nn.Identity(), torch.nn.Identity()

    def forward(self, images):
        results = []
        for _ in images:
            self.spare(torch.ones(1, 4))
            width = 10 * float(self.seen(torch.ones(1, 1)).clamp(max=1))  # 0 or 10
            boxes = torch.tensor([[0.0, 0, 10, 10], [20.0, 0, 20 + width, 10]])
            results.append({"boxes": boxes, "scores": torch.tensor([0.9, 0.8]), "labels": torch.ones(2).long()})
        return results


def test_stability_of_a_known_detector():
    """Half of the boxes vanish where the only channel is dropped; a layer that nothing depends on leaves all."""
    assert validate(Fixed(), [BoxStability(["spare"], rate=0.9)])["val/box_stability"] == 1
    dropped = validate(Fixed(), [BoxStability(["seen"], rate=0.5, draws=50)])["val/box_stability"]
    assert dropped == pytest.approx(0.75, abs=0.03)  # 500 draws
    again = validate(Fixed(), [BoxStability(["seen"], rate=0.5, draws=50)])["val/box_stability"]
    other = validate(Fixed(), [BoxStability(["seen"], rate=0.5, draws=50, seed=1)])["val/box_stability"]
    assert dropped == again != other


def test_stability_falls_with_the_rate_and_is_told_by_domain():
    def run(rate):
        layers = ["network.backbone.2", "network.backbone.8"]
        callback = BoxStability(
            layers, rate=rate, score_threshold=0.0, domain="site", n_domains=3, domain_names=NAMES, draws=3
        )
        return validate(Found(), [callback])

    low, high = run(0.02), run(0.6)
    assert 1 >= low["val/box_stability"] > high["val/box_stability"] > 0
    sizes = torch.bincount(DOMAINS).tolist()
    parts = [low[f"val/box_stability_by_domain/{name}"] for name in NAMES]
    assert low["val/box_stability"] == pytest.approx(
        sum(s * p for s, p in zip(sizes, parts, strict=True)) / 10, rel=1e-5
    )


def test_predictions_stay_as_they_are_beside_it():
    callbacks = [BoxStability(["network.backbone.2"], rate=0.5, score_threshold=0.0), monitor()]
    alone = validate(Found(), [monitor()])
    beside = validate(Found(), callbacks)
    assert {k: beside[k] for k in alone} == pytest.approx(alone, nan_ok=True)


class Shaky(Knowing):
    """Loses its boxes where the only channel of a layer is dropped."""

    def __init__(self):
        super().__init__()
        self.seen = torch.nn.Identity()

    def forward(self, images):
        kept = float(self.seen(torch.ones(1, 1)).clamp(max=1))
        return [{**found, "boxes": found["boxes"] * kept} for found in super().forward(images)]


class Unsteady(Found):
    def __init__(self):
        super().__init__()
        self.network = Shaky()


class UnsteadyDirect(Direct, Unsteady):
    pass


@pytest.mark.parametrize("model", [Unsteady, UnsteadyDirect])
@pytest.mark.parametrize("order", [1, -1])
def test_predictions_of_a_submodule_stay_as_they_are_beside_it(model, order):
    def both():
        options = {"score_threshold": 0.0, "predictions": "network"}
        return [monitor(**options), BoxStability(["network.seen"], rate=0.9, **options)][::order]

    first, second = both()
    alone = validate(model(), [first]) | validate(model(), [second])
    assert validate(model(), both()) == pytest.approx(alone, nan_ok=True)
    assert alone["val/map"] > 0.3
    assert alone["val/box_stability"] < 0.7


@pytest.mark.parametrize("order", [1, -1])
def test_two_stabilities_are_those_of_each_alone(order):
    def both():
        first = BoxStability(["network.backbone.2"], rate=0.5, score_threshold=0.0, name="first")
        return [first, BoxStability(["network.backbone.8"], rate=0.1, score_threshold=0.0, name="second")]

    first, second = both()
    alone = validate(Found(), [first]) | validate(Found(), [second])
    assert validate(Found(), both()[::order]) == alone


def test_stability_by_crossed_domains():
    dataset = tag(Scenes(), site=DOMAINS, half=torch.arange(10) % 2, both=DOMAINS * 2 + torch.arange(10) % 2)
    loader = DataLoader(dataset, 4, sampler=EvalSampler(dataset), collate_fn=pairs)
    logged = []
    for domain, n in ((("site", "half"), (3, 2)), ("both", 6)):
        callback = BoxStability(["network.backbone.2"], score_threshold=0.0, domain=domain, n_domains=n)
        logged += make_trainer([callback]).validate(Found(), loader, verbose=False)
    crossed, plain = logged
    prefix = "val/box_stability_by_domain/"
    found = [crossed[f"{prefix}{i}_{j}"] for i in range(3) for j in range(2)]
    assert found == pytest.approx([plain[f"{prefix}{i}"] for i in range(6)], abs=0, nan_ok=True)
    assert sum(value == value for value in found) > 3


def test_several_loaders_in_a_dictionary():
    def both(loaders):
        callbacks = [monitor(), BoxStability(["network.backbone.2"], score_threshold=0.0)]
        trainer = make_trainer(callbacks)
        trainer.validate(Several(), loaders, verbose=False)
        return {k: float(v) for k, v in trainer.callback_metrics.items()}

    logged = both({"a": data(), "b": data()})
    assert logged == pytest.approx(both([data(), data()]), abs=0, nan_ok=True)
    assert {"val/map/dataloader_idx_1", "val/box_stability/dataloader_idx_1"} <= set(logged)


def test_wrong_arguments_of_box_stability():
    for options, match in (
        ({"layers": "network"}, "`layers` to be a list of dotted paths, but got 'network'"),
        ({"layers": []}, "`layers`"),
        ({"layers": ["a"], "rate": 1.0}, r"`rate` to be a number in \(0, 1\), but got 1.0"),
        ({"layers": ["a"], "draws": 0}, "`draws`"),
    ):
        with pytest.raises(DebiasError, match=match):
            BoxStability(**options)
    with pytest.raises(HeadNotFoundError, match="`layers` to be the dotted path of a submodule, but got 'nothing'"):
        validate(Found(), [BoxStability(["nothing"])])
    with pytest.raises(DebiasError, match=r"to return a tensor \(N, C, ...\), but FCOSHead returned dict"):
        validate(Found(), [BoxStability(["network.head"])])
    with pytest.raises(LossNotFoundError, match="run what predicts for BoxStability"):
        validate(Direct(), [BoxStability(["network.backbone.2"])])
    assert validate(Direct(), [BoxStability(["network.backbone.2"], predictions="network", score_threshold=0.0)])


@pytest.mark.parametrize("n", [MAX_LOGGED_GROUPS, MAX_LOGGED_GROUPS + 1])
def test_values_by_domain_are_logged_up_to_a_number(n):
    callbacks = [
        DetectionMonitor("site", n),
        BoxStability(["network.backbone.2"], score_threshold=0.0, domain="site", n_domains=n),
    ]
    logged = validate(Found(), callbacks)
    kinds = {"map_by_domain", "map_50_by_domain", "detection_accuracy_by_domain", "box_stability_by_domain"}
    found = [k.split("/")[1] for k in logged if "_by_domain/" in k]
    assert len(found) == (n * len(kinds) if n <= MAX_LOGGED_GROUPS else 0)
    assert set(found) <= kinds
    assert {"val/map", "val/worst_domain_map", "val/average_domain_map", "val/box_stability"} <= set(logged)
