"""GroupMonitor through real Trainers, against numbers computed by hand from the module's predictions."""

import copy
import math
import warnings
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from debias import GroupMonitor, tag
from debias.errors import AmbiguousLossError, BatchKeyError, DebiasError, LossNotFoundError, RowsError
from debias.step.watcher import MAX_LOGGED_GROUPS

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
g = torch.Generator().manual_seed(3)
X = torch.randn(23, 4, generator=g)
Y = torch.randint(0, 3, (23,), generator=g)
PLACE = torch.randint(0, 3, (23,), generator=g)
PLACE[5] = -1
# Group 2 has no sample of class 1.
fewer_classes = pytest.mark.filterwarnings("ignore:.*is averaged over the classes:UserWarning")


class Base(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class WithLoss(Base):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        self.log("loss", F.cross_entropy(self.net(x), y))

    test_step = validation_step


class ForwardOnly(Base):
    def validation_step(self, batch, batch_idx):
        self(batch[0]).argmax(1)


class ForwardCalledDirectly(Base):
    def validation_step(self, batch, batch_idx):
        self.forward(batch[0])


class NeitherLossNorForward(Base):
    def validation_step(self, batch, batch_idx):
        return {"scores": self.net(batch[0])}


def loader(places=PLACE, y=Y, n=23):
    return DataLoader(tag(TensorDataset(X[:n], y[:n]), place=places[:n]), batch_size=8)


def by_hand(module, n=23):
    with torch.no_grad():
        correct = (module.net(X[:n]).argmax(1) == Y[:n]).double()
    return float(correct.mean()), [float(correct[PLACE[:n] == k].mean()) for k in range(3)]


def validate(module, monitor, data=None):
    trainer = L.Trainer(callbacks=[monitor], enable_checkpointing=False, **QUIET)
    trainer.validate(module, loader() if data is None else data, verbose=False)
    return {k: float(v) for k, v in trainer.callback_metrics.items()}


@pytest.mark.parametrize("n", [MAX_LOGGED_GROUPS, MAX_LOGGED_GROUPS + 1])
def test_values_by_group_are_logged_up_to_a_number(n):
    module = WithLoss()
    logged = validate(module, GroupMonitor("place", n))
    average, groups = by_hand(module)
    of_all = {"accuracy": average, "worst_group_accuracy": min(groups)}
    of_all |= {"accuracy_difference": max(groups) - min(groups), "accuracy_ratio": min(groups) / max(groups)}
    by_group = {k: v for k, v in logged.items() if "_by_group/" in k or "_count/" in k}
    assert len(by_group) == (2 * n if n <= MAX_LOGGED_GROUPS else 0)
    assert {k: v for k, v in logged.items() if k.startswith("val/") and k not in by_group} == pytest.approx(
        {f"val/{k}": v for k, v in of_all.items()}
    )


@pytest.mark.parametrize("module", [WithLoss, ForwardOnly, ForwardCalledDirectly])
def test_logged_values(module):
    module = module()
    logged = validate(module, GroupMonitor("place", 4, train_counts=[6, 3, 1, 0], group_names=["a", "b", "c", "d"]))
    average, groups = by_hand(module)
    assert logged["val/accuracy"] == pytest.approx(average)
    assert [logged[f"val/accuracy_by_group/{k}"] for k in "abc"] == pytest.approx(groups)
    assert logged["val/accuracy_by_group/d"] != logged["val/accuracy_by_group/d"]  # NaN: no sample
    assert logged["val/worst_group_accuracy"] == pytest.approx(min(groups))
    assert logged["val/accuracy_difference"] == pytest.approx(max(groups) - min(groups))
    assert logged["val/accuracy_ratio"] == pytest.approx(min(groups) / max(groups))
    assert logged["val/adjusted_accuracy"] == pytest.approx(0.6 * groups[0] + 0.3 * groups[1] + 0.1 * groups[2])


def test_checkpoint_and_early_stopping_on_an_erm_baseline(tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/worst_group_accuracy", mode="max", save_top_k=1)
    stop = EarlyStopping("val/worst_group_accuracy", mode="max", patience=1)
    module = WithLoss()
    trainer = L.Trainer(max_epochs=4, callbacks=[best, GroupMonitor("place", 3), stop], num_sanity_val_steps=2, **QUIET)
    trainer.fit(module, loader(), loader())
    assert best.best_model_path
    saved = torch.load(best.best_model_path, weights_only=True)
    module.load_state_dict(saved["state_dict"])
    assert float(best.best_model_score) == pytest.approx(min(by_hand(module)[1]))
    assert "validation_step" not in vars(module)


def test_every_epoch_starts_afresh_and_the_sanity_check_is_skipped():
    class Constant(WithLoss):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    seen = []

    class Read(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")})

    module = Constant()
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[GroupMonitor("place", 3), Read()],
        num_sanity_val_steps=1,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module, loader(), loader())
    assert seen[0] == {}  # the sanity check
    assert seen[1] == seen[2]
    assert seen[1]["val/accuracy"] == pytest.approx(by_hand(module)[0])


def test_one_set_for_each_loader():
    module = WithLoss()
    logged = validate(module, GroupMonitor("place", 3), [loader(), loader(n=11)])
    for i, n in enumerate((23, 11)):
        average, groups = by_hand(module, n)
        assert logged[f"val/accuracy/dataloader_idx_{i}"] == pytest.approx(average)
        assert logged[f"val/worst_group_accuracy/dataloader_idx_{i}"] == pytest.approx(min(groups))


def test_testing_logs_under_its_own_name():
    module = WithLoss()
    trainer = L.Trainer(callbacks=[GroupMonitor("place", 3, name="place")], enable_checkpointing=False, **QUIET)
    trainer.test(module, loader(), verbose=False)
    assert float(trainer.callback_metrics["test/place/accuracy"]) == pytest.approx(by_hand(module)[0])


@fewer_classes
def test_any_metric_can_be_split():
    module = WithLoss()
    logged = validate(module, GroupMonitor("place", 3, metric=torchmetrics.classification.MulticlassF1Score(3)))
    with torch.no_grad():
        predicted = module.net(X).argmax(1)
    metric = torchmetrics.classification.MulticlassF1Score(3)
    names = [k for k in logged if k.startswith("val/") and k.endswith("_by_group/1")]
    assert len(names) == 1
    assert logged[names[0]] == pytest.approx(float(metric(predicted[PLACE == 1], Y[PLACE == 1])))


def macro(kind, **options):
    return getattr(torchmetrics.classification, f"Multiclass{kind}")(3, **options)


@fewer_classes
def test_an_adjusted_average_of_any_metric():
    logged = validate(WithLoss(), GroupMonitor("place", 3, metric=macro("F1Score"), train_counts=[6, 3, 1]))
    groups = [logged[f"val/multiclass_f1_score_by_group/{k}"] for k in range(3)]
    adjusted = 0.6 * groups[0] + 0.3 * groups[1] + 0.1 * groups[2]
    assert logged["val/adjusted_multiclass_f1_score"] == pytest.approx(adjusted)


COLLECTIONS = {
    "by name": ({"f": macro("F1Score"), "recall": macro("Recall")}, {}, "{}"),
    "as a list": ([macro("F1Score"), macro("Recall")], {}, "{}"),
    "prefix and postfix": (
        {"f": macro("F1Score"), "recall": macro("Recall")}, {"prefix": "a_", "postfix": "_b"}, "a_{}_b"
    ),
    "in a folder": ({"f": macro("F1Score"), "recall": macro("Recall")}, {"prefix": "clean/"}, "clean/{}"),
    "without groups": ({"f": macro("F1Score"), "recall": macro("Recall")}, {"compute_groups": False}, "{}"),
    "given groups": (
        {"f": macro("F1Score"), "recall": macro("Recall")}, {"compute_groups": [["f", "recall"]]}, "{}"
    ),
    "one in another": ({"inner": torchmetrics.MetricCollection([macro("F1Score"), macro("Recall")])}, {}, "{}"),
}  # fmt: skip


@fewer_classes
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("case", COLLECTIONS)
def test_a_collection_is_split_metric_by_metric(case, used):
    """As two monitors of one metric each would, also where its metrics share their states already."""
    metrics, options, form = COLLECTIONS[case]
    collection = torchmetrics.MetricCollection(metrics, **options)
    if used:
        collection.update(F.one_hot(Y[:9], 3).float(), Y[:9].flip(0))
    before = collection.compute() if used else {}
    module = WithLoss()
    logged = validate(module, GroupMonitor("place", 4, metric=collection, train_counts=[5, 3, 1, 0]))
    keys = [key for key, _ in collection.items(keep_base=True)]
    assert len(keys) == 2
    expected = {}
    for key, kind in zip(keys, ("F1Score", "Recall"), strict=True):
        alone = validate(module, GroupMonitor("place", 4, metric=macro(kind), train_counts=[5, 3, 1, 0]))
        own = "multiclass_f1_score" if kind == "F1Score" else "multiclass_recall"
        folder, _, name = form.format(key).rpartition("/")
        start = f"val/{folder}/" if folder else "val/"
        expected |= {k.replace("val/", start).replace(own, name): v for k, v in alone.items() if own in k}
    assert len(expected) == 2 * (4 + 5) + 2 * 4
    expected = {k: v for k, v in expected.items() if f"{form.format(keys[1])}_count/" not in k}  # one for all metrics
    assert f"val/{form.format(keys[0])}" in expected
    assert {k: v for k, v in logged.items() if k.startswith("val/")} == pytest.approx(expected, nan_ok=True)
    assert (collection.compute() if used else {}) == before


def test_a_collection_of_each_loader_and_its_direction():
    collection = torchmetrics.MetricCollection({"error": torchmetrics.HammingDistance("multiclass", num_classes=3)})
    monitor = GroupMonitor("place", 3, metric=collection)
    assert not monitor.higher_is_better
    assert GroupMonitor("place", 3).higher_is_better
    assert monitor.state_key == "GroupMonitor(place, error)"
    logged = validate(WithLoss(), monitor, [loader(), loader(n=11)])
    for i in range(2):
        by_group = [logged[f"val/error_by_group/{k}/dataloader_idx_{i}"] for k in range(3)]
        assert logged[f"val/worst_group_error/dataloader_idx_{i}"] == max(by_group)


@fewer_classes
def test_collections_that_log_under_the_same_names():
    f1, recall = macro("F1Score"), macro("Recall")
    monitors = [
        GroupMonitor("place", 3),
        GroupMonitor("place", 3, metric=torchmetrics.MetricCollection({"f": f1, "recall": recall})),
        GroupMonitor("place", 3, metric=torchmetrics.MetricCollection({"f": f1}, prefix="a_")),
        GroupMonitor("place", 3, metric=torchmetrics.MetricCollection({"f": f1}), name="b"),
    ]
    trainer = L.Trainer(callbacks=monitors, enable_checkpointing=False, **QUIET)
    trainer.validate(WithLoss(), loader(), verbose=False)
    assert {"val/accuracy", "val/f", "val/recall", "val/a_f", "val/b/f"} <= trainer.callback_metrics.keys()
    for other in ({"recall": recall}, {"accuracy": macro("Accuracy")}):
        again = GroupMonitor("place", 3, metric=torchmetrics.MetricCollection(other))
        trainer = L.Trainer(callbacks=[*monitors, again], enable_checkpointing=False, **QUIET)
        with pytest.raises(DebiasError, match=rf"would both log `val/{next(iter(other))}`"):
            trainer.validate(WithLoss(), loader(), verbose=False)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (torchmetrics.MetricCollection([]), "`metric` to hold at least one metric, but got an empty MetricCollection"),
        ([macro("F1Score")], r"Metric or MetricCollection, but got list.*`torchmetrics.MetricCollection\(metrics\)`"),
        ({"f": macro("F1Score")}, "Metric or MetricCollection, but got dict"),
        (torchmetrics.MetricCollection({"table": macro("ConfusionMatrix")}), "metric `table` to say.* is None. Set it"),
        (torchmetrics.MetricCollection({"each": macro("Recall", average=None)}, prefix="a_"), "`a_each` to compute"),
        (torchmetrics.retrieval.RetrievalMAP(), r"`retrieval_map` to be updated with `\(preds, target\)`.*indexes"),
    ],
)  # fmt: skip
def test_metrics_that_cannot_be_split_are_refused_at_once(metric, message):
    with pytest.raises(DebiasError, match=message):
        GroupMonitor("place", 3, metric=metric)


