"""What monitors score: what the loss counts, as the network predicted it, row by row; by hand in every case."""

import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

from debias import DetectionMonitor, GroupDRO, GroupMonitor, MultilabelF1Monitor, tag
from debias.errors import AmbiguousLossError, BatchKeyError, DebiasError, HeadNotFoundError, RowsError
from debias.metrics import GroupAccuracy

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
g = torch.Generator().manual_seed(0)
N, K, T = 22, 3, 4
X, WEIGHT = torch.randn(N, 5, generator=g), torch.randn(K, 5, generator=g)
Y = (X[:, :K] + 0.7 * torch.randn(N, K, generator=g) > 0).float()
Y[torch.rand(N, K, generator=g) < 0.4] = torch.nan
GROUPS = torch.arange(N) % 3


class Module(L.LightningModule):
    """A linear network, and the evaluation step of a test."""

    def __init__(self, step, out=K, forward=False):
        super().__init__()
        self.net, self.step = nn.Linear(5, out, bias=False), step
        self.margin, self.accuracy = Margin(), torchmetrics.Accuracy("multiclass", num_classes=3)
        torch.manual_seed(0)
        nn.init.normal_(self.net.weight)

    def forward(self, x):
        return self.net(x)

    def validation_step(self, batch, batch_idx):
        return self.step(self, *batch)


class Margin(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(K, 5, generator=torch.Generator().manual_seed(1)))
        self.opaque = False

    def forward(self, x, target):
        if self.opaque:
            return torch.from_numpy(x.numpy() @ self.weight.detach().numpy().T) - 3 * F.one_hot(target, K)
        return F.linear(x, self.weight) - 3 * F.one_hot(target, K)


def validate(module, monitor, *tensors, tags=GROUPS):
    trainer = L.Trainer(callbacks=[monitor], enable_checkpointing=False, **QUIET)
    trainer.validate(module, DataLoader(tag(TensorDataset(*tensors), g=tags), 8), verbose=False)
    return {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items()}


def binary(**options):
    def losses(module, x, y):
        return F.binary_cross_entropy_with_logits(module(x), y.nan_to_num(), **options)

    return losses


STEPS = {
    "product": lambda m, x, y: (binary(reduction="none")(m, x, y) * ~y.isnan()).sum() / (~y.isnan()).sum(),
    "selection": lambda m, x, y: binary(reduction="none")(m, x, y)[~y.isnan()].mean(),
    "where": lambda m, x, y: torch.where(y.isnan(), 0.0, binary(reduction="none")(m, x, y)).sum(),
    "weight": lambda m, x, y: binary(weight=(~y.isnan()).float())(m, x, y),
    "nan": lambda m, x, y: F.binary_cross_entropy_with_logits(m(x), y, reduction="none").nanmean(),
}


@pytest.mark.parametrize("case", STEPS)
def test_labels_that_nobody_gave_are_not_scored(case):
    module, known = Module(STEPS[case]), ~Y.isnan()
    right = ((module(X) > 0) == (Y > 0.5)) & known
    shares = (right.sum(1) / known.sum(1)).double()
    found = validate(module, GroupMonitor("g", 3), X, Y)
    for k in range(3):
        rows = k == GROUPS
        assert found[f"accuracy_by_group/{k}"] == pytest.approx(float(shares[rows].nanmean()))
        assert found[f"accuracy_count/{k}"] == int(known.any(1)[rows].sum())
    metric = MultilabelAccuracy(K, average="micro")
    found = validate(module, GroupMonitor("g", 3, metric=metric), X, Y)
    assert found["multilabel_accuracy"] == pytest.approx(float(right.sum() / known.sum()))
    for k in range(3):
        share = right[k == GROUPS].sum() / known[k == GROUPS].sum()
        assert found[f"multilabel_accuracy_by_group/{k}"] == pytest.approx(float(share))
    assert metric.ignore_index is None


