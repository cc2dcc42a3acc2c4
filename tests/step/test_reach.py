"""A method that reaches no trainable parameter is plain training to the last bit, and says so once; others do not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from _support.fits import Classifier, deviation, loader, make_trainer, parameters, same, val_loader
from debias import (
    CORAL,
    IRM,
    MMD,
    DomainAdversarial,
    DomainPenalisation,
    Fishr,
    GroupDRO,
    GroupReweighting,
    HessianAlignment,
    IdentityAdversarial,
    VREx,
)
from debias.errors import DebiasWarning

ON_FEATURES = {
    "DANN": lambda **o: DomainAdversarial("place", 3, schedule="constant", **o),
    "CDANN": lambda **o: DomainAdversarial("place", 3, conditional=True, **o),
    "IdentityAdversarial": lambda **o: IdentityAdversarial("person", 5, **o),
    "CORAL": lambda **o: CORAL("place", 3, **o),
    "MMD": lambda **o: MMD("place", 3, **o),
}
ON_THE_LOSS = {
    "HessianAlignment": lambda **o: HessianAlignment("place", 3, **o),
    "Fishr": lambda **o: Fishr("place", 3, **o),
    "IRM": lambda **o: IRM("place", 3, **o),
    "VREx": lambda **o: VREx("place", 3, **o),
    "GroupDRO": lambda **o: GroupDRO("place", 3, **o),
    "GroupReweighting": lambda **o: GroupReweighting("place", 3, **o),
    "DomainPenalisation": lambda **o: DomainPenalisation("place", 3, **o),
}
ALL = ON_FEATURES | ON_THE_LOSS


class Frozen(Classifier):
    """Its backbone has no gradient."""

    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(False)


class NotHeld(Classifier):
    """Its backbone has gradients, which no optimiser takes."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class TwoHeads(Classifier):
    """The first loss is of a head that no optimiser takes, on features that are detached."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.other = nn.Linear(6, 2).double()

    def training_step(self, batch, batch_idx):
        x, y = batch
        features = self.backbone(x)
        return F.cross_entropy(self.other(features.detach()), y) + F.cross_entropy(self.head(features), y)

    def configure_optimizers(self):
        return torch.optim.SGD([*self.backbone.parameters(), *self.head.parameters()], lr=0.1)


class Recomputed(Classifier):
    """A backbone whose parameters the graph does not show."""

    def forward(self, x):
        return self.head(checkpoint(self.backbone, x.requires_grad_(), use_reentrant=True))


def fit(model, *methods, epochs=2, **options):
    """Train; what was said, and the module as it became."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", DebiasWarning)
        bare = not methods
        make_trainer(methods, max_epochs=epochs, **options).fit(model, loader(bare=bare), val_loader(bare=bare))
    return [str(w.message) for w in said if issubclass(w.category, DebiasWarning)], parameters(model)


@pytest.mark.parametrize("name", ON_FEATURES)
@pytest.mark.parametrize("model", [Frozen, NotHeld])
def test_features_that_nothing_trains(name, model):
    method = ON_FEATURES[name]()
    said, trained = fit(model(), method)
    assert len(said) == 1
    assert said[0].startswith(f"{method.state_key} reaches no trainable parameter: it changes nothing")
    assert same(trained, fit(model())[1])  # and that is so
    assert len(fit(model(), method)[0]) == 1  # another fit, said again


@pytest.mark.parametrize("name", ON_THE_LOSS)
@pytest.mark.parametrize("model", [Frozen, NotHeld])
def test_the_head_is_enough_for_others(name, model):
    said, trained = fit(model(), ON_THE_LOSS[name]())
    assert said == []
    assert not same(trained, fit(model())[1])


@pytest.mark.parametrize("name", ALL)
def test_a_loss_that_nothing_trains_from(name):
    said, trained = fit(TwoHeads(), ALL[name](loss=0))
    assert [text.partition(":")[0].partition(" ")[2] for text in said] == ["reaches no trainable parameter"]
    assert same(trained, fit(TwoHeads())[1])
    said, trained = fit(TwoHeads(), ALL[name](loss=1))
    assert said == []
    assert not same(trained, fit(TwoHeads())[1])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("model", [Classifier, Recomputed])
def test_nothing_is_said_where_something_is_reached(name, model):
    assert fit(model(), ALL[name]())[0] == []


@pytest.mark.parametrize("method", [IdentityAdversarial("person", 5, strength=0.0), IRM("place", 3, penalty_weight=0)])
def test_what_is_to_change_nothing_says_nothing(method):
    assert fit(Frozen(), method)[0] == []


def test_it_is_said_when_the_weight_is_no_longer_0():
    assert len(fit(Frozen(), CORAL("place", 3, start_step=5))[0]) == 1  # of six steps
    assert len(fit(Frozen(), CORAL("place", 3, start_step=6))[0]) == 0


def test_an_optimizer_with_copies_of_the_parameters_may_train_all():
    class Copies(NotHeld):
        def configure_optimizers(self):
            self.copies = copy.deepcopy(list(self.head.parameters()))  # as kept in another precision
            return torch.optim.SGD(self.copies, lr=0.1)

    assert fit(Copies(), CORAL("place", 3))[0] == []


# Dynamo looks at the gradient of every tensor it meets, also of those that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", ["GroupDRO", "CORAL"])
def test_a_compiled_module(name):
    class Quiet(NotHeld):
        """Logs nothing: Dynamo spends most of its time on Lightning's `log`."""

        def log(self, *args, **kwargs):
            pass

    short = {"epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0}  # of one size, as it is compiled for each
    torch._dynamo.reset()
    said, trained = fit(torch.compile(Quiet(), backend="eager"), ALL[name](loss=0), **short)
    torch._dynamo.reset()
    assert len(said) == (name == "CORAL")
    assert deviation(trained, fit(Quiet(), ALL[name](), **short)[1]) < 1e-12