class Classes(Base):
    """Logits of two classes or more, all of them in [0, 1] if small."""

    def __init__(self, n=2, small=False, smoothed=False):
        super().__init__()
        self.net, self.smoothed = nn.Linear(4, n), smoothed
        if small:
            with torch.no_grad():
                self.net.weight /= 20
                self.net.bias.copy_(torch.linspace(0.45, 0.55, n))

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        F.cross_entropy(self.net(x), F.one_hot(y, self.net.out_features) * 0.8 + 0.1 if self.smoothed else y)

    def probabilities(self):
        with torch.no_grad():
            return self.net(X).softmax(1)


def agrees(logged, metric, scores, target):
    """That the metric by group is the one of the group's scores; of classes, the mean over those that the group has."""
    metric = copy.deepcopy(metric)
    by_class = getattr(metric, "average", None) == "macro" and target.ndim == 1
    metric.average = None if by_class else getattr(metric, "average", None)
    groups = []
    for k in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a group without a class
            value = metric(scores[k == PLACE], target[k == PLACE])
        groups.append(value[target[k == PLACE].unique()].mean().item() if by_class else value.item())
    (name,) = (k.removesuffix("_by_group/0") for k in logged if k.endswith("_by_group/0"))
    assert logged[name] == pytest.approx(metric(scores, target).mean().item(), abs=1e-6)
    assert [logged[f"{name}_by_group/{k}"] for k in range(3)] == pytest.approx(groups, abs=1e-6)