def test_f1_of_labels_that_the_loss_leaves_out():
    """The step fills in what nobody gave, and the batch holds what it has filled in."""

    def step(module, x, y):
        return STEPS["product"](module, x, torch.where(y < 0, torch.nan, y))

    def filled(module, x, y):
        losses = binary(reduction="none")(module, x, y)
        return (losses * (x[:, :1] > 0)).mean()

    module, names = Module(step), ["a", "b", "c"]
    labels = Y.nan_to_num(-1)
    missing = torch.where(X[:, :1] > 0, Y.nan_to_num(), -1)
    expected = validate(module, MultilabelF1Monitor(names), X, missing)
    found = validate(Module(filled), MultilabelF1Monitor(names), X, Y.nan_to_num())
    assert found["f1"] == pytest.approx(expected["f1"])
    assert validate(module, MultilabelF1Monitor(names), X, labels)["f1"] != pytest.approx(expected["f1"])


def masked(module, x, y):
    return (F.mse_loss(module(x), y.nan_to_num(), reduction="none") * ~y.isnan()).sum() / (~y.isnan()).sum()


def no_loss(module, x, y):
    return module(x)


@pytest.mark.parametrize("step", [masked, no_loss])
def test_missing_numbers(step):
    module = Module(step)
    error = (module(X) - Y).abs().detach()
    found = validate(module, GroupMonitor("g", 3, metric=torchmetrics.MeanAbsoluteError()), X, Y)
    assert found["mean_absolute_error"] == pytest.approx(float(error.nanmean()))
    for k in range(3):
        assert found[f"mean_absolute_error_by_group/{k}"] == pytest.approx(float(error[k == GROUPS].nanmean()))
    with pytest.raises(DebiasError, match=r"whole samples to be left out for R2Score.*leaves out some columns"):
        validate(module, GroupMonitor("g", 3, metric=torchmetrics.R2Score()), X, Y)
    rows = torch.where(Y[:, :1].isnan(), torch.nan, Y.nan_to_num())  # all columns of a sample, or none
    found = validate(module, GroupMonitor("g", 3, metric=torchmetrics.R2Score()), X, rows)
    kept = ~rows[:, 0].isnan()
    expected = torchmetrics.R2Score()(module(X).detach()[kept], rows[kept])
    assert found["r2_score"] == pytest.approx(float(expected))


# ---------------------------------------------------------------------------------------------------- criteria

CLASSES = torch.randint(0, K, (N,), generator=g)
PRIOR = torch.tensor([0.0, 3.0, -3.0])


def right_by_hand(logits, target=CLASSES):
    return (logits.argmax(1) == target).double()


CRITERIA = {
    "adjusted": lambda m, x, y: F.cross_entropy(m(x) + PRIOR, y),
    "submodule": lambda m, x, y: F.cross_entropy(m.net(x) + PRIOR, y),
    "margin": lambda m, x, y: F.cross_entropy(8 * (m(x) - 3 * F.one_hot(y, K)), y),
    "log_softmax": lambda m, x, y: F.nll_loss(F.log_softmax(m(x) + PRIOR, dim=1), y),
}


@pytest.mark.parametrize("case", CRITERIA)
def test_logits_that_the_criterion_has_changed_are_no_predictions(case):
    module = Module(CRITERIA[case])
    right = right_by_hand(module(X))
    assert float(right.mean()) != float(right_by_hand(module(X) + PRIOR).mean())
    found = validate(module, GroupMonitor("g", 3), X, CLASSES)
    assert found["accuracy"] == pytest.approx(float(right.mean()))
    metric = MulticlassAccuracy(K, average="micro")
    found = validate(module, GroupMonitor("g", 3, metric=metric), X, CLASSES)
    assert found["multiclass_accuracy_by_group/1"] == pytest.approx(float(right[GROUPS == 1].mean()))


