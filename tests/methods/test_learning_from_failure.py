"""Learning from Failure: the worked example, and generalised cross-entropy against autograd."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import BaseFinetuning

from _support.fits import Classifier, deviation, loader, make_trainer, parameters, problem, same, train, val_loader
from debias import LearningFromFailure
from debias.errors import DebiasError
from debias.functional import failure_weights, generalized_cross_entropy
from debias.methods.learning_from_failure import FailureTable

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


# -- the callback against the authors' algorithm in a loop -----------------------------------------


def spelled_out(epochs, *, q=0.7, rate=0.7, running=True, n=39, lr=0.1):
    """Two networks, their tables, and every weight by itself."""
    main, biased, data = Classifier(), Classifier(), problem(n)
    optimizers = [m.configure_optimizers() for m in (main, biased)]
    tables = {"main": {}, "biased": {}}
    labels = data[:][1].tolist()
    for _ in range(epochs):
        for start in range(0, n, 16):
            rows = list(range(start, min(start + 16, n)))
            x, y = data[rows]
            losses = {"main": F.cross_entropy(main(x), y, reduction="none")}
            losses["biased"] = F.cross_entropy(biased(x), y, reduction="none")
            for name, table in tables.items():
                for k, i in enumerate(rows):
                    new = losses[name][k].item()
                    table[i] = rate * table[i] + (1 - rate) * new if i in table else new
            weights = []
            for k, i in enumerate(rows):
                a, b = losses["biased"][k].item(), losses["main"][k].item()
                if running:
                    a, b = (
                        tables[name][i] / max(v for j, v in tables[name].items() if labels[j] == labels[i])
                        for name in ("biased", "main")
                    )
                weights.append(a / (a + b + 1e-8))
            p = biased(x).softmax(1).gather(1, y[:, None]).squeeze(1).detach()
            total = (torch.tensor(weights, dtype=torch.float64) * losses["main"]).mean() + (
                q * p**q * losses["biased"]
            ).mean()
            for optimizer in optimizers:
                optimizer.zero_grad()
            total.backward()
            for optimizer in optimizers:
                optimizer.step()
    return {"main": parameters(main), "biased": parameters(biased), "tables": tables}


@pytest.mark.parametrize("options", [{}, {"running": False}, {"q": 0.3, "rate": 0.9}])
def test_against_the_algorithm_in_a_loop(options):
    expected = spelled_out(3, **options)
    model, method = Classifier(), LearningFromFailure(**options)
    train(model, [method], max_epochs=3)
    assert deviation(expected["main"], parameters(model)) < 1e-12
    assert deviation(expected["biased"], parameters(method.owned["twin"].module)) < 1e-12
    if options.get("running", True):
        for name, table in expected["tables"].items():
            assert method.module[name].tolist() == pytest.approx([table[i] for i in range(39)], rel=1e-12)


def test_the_twin_leaves_no_trace_and_logs_nothing():
    class Logged(Classifier):
        def training_step(self, batch, batch_idx):
            assert self.trainer.current_epoch == 0
            self.count = getattr(self, "count", 0) + 1
            return super().training_step(batch, batch_idx)

    model, method = Logged(), LearningFromFailure()
    before = set(vars(model)) | {"count"}
    trainer = train(model, [method])
    assert model.count == 3
    assert {k for k in set(vars(model)) - before if not k.startswith("_")} == set()
    assert list(model.state_dict()) == list(Classifier().state_dict())
    assert all(p is not q for p, q in zip(model.parameters(), method.owned["twin"].module.parameters(), strict=True))
    assert "train/failure_weight" in trainer.callback_metrics
    assert "train/biased_loss" in trainer.callback_metrics


class Dropped(Classifier):
    def __init__(self, **options):
        super().__init__(**options)
        self.backbone.append(torch.nn.Dropout(0.5))


def test_the_twins_dropout_does_not_change_what_the_network_draws():
    """Two runs that differ in the twin alone: its seed; the network's own mask of the first step is the same."""
    seen = []

    class Look(Dropped):
        def forward(self, x):
            out = super().forward(x)
            seen.append(out.detach().clone())
            return out

    for seed in (0, 1):
        torch.manual_seed(5)
        train(Look(), [LearningFromFailure(seed=seed)], limit_train_batches=1, limit_val_batches=0)
    twin_a, main_a, twin_b, main_b = seen[:4]
    assert torch.equal(main_a, main_b)
    assert not torch.equal(twin_a, twin_b)