Y2 = (Y > 0).long()
BINARY = {
    "accuracy": torchmetrics.Accuracy(task="binary"),
    "another threshold": torchmetrics.classification.BinaryAccuracy(threshold=0.7),
    "auroc": torchmetrics.classification.BinaryAUROC(),
    "binned": torchmetrics.classification.BinaryAUROC(thresholds=20),
    "calibration": torchmetrics.classification.BinaryCalibrationError(),
}


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("metric", BINARY)
def test_a_binary_metric_of_two_logits_under_a_softmax_gets_the_probability_of_class_1(metric, smoothed, small):
    module, metric = Classes(2, small, smoothed), BINARY[metric]
    logged = validate(module, GroupMonitor("place", 3, metric=metric), loader(y=Y2))
    agrees(logged, metric, module.probabilities()[:, 1], Y2)


def test_a_binary_metric_of_pixels_with_two_logits():
    y = torch.stack([Y2, 1 - Y2], 1)

    class Pixels(Classes):
        def validation_step(self, batch, batch_idx):
            F.cross_entropy(torch.stack([self.net(batch[0]), self.net(-batch[0])], 2), batch[1])

    module, metric = Pixels(2), torchmetrics.classification.BinaryAUROC()
    logged = validate(module, GroupMonitor("place", 3, metric=metric), loader(y=y))
    with torch.no_grad():
        scores = torch.stack([module.net(sign * X).softmax(1)[:, 1] for sign in (1, -1)], 1)
    agrees(logged, metric, scores, y)