@pytest.mark.parametrize("how", ["__call__", "forward"])
def test_the_last_term_of_forward_is_part_of_the_network(how):
    class Shifted(Module):
        def forward(self, x):
            return self.net(x) + PRIOR

    module = Shifted(lambda m, x, y: F.cross_entropy(getattr(m, how)(x), y))
    expected = right_by_hand(module(X)).mean()
    assert float(expected) != float(right_by_hand(module.net(X)).mean())
    assert validate(module, GroupMonitor("g", 3), X, CLASSES)["accuracy"] == pytest.approx(float(expected))
    assert "forward" not in vars(module)


def test_logits_of_a_layer_that_is_given_the_labels_are_refused():
    def step(module, x, y):
        logits = module.margin(x, y)
        F.cross_entropy(logits, y)
        return F.linear(x, module.margin.weight)

    module = Module(step)
    right = float(right_by_hand(X @ module.margin.weight.T).mean())
    assert validate(module, GroupMonitor("g", 3), X, CLASSES)["accuracy"] == pytest.approx(right)
    module.margin.opaque = True
    with pytest.raises(DebiasError, match=r"predictions for GroupMonitor, but the submodule.*is given the target"):
        validate(module, GroupMonitor("g", 3), X, CLASSES)
    found = validate(module, GroupMonitor("g", 3, logits=lambda output: output, target=1), X, CLASSES)
    assert found["accuracy"] == pytest.approx(right)


# ---------------------------------------------------------------------------------------------------- rows

TOKENS = torch.randn(N, T, 5, generator=g)
LABELS = torch.randint(0, K, (N, T), generator=g)
LABELS[torch.rand(N, T, generator=g) < 0.3] = -100
LABELS[3] = -100  # a sample without any


def dense(module, x, y):
    return F.cross_entropy(module(x).transpose(1, 2), y)


FLAT = {
    "flattened": lambda m, x, y: F.cross_entropy(m(x).view(-1, K), y.view(-1)),
    "selected": lambda m, x, y: F.cross_entropy(m(x)[y >= 0], y[y >= 0]),
    "masked": lambda m, x, y: (
        F.cross_entropy(m(x).flatten(0, 1), y.flatten().clamp(min=0), reduction="none") * (y.flatten() >= 0)
    ).sum(),
    "time first": lambda m, x, y: F.cross_entropy(m(x.transpose(0, 1)).reshape(-1, K), y.T.reshape(-1)),
}


@pytest.mark.parametrize("metric", [None, MulticlassAccuracy(K, average="micro")])
@pytest.mark.parametrize("case", FLAT)
def test_flattened_tokens_are_those_of_their_samples(case, metric):
    expected = validate(Module(dense), GroupMonitor("g", 3, metric=metric), TOKENS, LABELS)
    found = validate(Module(FLAT[case]), GroupMonitor("g", 3, metric=metric), TOKENS, LABELS)
    values = {k: v for k, v in expected.items() if "_count" not in k}
    assert {k: v for k, v in found.items() if k in values} == pytest.approx(values, rel=1e-5)
    right, known = Module(dense)(TOKENS).argmax(2) == LABELS, LABELS >= 0
    shares = (right.sum(1) / known.sum(1)).double()
    by_hand = shares[GROUPS == 1].nanmean() if metric is None else right[GROUPS == 1].sum() / known[GROUPS == 1].sum()
    name = "accuracy" if metric is None else "multiclass_accuracy"
    assert found[f"{name}_by_group/1"] == pytest.approx(float(by_hand))


def test_rows_of_a_sample_are_its_elements():
    generator = torch.Generator().manual_seed(0)
    preds, target = (torch.randint(0, 2, (6,), generator=generator) for _ in range(2))
    flat, dense = GroupAccuracy(2), GroupAccuracy(2)
    flat.update(preds, target, torch.tensor([1, 0]), rows=torch.tensor([0, 0, 0, 1, 1, 1]))
    dense.update(preds.view(2, 3), target.view(2, 3), torch.tensor([1, 0]))
    for name, value in dense.compute().items():
        torch.testing.assert_close(flat.compute()[name], value)