def test_scheduled_learning_rates_and_layers_with_their_own_reach_the_twin():
    class Scheduled(Classifier):
        def configure_optimizers(self):
            groups = [{"params": self.head.parameters(), "lr": 0.3}, {"params": self.backbone.parameters()}]
            optimizer = torch.optim.SGD(groups, lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    method = LearningFromFailure()
    train(Scheduled(), [method], max_epochs=3)
    assert [g["lr"] for g in method.owned["twin"].optimizer.param_groups] == pytest.approx([0.075, 0.025])


class Frozen(Classifier):
    """Its backbone is unfrozen by a callback."""

    def training_step(self, *args):
        return super().training_step(*args)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Waiting(Classifier):
    """Its backbone has no learning rate at first, which comes to the same."""

    def configure_optimizers(self):
        waiting = {"params": self.backbone.parameters(), "lr": 0.0}
        return torch.optim.SGD([{"params": self.head.parameters()}, waiting], 0.1)

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.optimizers().param_groups[1]["lr"] = 0.05


class Unfreeze(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


def test_layers_that_are_unfrozen_train_in_the_twin_too():
    models, methods = (Frozen(), Waiting()), (LearningFromFailure(), LearningFromFailure())
    train(models[0], [methods[0], Unfreeze()], max_epochs=3)
    train(models[1], methods[1:], max_epochs=3)
    assert deviation(parameters(models[0]), parameters(models[1])) < 1e-12
    assert deviation(*(parameters(method.owned["twin"].module) for method in methods)) < 1e-12


def test_bad_input():
    with pytest.raises(DebiasError, match="its number in the dataset for LearningFromFailure"):
        train(Classifier(), [LearningFromFailure()], bare=True)
    with pytest.raises(DebiasError, match="`loss` to choose one loss"):
        LearningFromFailure(loss="sum")
    with pytest.raises(DebiasError, match="`q`"):
        LearningFromFailure(q=0.0)

    class Two(Classifier):
        def configure_optimizers(self):
            return [torch.optim.SGD(m.parameters(), lr=0.1) for m in (self.head, self.backbone)]

    with pytest.raises((DebiasError, RuntimeError), match=r"one optimiser|multiple optimizers"):
        train(Two(), [LearningFromFailure()])
    method = LearningFromFailure()
    train(model := Classifier(), [method])
    with pytest.raises(DebiasError, match=r"keep its length, 39 samples.*but got 20"):
        make_trainer([method]).fit(model, loader(20, last=(4,)), val_loader())


@pytest.mark.parametrize("masked", [False, True])
def test_elements_that_the_step_reduces_are_those_of_the_loss(masked):
    """Several labels or pixels of each sample, in the order of the batch."""

    class Whole(Classifier):
        def training_step(self, batch, batch_idx):
            z, y = self(batch[0]), F.one_hot(batch[1], 2).double()
            mask = (batch[0][:, :1] > 0).double().expand_as(y)
            options = {"weight": mask, "reduction": "sum"} if masked else {}
            return F.binary_cross_entropy_with_logits(z, y, **options) / (mask.sum() if masked else 1)

    class Reduced(Classifier):
        def training_step(self, batch, batch_idx):
            z, y = self(batch[0]), F.one_hot(batch[1], 2).double()
            losses = F.binary_cross_entropy_with_logits(z, y, reduction="none")
            mask = (batch[0][:, :1] > 0).double().expand_as(y)
            return (losses * mask).sum() / mask.sum() if masked else losses.mean()

    models = Whole(), Reduced()
    for model in models:
        train(model, [LearningFromFailure()], max_epochs=2)
    assert deviation(*map(parameters, models)) < 1e-12


def test_maxima_that_are_kept_are_those_of_a_look_at_all_samples():
    """Also where the largest loss of a class falls, rises, or belongs to a sample that changes its class."""
    g = torch.Generator().manual_seed(0)
    kept, looked, scans = FailureTable(200), FailureTable(200), 0
    for step in range(60):
        numbers = torch.randperm(200, generator=g)[:8]
        losses = [3 * torch.rand(8, generator=g, dtype=torch.float64) for _ in range(2)]
        classes = (numbers + (step > 40) * (numbers % 7 == 0)) % 3
        looked._largest.clear()
        scans += bool(kept._largest)
        a, b = (t.weigh(numbers, *losses, classes, 3, stamp=step + 1) for t in (kept, looked))
        assert torch.equal(a, b)
        assert all(torch.equal(kept._largest[n], looked._largest[n]) for n in ("biased", "main"))
    assert scans == 59


def test_another_module_begins_with_a_twin_of_its_own():
    method = LearningFromFailure()
    models = [Classifier(), Classifier(), Classifier()]
    for model, callback in zip(models, (method, method, LearningFromFailure()), strict=True):
        train(model, [callback], max_epochs=1)
    assert same(parameters(models[1]), parameters(models[2]))