@pytest.mark.parametrize("options", [{}, {"logits": "net"}])
def test_two_logits_of_a_binary_metric_where_no_loss_says_what_they_are(options):
    class NoLoss(Classes):
        def validation_step(self, batch, batch_idx):
            return self(batch[0])

    module, metric = NoLoss(), torchmetrics.classification.BinaryAUROC()
    message = (
        r"`binary_auroc` \(BinaryAUROC\) got logits \(8, 2\) of torch.float32 and a target \(8,\) of torch.int64, and"
        r" says.*`Accuracy\(task='multiclass', num_classes=2\)`.*`z\[:, 1\] - z\[:, 0\]`"
    )
    with pytest.raises(DebiasError, match=message):
        validate(module, GroupMonitor("place", 3, metric=metric, target=1, **options), loader(y=Y2))
    margin = GroupMonitor("place", 3, metric=metric, target=1, logits=lambda z: z[:, 1] - z[:, 0])
    agrees(validate(module, margin, loader(y=Y2)), metric, module.probabilities()[:, 1], Y2)


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("kind", ["AUROC", "CalibrationError", "Accuracy"])
def test_logits_between_0_and_1_are_no_probabilities(kind, smoothed):
    module, metric = Classes(3, small=True, smoothed=smoothed), macro(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups without a class
        logged = validate(module, GroupMonitor("place", 3, metric=metric))
        assert bool(((module.net(X) > 0) & (module.net(X) < 1)).all())
        agrees(logged, metric, module.probabilities(), Y)


def test_no_class_rounds_to_the_probability_0():
    class Spread(Classes):
        def validation_step(self, batch, batch_idx):
            F.cross_entropy(self.net(batch[0]).sign() * 300 + self.net(batch[0]), batch[1])

    module, metric = Spread(3), torchmetrics.classification.MulticlassAccuracy(3, top_k=2, average="micro")
    with torch.no_grad():
        top = (module.net(X).sign() * 300 + module.net(X)).topk(2).indices
    logged = validate(module, GroupMonitor("place", 3, metric=metric))
    assert logged["val/multiclass_accuracy"] == pytest.approx(float((top == Y[:, None]).any(1).float().mean()))


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float_targets_of_a_binary_loss_are_labels(logits, dtype):
    """Hard, smoothed or missing; the logits, in [0, 1], are logits."""
    y = (torch.rand(23, 3, generator=torch.Generator().manual_seed(0)) > 0.5).float() * 0.8 + 0.1
    y[3, 1] = -1
    y[6] = torch.tensor([1, 1, torch.nan])

    class Labels(Classes):
        def validation_step(self, batch, batch_idx):
            z = self.net(batch[0]).to(dtype)
            if logits:
                F.binary_cross_entropy_with_logits(z, batch[1].to(dtype))
            else:
                F.binary_cross_entropy(z.float().sigmoid(), batch[1].clamp(min=0).nan_to_num(0))

    module = Labels(3, small=logits)
    options = {"ignore_index": -1} if logits else {}
    with torch.no_grad():
        scores = module.net(X).to(dtype).float().sigmoid()
    target = (y > 0.5).long()
    if logits:
        target[3, 1] = target[6, 2] = -1
    for kind in ("Accuracy", "AUROC", "CoverageError"):
        metric = getattr(torchmetrics.classification, f"Multilabel{kind}")(3, **options)
        agrees(validate(module, GroupMonitor("place", 3, metric=metric), loader(y=y)), metric, scores, target)


def test_one_binary_logit_with_float_targets():
    class One(Classes):
        def validation_step(self, batch, batch_idx):
            F.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1][:, None].float())

    module = One(1, small=True)
    with torch.no_grad():
        scores = module.net(X).sigmoid()
    for metric in BINARY.values():
        agrees(validate(module, GroupMonitor("place", 3, metric=metric), loader(y=Y2)), metric, scores, Y2[:, None])