def causal(module, x, y):
    """The loss of a causal language model, as libraries of them write it."""
    logits = module(x)
    labels = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    F.cross_entropy(logits.view(-1, K), labels.view(-1), ignore_index=-100)


def causal_cut(module, x, y):
    logits = module(x)
    F.cross_entropy(logits[:, :-1].reshape(-1, K), y[:, 1:].reshape(-1))


@pytest.mark.parametrize("step", [causal, causal_cut])
@pytest.mark.parametrize("options", [{}, {"logits": "net", "target": 1}, {"target": 1}])
def test_labels_of_a_language_model_are_shifted_as_its_loss_shifts_them(step, options):
    module = Module(step)
    target = LABELS[:, 1:]
    shares = (module(TOKENS)[:, :-1].argmax(2) == target).sum(1) / (target >= 0).sum(1)
    found = validate(module, GroupMonitor("g", 3, **options), TOKENS, LABELS)
    assert found["accuracy"] == pytest.approx(float(shares.double().nanmean()))


@pytest.mark.parametrize(("missing", "options"), [(255, {"ignore_index": 255}), (-1, {})])
def test_dense_targets_without_a_loss(missing, options):
    class Dense(Module):
        def forward(self, x):
            return self.net(x).transpose(1, 2)

    labels = LABELS.where(LABELS >= 0, missing)
    for metric in (None, MulticlassAccuracy(K, average="micro")):
        monitor = GroupMonitor("g", 3, metric=metric, **options)
        expected = validate(Module(dense), GroupMonitor("g", 3, metric=metric), TOKENS, LABELS)
        found = validate(Dense(no_loss), monitor, TOKENS, labels)
        assert found == pytest.approx(expected, rel=1e-5)


def test_one_task_of_several_classes():
    class Tasks(Module):
        def forward(self, x):
            return self.net(x)[:, None]

    found = validate(Tasks(no_loss), GroupMonitor("g", 3), X, CLASSES[:, None])
    assert found["accuracy"] == pytest.approx(float(right_by_hand(Module(no_loss)(X)).mean()))


def test_class_ids_with_an_axis_of_classes():
    """As MONAI's labels are, in floats."""
    labels = CLASSES[:, None].float()
    with pytest.raises(DebiasError, match=r"\(8, 3\) for a target \(8, 1\).*`target.squeeze\(1\).long\(\)`.*`target=c"):
        validate(Module(no_loss), GroupMonitor("g", 3), X, labels)
    found = validate(Module(no_loss), GroupMonitor("g", 3, target=lambda b: b[1].squeeze(1).long()), X, labels)
    assert found["accuracy"] == pytest.approx(float(right_by_hand(Module(no_loss)(X)).mean()))


@pytest.mark.parametrize("options", [{}, {"logits": "net"}, {"logits": lambda output: output}])
def test_scores_of_which_no_loss_says_what_they_are(options):
    module, labels = Module(no_loss), Y.nan_to_num()
    with pytest.raises(DebiasError, match=r"`threshold`.*`threshold=0.0` for logits, `threshold=0.5` for probabil"):
        validate(module, GroupMonitor("g", 3, target=1, **options), X, labels)
    for threshold in (0.0, 0.5):
        found = validate(module, GroupMonitor("g", 3, target=1, threshold=threshold, **options), X, labels)
        assert found["accuracy"] == pytest.approx(float(((module(X) > threshold) == labels.bool()).double().mean()))


