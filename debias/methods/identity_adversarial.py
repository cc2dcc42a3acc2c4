"""Identity-adversarial training: features from which nobody can be recognised. Ning et al., FG 2025, arXiv 2407.11243.

With ``f`` the features that the classifier reads, R gradient reversal (backward times ``-strength``), and
``z = A(R(f))`` the logits of an identity head over S identities::

    loss = task loss + l(z, s)
    l = 1/S sum_k BCE(z_k, [k = s])         identity_loss="bce", the paper's
    l = -log softmax(z)_s                   identity_loss="ce"

The head learns to recognise at weight 1, the network below it to prevent that at weight ``strength``.

**The two losses are not on one scale.** The gradient of "bce" with respect to z is ``(sigmoid(z) - [k = s]) / S``, that
of "ce" ``softmax(z) - [k = s]``: at zero logits the second is ``2 sqrt(S - 1)`` times as long, and once the head knows
the base rate 1/S, exactly S times. So the paper's ``strength=2`` on 41 identities is ``2 / 41 = 0.05`` under "ce"
(:func:`bce_to_ce_strength`), and its pull shrinks as identities are added.

Published: strength 2 on BP4D (41 identities), 1 on BP4D+ (140), 0.5 on DISFA (27), constant, no warm-up, a linear head;
AdamW with the learning rate of the classifier. Differences from the authors' code: the head is no part of the model,
its optimiser or its checkpoints; samples without identity are left out instead of failing; ``strength=0`` trains the
head and leaves the network alone (an online probe), where theirs leaves out the head.

An identity absent from a batch, or with one sample, needs no care: the loss is a mean over samples. A batch without any
known identity adds a loss of 0. Costs: the identity head forward and backward on (N, D) features, one all-reduce of
12 doubles a step and one of the head's gradient. Needs the features and identities of the training samples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.methods.base import AdversarialDebiaser, AdversaryLoss, AdversaryOptions, configures, make_mlp
from debias.ops.arguments import checked
from debias.ops.fields import arguments
from debias.step.batch import BatchKey

__all__ = [
    "IdentityAdversarial",
    "IdentityAdversarialLoss",
    "IdentityAdversarialMixin",
    "bce_to_ce_strength",
    "identity_losses",
]


@checked("logits: float N K, identities: int N < K")
def identity_losses(logits: Tensor, identities: Tensor, *, identity_loss: Literal["bce", "ce"] = "bce") -> Tensor:
    """Loss of an identity head for each sample.

    Args:
        logits: ``(N, S)``.
        identities: int64 ``(N,)``, each in [0, S).
        identity_loss: ``"bce"``: binary cross-entropy with the one-hot identity, averaged over the S logits;
            ``"ce"``: cross-entropy.

    Returns:
        Losses ``(N,)``.

    Example:
        >>> import torch
        >>> from debias.functional import identity_losses
        >>> identity_losses(torch.zeros(1, 4), torch.tensor([2]))
        tensor([0.6931])
        >>> identity_losses(torch.zeros(1, 4), torch.tensor([2]), identity_loss="ce")
        tensor([1.3863])
    """
    if identity_loss == "ce":
        return F.cross_entropy(logits, identities, reduction="none")
    # By comparison: F.one_hot reads its argument on the host.
    one_hot = identities.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
    return F.binary_cross_entropy_with_logits(logits, one_hot.to(logits.dtype), reduction="none").mean(1)


@checked(strength="[0, inf)")
def bce_to_ce_strength(strength: float, n_identities: int) -> float:
    """The strength under ``identity_loss="ce"`` whose pull on the features is that of ``strength`` under ``"bce"``.

    Exact for a head that knows the base rate of identities and nothing more. Before, at zero logits, the factor is
    ``2 sqrt(S - 1)`` and not S; it depends on what the head has learnt, so search the strength anew.

    Args:
        strength: lambda under "bce".
        n_identities: S.

    Returns:
        ``strength / n_identities``.

    Example:
        >>> from debias.functional import bce_to_ce_strength
        >>> round(bce_to_ce_strength(2.0, 41), 3)  # the paper's value on BP4D
        0.049
    """
    return strength / n_identities


@arguments
class IdentityAdversarialOptions(AdversaryOptions):
    """Options of identity-adversarial training.

    Args:
        strength: lambda of the reversal; published 2 on BP4D, 1 on BP4D+, 0.5 on DISFA, with "bce". At 0 the network
            trains as without the method, and the head is an online probe.
        identity_loss: ``"bce"`` (paper), whose pull shrinks as 1/S, or ``"ce"``.
        adversary: ``"linear"`` (paper), ``"mlp"`` (the paper's ablation: D, D/2, D/4, S with GELU), a module from
            ``(N, D)`` to ``(N, S)``, of which a copy is trained, or a function that makes one from D.
    """

    identity_loss: Literal["bce", "ce"] = "bce"
    adversary: str | nn.Module | Callable[[int], nn.Module] = "linear"


@arguments
class IdentityLoss(AdversaryLoss):
    """The loss of an identity head.

    Args:
        in_features: width D of the features; None leaves out the network, for those who pass their own to
            :meth:`objective`.
        n_identities: number of identities S, numbered 0 .. S - 1.
    """

    ids = ("identity", "n_identities")
    adversary_field = "adversary"
    in_features: int | None = field(kw_only=False)
    n_identities: int = field(kw_only=False)


@arguments
class IdentityAdversarialLoss(IdentityAdversarialOptions, IdentityLoss):
    """The identity head, gradient reversal and loss, for any training loop: add its output to the task's loss.

    Shape:
        features ``(N, D)`` floating point; identities ``(N,)`` integer, negative = unknown, left out; output: scalar.
        Under DDP its value and its gradient are those of the global batch.

    Example:
        >>> import torch
        >>> from debias import IdentityAdversarialLoss
        >>> criterion = IdentityAdversarialLoss(in_features=8, n_identities=3, strength=0.5)
        >>> features = torch.randn(4, 8, requires_grad=True)
        >>> criterion(features, torch.tensor([0, 2, 1, -1])).backward()
        >>> features.grad[3].abs().sum()  # nobody knows who that is
        tensor(0.)
    """

    strength: float = field(default=1.0, kw_only=False)

    def networks(self, width: int) -> dict[str, Callable[[], nn.Module]]:
        """The paper's linear head, and its ablation."""
        widths = [width, max(width // 2, 1), max(width // 4, 1), self.n_groups]
        return {"linear": lambda: nn.Linear(width, self.n_groups), "mlp": lambda: make_mlp(widths, nn.GELU)}

    def losses(
        self, network: nn.Module, features: Tensor, ids: Tensor, strata: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, bool]]]:
        """The head's logits and its loss for each sample."""
        logits = self.guess(network, features)
        return logits, [(identity_losses(logits, ids, identity_loss=self.identity_loss), False)]


@arguments
class IdentityAdversarial(IdentityAdversarialOptions, AdversarialDebiaser):
    """Keep identity out of the features, by an adversary that tries to recognise people.

    With few people in training, to know the person is a shortcut to the label; features that do not tell who it is
    offer none.

    Args:
        identity: where the identities are: a tag, an index, a name, a dotted path or a callable; ids int64 ``(N,)``,
            negative = unknown, left out.
        n_identities: number of identities S, numbered 0 .. S - 1 over the whole training set.
        schedule: ``"constant"`` (paper), or ``"dann"``: from 0 to ``strength`` by :func:`debias.functional.dann_ramp`.

    Example:
        >>> from debias import IdentityAdversarial
        >>> IdentityAdversarial(identity="subject", n_identities=41, strength=2.0).state_key
        'IdentityAdversarial(subject)'
    """

    ids = ("identity", "n_identities")
    needs = ("identity", "features")
    reference = "Ning et al., FG 2025, arXiv 2407.11243"
    works = "Few people recur in training, and the network can recognise them."
    fails = (
        "The layers below are frozen. Too much strength makes the features easier to read, and worse; watch "
        "`AttributeProbe`."
    )
    module_class = IdentityAdversarialLoss

    identity: BatchKey = field(kw_only=False)
    n_identities: int = field(kw_only=False)
    schedule: Literal["constant", "dann"] = "constant"


class IdentityAdversarialMixin:
    """Identity-adversarial training inside a LightningModule; the identity head is then a part of it.

    Example:
        >>> import lightning as L, torch
        >>> from debias import IdentityAdversarialMixin
        >>> class Model(IdentityAdversarialMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        ...         self.configure_identity_adversarial(in_features=8, n_identities=41, strength=2.0)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, person = batch
        ...         features = self.backbone(x)
        ...         loss = torch.nn.functional.cross_entropy(self.head(features), y)
        ...         return loss + self.identity_adversarial_loss(features, person)
    """

    identity_adversarial: IdentityAdversarialLoss
    configure_identity_adversarial = configures("identity_adversarial", IdentityAdversarialLoss)

    def identity_adversarial_loss(self, features: Tensor, identities: Tensor) -> Tensor:
        """What to add to the loss, for features ``(N, D)`` and identities ``(N,)``."""
        return self.identity_adversarial(features, identities)