REFUSED = {
    "regression": (torchmetrics.MeanSquaredError(), r"`mean_squared_error`.*\(8, 3\).*one of `torchmetrics.classif"),
    "binary, 3 classes": (
        BINARY["auroc"],
        r"`binary_auroc` \(BinaryAUROC\) got logits \(8, 3\).*binary metric takes one",
    ),
    "binary, binned": (
        BINARY["binned"],
        r"`binary_auroc`.*\(8, 3\) of torch.float32.*from `cross_entropy`.*binary metric",
    ),
    "classes": (
        torchmetrics.AUROC("multiclass", num_classes=5),
        r"MulticlassAUROC.*\(8, 3\).*each of its `num_classes`",
    ),
    "a class": (torchmetrics.Accuracy("multiclass", num_classes=4), r"MulticlassAccuracy.*\(8, 3\).* `num_classes`"),
    "labels": (
        torchmetrics.classification.MultilabelAUROC(2),
        r"MultilabelAUROC.*\(8, 3\).*for each of its `num_labels`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_metric_that_does_not_take_the_logits_is_named(case):
    metric, message = REFUSED[case]
    collection = torchmetrics.MetricCollection([metric], prefix="a_")
    with pytest.raises(DebiasError, match=message):
        validate(Classes(3), GroupMonitor("place", 3, metric=metric))
    with pytest.raises(DebiasError, match=rf"but `a_{type(metric).__name__}` \({type(metric).__name__}\) got"):
        validate(Classes(3), GroupMonitor("place", 3, metric=collection))


def test_other_targets_and_logits_that_a_metric_does_not_take():
    class Labels(Classes):
        def validation_step(self, batch, batch_idx):
            F.binary_cross_entropy_with_logits(self.net(batch[0]), F.one_hot(batch[1], 3).float())

    class Ignoring(Classes):
        def validation_step(self, batch, batch_idx):
            F.cross_entropy(self.net(batch[0]), batch[1].where(batch[1] > 0, -100))

    class One(Classes):
        def validation_step(self, batch, batch_idx):
            F.binary_cross_entropy_with_logits(self.net(batch[0])[:, 0], batch[1].clamp(max=1).float())

    labels = torchmetrics.classification.MultilabelAUROC
    logged = validate(Ignoring(3), GroupMonitor("place", 3, metric=macro("Accuracy", average="micro")))
    with pytest.warns(UserWarning, match=r"is averaged over the classes.*lacks 0"):
        validate(Ignoring(3), GroupMonitor("place", 3, metric=macro("Accuracy")))
    module = Ignoring(3)
    right = (module.net(X).argmax(1) == Y)[Y > 0].double()
    assert logged["val/multiclass_accuracy"] == pytest.approx(float(right.mean()))
    assert logged["val/multiclass_accuracy_count/1"] == int(((PLACE == 1) & (Y > 0)).sum())
    with pytest.raises(DebiasError, match=r"MultilabelAUROC\) got logits \(8, 3\) .* 3 and .*5\. A multilabel metric"):
        validate(Labels(3), GroupMonitor("place", 3, metric=labels(5)))
    with pytest.raises(DebiasError, match=r"MulticlassAUROC.*logits \(8,\).*choose its binary form"):
        validate(One(3), GroupMonitor("place", 3, metric=macro("AUROC")))


class OutOfMemory(torchmetrics.MeanSquaredError):
    def update(self, preds, target):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_that_memory_has_run_out_is_left_to_lightning():
    with pytest.raises(torch.cuda.OutOfMemoryError, match="memory"):
        validate(WithLoss(), GroupMonitor("place", 3, metric=OutOfMemory()))


def test_a_metric_that_has_no_value_for_a_group():
    class Regression(Base):
        def validation_step(self, batch, batch_idx):
            F.mse_loss(self.net(batch[0])[:, 0], batch[1].float())

    places = torch.arange(23).clamp(max=1)  # one sample is alone
    monitor = GroupMonitor("place", 2, metric=torchmetrics.R2Score(), group_names=["a", "b"])
    with pytest.warns(
        UserWarning, match=r"`r2_score` is undefined, and NaN, for group `a` \(1 sample\): its targets are"
    ):
        logged = validate(Regression(), monitor, loader(places))
    assert math.isnan(logged["val/r2_score_by_group/a"])
    assert logged["val/worst_group_r2_score"] == logged["val/r2_score_by_group/b"]
    assert [logged[f"val/r2_score_count/{name}"] for name in "ab"] == [1, 22]


@pytest.mark.parametrize("logits", ["net", lambda output: output["scores"]])
def test_logits_where_the_step_has_neither_loss_nor_forward(logits):
    module = NeitherLossNorForward()
    logged = validate(module, GroupMonitor("place", 3, logits=logits, target=1))
    assert logged["val/accuracy"] == pytest.approx(by_hand(module)[0])
    assert not module.net._forward_hooks


def test_nothing_to_read_logits_from():
    with pytest.raises(LossNotFoundError, match=r"logits='dotted.path'"):
        validate(NeitherLossNorForward(), GroupMonitor("place", 3))


def test_binary_and_multi_label_outputs():
    y = (torch.rand(23, 3, generator=g) > 0.5).float()

    class MultiLabel(Base):
        def validation_step(self, batch, batch_idx):
            F.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1])

    class Probabilities(Base):
        def validation_step(self, batch, batch_idx):
            F.binary_cross_entropy(self.net(batch[0]).sigmoid(), batch[1])

    for cls, threshold in ((MultiLabel, 0.0), (Probabilities, 0.0), (MultiLabel, 0.2), (Probabilities, 0.2)):
        module = cls()
        logged = validate(module, GroupMonitor("place", 3, threshold=threshold), loader(y=y))
        with torch.no_grad():
            correct = ((module.net(X) > threshold) == y.bool()).double().mean(1)
        assert logged["val/accuracy"] == pytest.approx(float(correct.mean()))
        assert logged["val/accuracy_by_group/2"] == pytest.approx(float(correct[PLACE == 2].mean()))