def test_a_loss_of_each_class():
    def step(module, x, y):
        for k, z in enumerate(module.net(x).unbind(1)):
            F.binary_cross_entropy_with_logits(z, (y == k).float())

    module = Module(step)
    with pytest.raises(AmbiguousLossError, match=r"of one prediction, as of each class, `logits=` and `target=`"):
        validate(module, GroupMonitor("g", 3), X, CLASSES)
    with pytest.raises(
        DebiasError, match=r"`target` to be 0 or 1.*pass logits of all classes, to a monitor by `logits=`"
    ):
        validate(module, GroupMonitor("g", 3, loss=0, target=1), X, CLASSES)
    found = validate(module, GroupMonitor("g", 3, logits="net", target=1), X, CLASSES)
    assert found["accuracy"] == pytest.approx(float(right_by_hand(module(X)).mean()))


def views(module, x, y):
    z = module.net(torch.tensor([*x.tolist(), *(-x).tolist()], dtype=x.dtype))
    F.cross_entropy(z, torch.arange(2).repeat_interleave(len(x)))
    return z.view(2, len(x), K).permute(1, 2, 0)


def test_views_that_cannot_be_followed():
    module = Module(views)
    with pytest.raises(RowsError, match=r"\(N, C, views\), and pass `logits=callable\(step_output\)` and `target=c"):
        validate(module, GroupMonitor("g", 3), X, CLASSES)
    monitor = GroupMonitor("g", 3, logits=lambda output: output, target=lambda b: torch.arange(2).expand(len(b[0]), 2))
    right = (module.step(module, X, None).argmax(1) == torch.arange(2)).double().mean(1)
    found = validate(module, monitor, X, CLASSES)
    assert [found[f"accuracy_by_group/{k}"] for k in range(3)] == pytest.approx(
        [float(right[k == GROUPS].mean()) for k in range(3)]
    )


def test_labels_in_another_order_by_a_view():
    """Of inference tensors no view knows what it is of."""

    def step(module, x, y):
        labels = y.clone()
        labels.view(-1).copy_(y[x[:, 0].argsort()])
        F.cross_entropy(module.net(x), labels)

    with pytest.raises(RowsError, match="GroupMonitor"):
        validate(Module(step), GroupMonitor("g", 3), X, CLASSES)


def test_members_that_the_step_averages():
    class Ensemble(Module):
        def forward(self, x):
            return torch.cat([self.net(x), 2 - self.net(x)])

    def step(module, x, y):
        return module(x).softmax(1).view(2, len(x), K).mean(0)

    module = Ensemble(step)
    rows = [float(right_by_hand(z, CLASSES).mean()) for z in module(X).view(2, N, K)]
    assert validate(module, GroupMonitor("g", 3), X, CLASSES)["accuracy"] == pytest.approx(sum(rows) / 2)
    found = validate(module, GroupMonitor("g", 3, logits=lambda output: output, target=1), X, CLASSES)
    assert found["accuracy"] == pytest.approx(float(right_by_hand(step(module, X, None)).mean()))


class Subsample(torchmetrics.MeanMetric):
    def update(self, logits, target):
        super().update(F.cross_entropy(logits[:3], target[:3]))


@pytest.mark.parametrize("how", ["__call__", "update"])
@pytest.mark.parametrize("loss", [True, False])
def test_losses_of_a_metric_are_none_of_the_steps(how, loss):
    def step(module, x, y):
        logits = module(x)
        getattr(module.accuracy, how)(logits, y)
        if loss:
            F.cross_entropy(logits, y)

    module = Module(step)
    module.accuracy = Subsample()
    before = dict(vars(module.accuracy))
    found = validate(module, GroupMonitor("g", 3), X, CLASSES)
    assert found["accuracy"] == pytest.approx(float(right_by_hand(module(X)).mean()))
    assert all(vars(module.accuracy)[name] is before[name] for name in ("update", "compute"))


# ---------------------------------------------------------------------------------------------------- groups


