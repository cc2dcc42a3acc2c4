"""The error of a training that diverged names what may have been the cause, the weight of the method included."""

from __future__ import annotations

import pytest
import torch

from _support.fits import Classifier, train
from debias import (
    CORALPenalty,
    DomainAdversarialLoss,
    GroupDROLoss,
    HessianAlignmentPenalty,
    IdentityAdversarialLoss,
    VREx,
    VRExPenalty,
)
from debias.errors import BadRowsError


@pytest.mark.parametrize(
    ("module", "weight"),
    [
        (VRExPenalty(2, penalty_weight=1e5), r"`penalty_weight=100000`"),
        (CORALPenalty(2, penalty_weight=3.0), r"`penalty_weight=3`"),
        (
            HessianAlignmentPenalty(2, penalty_weight=7, alpha=0.5, beta=2),
            r"`penalty_weight=7` with `alpha=0.5`, `beta=2`",
        ),
        (DomainAdversarialLoss(4, 2, strength=20.0), r"`strength=20`"),
        (IdentityAdversarialLoss(4, 2, strength=0.5), r"`strength=0.5`"),
        (GroupDROLoss(2), r"the weights of penalties, if there are any"),
    ],
)
def test_the_error_of_a_loss_that_diverged_names_the_weight(module, weight) -> None:
    rows = torch.full((4,) if isinstance(module, VRExPenalty | GroupDROLoss) else (4, 4), torch.nan)
    ids = torch.tensor([0, 1, 0, 1])
    more = (torch.full((4, 4), torch.nan), ids) if isinstance(module, HessianAlignmentPenalty) else ()
    with pytest.raises(BadRowsError, match=f"Check the inputs of this batch, the learning rates? and {weight};"):
        module(rows, *more, ids)


def test_a_penalty_that_makes_training_diverge_is_named() -> None:
    with pytest.raises(BadRowsError, match=r"the learning rate and `penalty_weight=1e\+200`"):
        train(Classifier(), [VREx("place", 3, penalty_weight=1e200)], max_epochs=3)