def test_regression_needs_a_metric():
    class Regression(Base):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            F.mse_loss(self.net(x)[:, 0], y.float())

    with pytest.raises(DebiasError, match=r"classification loss.*`mse_loss`.*metric="):
        validate(Regression(), GroupMonitor("place", 3))
    logged = validate(Regression(), GroupMonitor("place", 3, metric=torchmetrics.MeanAbsoluteError()))
    module = Regression()
    with torch.no_grad():
        error = (module.net(X)[:, 0] - Y).abs()
    worst = max(float(error[k == PLACE].mean()) for k in range(3))
    (name,) = (k for k in logged if "worst" in k)
    assert logged[name] == pytest.approx(worst, rel=1e-5)


def test_two_losses_in_validation():
    class Two(Base):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            out = self.net(x)
            F.mse_loss(out, out + 1)
            F.cross_entropy(out, y)

    with pytest.raises(
        AmbiguousLossError, match=r"evaluation step to compute one loss for GroupMonitor, but got 2: mse"
    ):
        validate(Two(), GroupMonitor("place", 3))
    with pytest.raises(AmbiguousLossError, match=r"of which `loss=.*` chooses 2"):
        validate(Two(), GroupMonitor("place", 3, loss=lambda call: True))
    module = Two()
    assert validate(module, GroupMonitor("place", 3, loss=1))["val/accuracy"] == pytest.approx(by_hand(module)[0])


def order_of(x):
    return x[:, 0].argsort()


class SortedLoss(Base):
    def validation_step(self, batch, batch_idx):
        o = order_of(batch[0])
        F.cross_entropy(self.net(batch[0][o]), batch[1][o])


class SortedForward(Base):
    def validation_step(self, batch, batch_idx):
        self(batch[0][order_of(batch[0])])