def plain(module, x, y):
    F.cross_entropy(module(x), y)


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.uint8])
def test_memberships_of_zeros_and_ones(dtype):
    members = torch.rand(N, 2, generator=torch.Generator().manual_seed(1)) > 0.4
    found = validate(Module(plain), GroupMonitor("g", 2), X, CLASSES, tags=members.to(dtype))
    right = right_by_hand(Module(plain)(X))
    for k in range(2):
        assert found[f"accuracy_by_group/{k}"] == pytest.approx(float(right[members[:, k]].mean()))


def test_memberships_that_are_none():
    members = torch.arange(2 * N).view(N, 2) % 3
    with pytest.raises(BatchKeyError, match=r"shape \(8, 2\) of torch.int64.*`membership.bool\(\)`"):
        validate(Module(plain), GroupMonitor("g", 2), X, CLASSES, tags=members)


def test_a_membership_of_integers_is_said_to_need_booleans_in_training():
    class Trained(Module):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

        validation_step = None

    members = (torch.arange(N)[:, None] + torch.arange(2)) % 2
    for tags, works in ((members, False), (members.bool(), True)):
        trainer = L.Trainer(max_epochs=1, callbacks=[GroupDRO("g", 2)], enable_checkpointing=False, **QUIET)
        run = trainer.fit, (Trained(plain), DataLoader(tag(TensorDataset(X, CLASSES), g=tags), 8))
        if works:
            run[0](*run[1])
            continue
        with pytest.raises(BatchKeyError, match=r"`membership.bool\(\)`"):
            run[0](*run[1])


def test_crossed_keys_from_omegaconf():
    config = OmegaConf.create({"key": ["g", "h"], "n": [3, 2], "names": list("abcdef")})
    data = tag(TensorDataset(X, CLASSES), g=GROUPS, h=torch.arange(N) // 11)
    results = []
    for key, n, names in ((config.key, config.n, config.names), (("g", "h"), (3, 2), list("abcdef"))):
        monitor = GroupMonitor(key, n, group_names=names)
        assert monitor.state_key == "GroupMonitor(g_h)"
        trainer = L.Trainer(callbacks=[monitor], enable_checkpointing=False, **QUIET)
        trainer.validate(Module(plain), DataLoader(data, 8), verbose=False)
        results.append({k: float(v) for k, v in trainer.callback_metrics.items()})
    assert results[0] == results[1]
    assert "val/accuracy_by_group/f" in results[0]
    assert GroupDRO(config.key, config.n).state_key == GroupDRO(("g", "h"), (3, 2)).state_key
    pytest.importorskip("pycocotools")
    assert DetectionMonitor(config.key, config.n).total == 6


# ---------------------------------------------------------------------------------------------------- messages


def test_lists_of_modules_leave_metrics_out():
    with pytest.raises(HeadNotFoundError, match=r"There are: net, margin\.$"):
        validate(Module(plain), GroupMonitor("g", 3, logits="nowhere"), X, CLASSES)


def test_the_metrics_of_an_epoch_start_afresh_and_say_the_same_once():
    groups = torch.where(torch.arange(N) == 0, 2, GROUPS % 2)

    class Trained(Module):
        def training_step(self, batch, batch_idx):
            return 0 * self(batch[0]).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    seen = []

    class Read(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    data = DataLoader(tag(TensorDataset(X, (CLASSES > 0).float()), g=groups), 8)
    monitor = GroupMonitor("g", 3, metric=torchmetrics.classification.BinaryAUROC())
    trainer = L.Trainer(
        max_epochs=3, num_sanity_val_steps=0, callbacks=[monitor, Read()], enable_checkpointing=False, **QUIET
    )
    step = lambda m, x, y: F.binary_cross_entropy_with_logits(m(x)[:, 0], y)  # noqa: E731
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(Trained(step), data, data)
    assert len([w for w in said if "`binary_auroc` is undefined" in str(w.message)]) == 1
    assert len(seen) == 3
    assert seen[0] == pytest.approx(seen[2], nan_ok=True)