class SortedTwice(Base):
    def validation_step(self, batch, batch_idx):
        o = order_of(batch[0])
        F.cross_entropy(self.net(batch[0][o].T.contiguous().T), batch[1].index_select(0, o))


class SortedAfter(Base):
    def validation_step(self, batch, batch_idx):
        o = order_of(batch[0])
        F.cross_entropy(self.net(batch[0])[o], batch[1][o])


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (SortedLoss, {}),
        (SortedLoss, {"target": 1}),
        (SortedLoss, {"logits": "net"}),
        (SortedForward, {}),
        (SortedTwice, {}),
        (SortedAfter, {}),
    ],
)
def test_a_step_that_puts_samples_in_another_order(module, options):
    module = module()
    logged = validate(module, GroupMonitor("place", 3, **options))
    average, groups = by_hand(module)
    assert logged["val/accuracy"] == pytest.approx(average)
    assert [logged[f"val/accuracy_by_group/{k}"] for k in range(3)] == pytest.approx(groups)


def test_another_order_that_cannot_be_followed():
    class Unknown(Base):
        def validation_step(self, batch, batch_idx):
            o = order_of(batch[0])
            F.cross_entropy(self.net(batch[0][o]), torch.tensor(batch[1][o].tolist()))

    class Axes(Base):
        def validation_step(self, batch, batch_idx):
            x = batch[0].T.contiguous().T
            F.cross_entropy(self.net(x), torch.tensor(batch[1].tolist()))

    with pytest.raises(RowsError, match="in the order of the batch for GroupMonitor, but it puts them in another"):
        validate(Unknown(), GroupMonitor("place", 3))
    module = Axes()
    assert validate(module, GroupMonitor("place", 3))["val/accuracy"] == pytest.approx(by_hand(module)[0])


def test_averages_over_several_passes():
    class Averaged(Base):
        def validation_step(self, batch, batch_idx):
            return {"logits": self(batch[0]) + self(batch[0].flip(1))}

    match = r"call the module's `forward` once for GroupMonitor, but it did 2 times.*`logits=callable"
    with pytest.raises(AmbiguousLossError, match=match):
        validate(Averaged(), GroupMonitor("place", 3))
    with pytest.raises(AmbiguousLossError, match=r"call `net` once for GroupMonitor, but it did 2 times"):
        validate(Averaged(), GroupMonitor("place", 3, logits="net"))
    module = Averaged()
    with torch.no_grad():
        correct = ((module(X) + module(X.flip(1))).argmax(1) == Y).double()
    logged = validate(module, GroupMonitor("place", 3, logits=lambda output: output["logits"]))
    assert logged["val/accuracy"] == pytest.approx(float(correct.mean()))


def test_missing_key_and_wrong_rows():
    with pytest.raises(BatchKeyError, match=r"`group='site'`.*tag\(dataset, site=ids\)"):
        validate(WithLoss(), GroupMonitor("site", 3))

    class Strangers(Base):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            x, y = (torch.tensor(2 * values.tolist()) for values in (x, y))
            F.cross_entropy(self.net(x), y)

    class Shorter(Base):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            F.cross_entropy(self.net(torch.tensor(x.tolist()[1:])), torch.tensor(y.tolist()[1:]))

    for module, rows in ((Strangers(), 16), (Shorter(), 7)):
        with pytest.raises(
            RowsError, match=rf"GroupMonitor reads to be those of the 8 samples.*shape \({rows}, 3\)"
        ) as error:
            validate(module, GroupMonitor("place", 3))
        assert "training" not in str(error.value)
        assert "rows=" not in str(error.value)


def test_an_id_out_of_range():
    with pytest.raises(DebiasError, match="n_groups"):
        validate(WithLoss(), GroupMonitor("place", 2))


def test_wrong_arguments():
    with pytest.raises(DebiasError, match="`n_groups` to be a positive integer"):
        GroupMonitor("place", 0)
    with pytest.raises(DebiasError, match="`group_names`"):
        GroupMonitor("place", 2, group_names=["a"])


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_both_trainers(package):
    pl = pytest.importorskip(package)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(4, 3)

        def validation_step(self, batch, batch_idx):
            F.cross_entropy(self.net(batch[0]), batch[1])

    module = Module()
    trainer = pl.Trainer(callbacks=[GroupMonitor("place", 3)], enable_checkpointing=False, **QUIET)
    trainer.validate(module, loader(), verbose=False)
    assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(by_hand(module)[0])


class Named(Base):
    """Networks that return several things by name, as a dictionary or as attributes."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, x):
        made = {"hidden": x, "logits": self.net(x)}
        return made if self.kind is dict else SimpleNamespace(**made)

    def validation_step(self, batch, batch_idx):
        self(batch[0])


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
def test_logits_of_a_network_that_returns_several_things(kind):
    module = Named(kind)
    assert validate(module, GroupMonitor("place", 3))["val/accuracy"] == pytest.approx(by_hand(module)[0])


def test_messages_name_what_was_given_and_where():
    module = NeitherLossNorForward()
    module.net = nn.Sequential(module.net, Tupled())
    with pytest.raises(LossNotFoundError, match=r"output of `logits='net'` to be a tensor.*in validation_step"):
        validate(module, GroupMonitor("place", 3, logits="net"))
    with pytest.raises(
        LossNotFoundError, match="`logits=` of GroupMonitor to return a tensor from what validation_step"
    ):
        validate(WithLoss(), GroupMonitor("place", 3, logits=lambda output: None))
    with pytest.raises(LossNotFoundError, match="Expected validation_step to compute a torch loss"):
        validate(NeitherLossNorForward(), GroupMonitor("place", 3))


class Tupled(nn.Module):
    def forward(self, x):
        return (x,)


def test_two_metrics_by_the_same_groups():
    accuracy, auroc = (
        GroupMonitor("place", 3),
        GroupMonitor("place", 3, metric=torchmetrics.AUROC("multiclass", num_classes=3)),
    )
    trainer = L.Trainer(callbacks=[accuracy, auroc], enable_checkpointing=False, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # groups without a class
        trainer.validate(WithLoss(), loader(), verbose=False)
    assert {
        "val/accuracy",
        "val/multiclass_auroc",
        "val/worst_group_multiclass_auroc",
    } <= trainer.callback_metrics.keys()
    with pytest.raises(DebiasError, match="would both log `val/accuracy`"):
        L.Trainer(callbacks=[accuracy, GroupMonitor("other", 2)], enable_checkpointing=False, **QUIET).validate(
            WithLoss(), loader(), verbose=False
        )


class Elements(Base):
    """Binary cross-entropy on one target of each class, one-hot or smoothed."""

    def __init__(self, positive=1.0, several=False):
        super().__init__()
        self.positive, self.several = positive, several

    def validation_step(self, batch, batch_idx):
        x, y = batch
        target = F.one_hot(y, 3).float()
        if self.several:
            target[0] = 1
        target = target * self.positive + (1 - target) * (1 - self.positive)
        self.log("loss", F.binary_cross_entropy_with_logits(self.net(x), target))


@pytest.mark.parametrize("positive", [1.0, 0.95])
def test_classes_that_exclude_each_other_under_a_binary_loss(positive):
    """Each element is scored, smoothed or not; that it is hardly what is meant is said."""
    module = Elements(positive)
    with pytest.warns(UserWarning, match=r"always says no is right in 66.7%.*pass `target=`"):
        elements = validate(module, GroupMonitor("place", 3))["val/accuracy"]
    right = (module.net(X) > 0) == F.one_hot(Y, 3).bool()
    assert elements == pytest.approx(float(right.double().mean()))
    assert validate(module, GroupMonitor("place", 3, target=1))["val/accuracy"] == pytest.approx(by_hand(module)[0])


def test_several_labels_of_a_sample_are_no_reason_to_warn():
    validate(Elements(several=True), GroupMonitor("place", 3))


@pytest.mark.parametrize("missing", [2, 255, -1])
def test_missing_labels_under_a_binary_loss_are_the_metrics_ignore_index(missing):
    """They are no positives, though above 0.5, where the metric is told of them."""

    class Missing(Base):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            logits = self.net(x)
            target = (logits > 0).double()  # all that counts is right
            target[y == 0, 1] = missing
            weight = (target != missing).double()
            self.log(
                "loss", F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), weight.to(logits.dtype))
            )

    metric = torchmetrics.classification.MultilabelAccuracy(num_labels=3, ignore_index=missing, average="micro")
    module = Missing()
    with torch.no_grad():
        module.net.bias -= 5  # so that what is missing would be wrong
    assert validate(module, GroupMonitor("place", 3, metric=metric))["val/multilabel_accuracy"] == 1


@pytest.mark.parametrize("name", ["LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"])
def test_losses_of_timm(name):
    class Timm(Base):
        def __init__(self):
            super().__init__()
            self.loss = getattr(pytest.importorskip("timm.loss"), name)()

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.loss(self.net(x), F.one_hot(y, 3) * 0.7 + 0.1 if name.startswith("Soft") else y)

    module = Timm()
    assert validate(module, GroupMonitor("place", 3))["val/accuracy"] == pytest.approx(by_hand(module)[0])
