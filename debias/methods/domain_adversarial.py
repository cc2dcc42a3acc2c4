"""Domain-adversarial training: features whose domain nobody can tell. DANN: Ganin et al., JMLR 2016, arXiv 1505.07818.

With ``f`` the features that the classifier reads, R gradient reversal (backward times ``-strength``), and D a
discriminator over E domains::

    loss = task loss + mean_i [ CE(D(R(f_i)), e_i) + gradient_penalty |d CE_i / d R(f_i)|^2 ]                   DANN
    loss = task loss + mean_y mean_{i: y_i = y} CE(D(R(f_i) + embedding(y_i)), e_i) + the same penalty         CDANN

CDANN (Li et al., ECCV 2018) looks for the domain within each class: where classes are unevenly spread over domains,
features that tell the class tell the domain, and DANN fights them. The embedding is learnt with D.

The strength follows DANN's ramp, ``strength (2 / (1 + exp(-10 p)) - 1)`` with p the share of training that is over.
Published: strength 1 with that ramp (Ganin et al., section 5.2.2); DomainBed trains network and discriminator in turn,
``10^U(-2, 2)``, a discriminator of 3 layers of 256, gradient penalty 0 or ``10^U(-2, 1)``; WILDS a constant 0.1 to 1.

Differences from DomainBed's code: one step with reversal in place of alternating steps with two optimisers; the
gradient penalty is not built at all where its weight is 0; the mean over classes in CDANN runs over the classes that
the batch holds, where theirs divides by the highest label in the batch plus one; domains may be of any size.

A domain or class absent from a batch, or with one sample, needs no care. A batch without any known domain adds a loss
of 0. Costs: the discriminator forward and backward on (N, D) features (twice under a gradient penalty), one all-reduce
of 12 doubles a step (CDANN with K classes 3 K + 9; twice as many under a gradient penalty) and one of the
discriminator's gradient. Needs the features and domains of the training samples; CDANN their classes, read from the
loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from debias.errors import DebiasError, RowsError
from debias.methods.base import AdversarialDebiaser, AdversaryLoss, AdversaryOptions, configures, make_mlp
from debias.ops.fields import arguments
from debias.ops.gradient_reversal import dann_ramp, gradient_reversal
from debias.step.batch import BatchKey, describe
from debias.step.context import Step
from debias.tap.calls import LossCall

__all__ = [
    "DomainAdversarial", "DomainAdversarialLoss", "DomainAdversarialMixin", "dann_ramp", "gradient_reversal",
]  # fmt: skip


class ClassConditional(nn.Module):
    """A discriminator of features plus an embedding of their class."""

    def __init__(self, n_classes: int, width: int, discriminator: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, width)
        self.discriminator = discriminator

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        """Logits of the domains."""
        return self.discriminator(features + self.embedding(targets))


@arguments(n_classes="[1, inf)", gradient_penalty="[0, inf)")
class DomainAdversarialOptions(AdversaryOptions):
    """Options of domain-adversarial training.

    Args:
        n_classes: number of classes, for CDANN. The module is DANN without it; the callback reads it from the logits
            of a fit's first step.
        discriminator: ``"mlp"`` (D, 256, 256, E with ReLU, as in DomainBed), ``"linear"``, a module from ``(N, D)`` to
            ``(N, E)``, of which a copy is trained, or a function that makes one from D.
        gradient_penalty: weight of the squared gradient of each sample's loss with respect to the features; nothing is
            computed at 0, nor where gradients are disabled.
    """

    n_classes: int | None = None
    discriminator: str | nn.Module | Callable[[int], nn.Module] = "mlp"
    gradient_penalty: float = 0.0


@arguments
class DomainLoss(AdversaryLoss):
    """The loss of a domain discriminator.

    Args:
        in_features: width D of the features; None leaves out the network, for those who pass their own to
            :meth:`objective`.
        n_domains: number of domains E, numbered 0 .. E - 1.
    """

    ids = ("domain", "n_domains")
    adversary_field = "discriminator"
    in_features: int | None = field(kw_only=False)
    n_domains: int = field(kw_only=False)


@arguments
class DomainAdversarialLoss(DomainAdversarialOptions, DomainLoss):
    """The discriminator, gradient reversal and loss, for any training loop: add its output to the task's loss.

    Args:
        strength: lambda of the reversal; set :attr:`strength` anew to follow a schedule.

    Shape:
        features ``(N, D)`` floating point; domains ``(N,)`` integer, negative = unknown, left out; targets ``(N,)``
        int64 with ``n_classes``; output: scalar. Under DDP its value and its gradient are those of the global batch.

    Example:
        >>> import torch
        >>> from debias import DomainAdversarialLoss
        >>> criterion = DomainAdversarialLoss(in_features=8, n_domains=3, strength=0.5)
        >>> features = torch.randn(4, 8, requires_grad=True)
        >>> criterion(features, torch.tensor([0, 2, 1, -1])).backward()
        >>> features.grad[3].abs().sum()  # of an unknown domain
        tensor(0.)
    """

    strength: float = field(default=1.0, kw_only=False)

    @property
    def n_strata(self) -> int:
        """Classes within which the domain is looked for."""
        return self.n_classes or 1

    def networks(self, width: int) -> dict[str, Callable[[], nn.Module]]:
        """DomainBed's discriminator, and a linear one."""
        widths = [width, 256, 256, self.n_groups]
        return {"mlp": lambda: make_mlp(widths, nn.ReLU), "linear": lambda: nn.Linear(width, self.n_groups)}

    def build(self, width: int) -> nn.Module:
        """The discriminator for features of this width."""
        network = super().build(width)
        return network if self.n_classes is None else ClassConditional(self.n_classes, width, network)

    def losses(
        self, network: nn.Module, features: Tensor, ids: Tensor, strata: Tensor | None
    ) -> tuple[Tensor, list[tuple[Tensor, bool]]]:
        """The discriminator's logits, its loss for each sample, and the gradient penalty of each."""
        penalised = self.gradient_penalty > 0 and torch.is_grad_enabled()
        if penalised and not features.requires_grad:
            features = features.detach().requires_grad_()
        logits = self.guess(network, features) if strata is None else self.guess(network, features, strata)
        losses = F.cross_entropy(logits, ids, reduction="none")
        terms = [(losses, strata is not None)]
        if penalised:
            (gradients,) = torch.autograd.grad(losses.sum(), features, create_graph=True)
            terms.append((self.gradient_penalty * (gradients**2).sum(1), False))
        return logits, terms

    def strata(self, targets: Tensor | None) -> Tensor | None:
        """The classes, for CDANN; samples whose class the loss ignores are left out."""
        if self.n_classes is None:
            return None
        if targets is None:
            raise DebiasError("Expected `targets` with `n_classes`, but got None. Pass the classes of the samples.")
        return torch.where((targets >= 0) & (targets < self.n_classes), targets, -1)


@arguments
class DomainAdversarial(DomainAdversarialOptions, AdversarialDebiaser):
    """Keep the domain out of the features, by a discriminator that tries to tell it (DANN, CDANN).

    What gives a domain away, such as its background, can be a shortcut to the label; features from which nobody can
    tell the domain hold no such clue.

    Args:
        domain: where the domains are: a tag, an index, a name, a dotted path or a callable; ids int64 ``(N,)``,
            negative = unknown, left out.
        n_domains: number of domains E, numbered 0 .. E - 1.
        conditional: CDANN: look for the domain within each class.
        target: where the classes are, for CDANN; by default the target of the loss.
        strength: lambda of the reversal at full height.
        schedule: ``"dann"``: from 0 to ``strength`` by :func:`debias.functional.dann_ramp` (Ganin et al.), or
            ``"constant"``.

    Example:
        >>> from debias import DomainAdversarial
        >>> DomainAdversarial(domain="hospital", n_domains=3, conditional=True).state_key
        'DomainAdversarial(hospital)'
    """

    ids = ("domain", "n_domains")
    needs = ("domain", "features")
    reference = "Ganin et al., JMLR 2016, arXiv 1505.07818; Li et al., ECCV 2018"
    works = "Domains have the same classes in the same shares (else CDANN), and the layers below train."
    fails = (
        "Classes are spread unevenly over domains and the discriminator is not conditional. A frozen backbone: "
        "then it is plain training."
    )
    module_class = DomainAdversarialLoss

    domain: BatchKey = field(kw_only=False)
    n_domains: int = field(kw_only=False)
    conditional: bool = False
    target: BatchKey | None = None
    schedule: Literal["constant", "dann"] = "dann"

    def __post_init__(self) -> None:
        self.n_classes = self.n_classes if self.conditional else None
        super().__post_init__()

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Join the engine; the number of classes, where it is not given, is that of this fit."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.module.n_classes = self.n_classes

    @property
    def needs_loss(self) -> bool:
        """CDANN reads the classes off the loss, unless it is told where they are."""
        return super().needs_loss or self.classifies

    @property
    def classifies(self) -> bool:  # type: ignore[override]
        """Whether it reads the classes off the loss."""
        return self.conditional and (self.target is None or self.module.n_classes is None)

    def targets(self, call: LossCall, step: Step, n_rows: int) -> Tensor | None:
        """Classes of the rows, for CDANN."""
        if not self.conditional:
            return None
        if self.module.n_classes is None:
            logits = call.logits
            if logits is None or (logits.ndim > 2):
                raise DebiasError(
                    f"Expected `n_classes` to be given where logits are {describe(logits)}, but got None."
                )
            classes = max(logits.shape[1] if logits.ndim == 2 else 1, 2)
            network: Any = self.owned["adversary"].module
            if network is not None and network.embedding.num_embeddings != classes:
                raise DebiasError(
                    f"Expected logits of {network.embedding.num_embeddings} classes, which the discriminator of an"
                    f" earlier fit was made for, but got {classes}. Make a new instance of the method for another"
                    " model."
                )
            self.module.n_classes = classes
        found = call.target if self.target is None else step.read(self.target, argument="target")
        targets = torch.as_tensor(found, device=step.module.device) if found is not None else None
        if targets is not None and self.target is not None and targets.ndim:
            targets = call.of_features(targets)
        elif targets is not None and not call.features_in_rows:
            raise RowsError(
                "Expected `target` to be given with `conditional=True` where the features have other rows than the"
                " loss, or another order, but got None. Say where the classes of the samples are: `target='label'`."
            )
        if targets is not None and targets.ndim == 2 and targets.shape[1] == 1:
            targets = targets.squeeze(1)
        if targets is not None and targets.ndim == 2 and call.name == "cross_entropy":
            targets = targets.argmax(1)  # class probabilities
        if targets is None or targets.shape != (n_rows,):
            raise DebiasError(
                f"Expected one class for each of the {n_rows} rows with `conditional=True`, but got"
                f" {describe(targets)}. Say where they are: `target='label'`, or use `conditional=False`."
            )
        return targets.long()


class DomainAdversarialMixin:
    """Domain-adversarial training inside a LightningModule; the discriminator is then a part of it.

    Example:
        >>> import lightning as L, torch
        >>> from debias import DomainAdversarialMixin
        >>> class Model(DomainAdversarialMixin, L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 2)
        ...         self.configure_domain_adversarial(in_features=8, n_domains=3)
        ...     def training_step(self, batch, batch_idx):
        ...         x, y, hospital = batch
        ...         features = self.backbone(x)
        ...         loss = torch.nn.functional.cross_entropy(self.head(features), y)
        ...         return loss + self.domain_adversarial_loss(features, hospital)
    """

    domain_adversarial: DomainAdversarialLoss
    configure_domain_adversarial = configures("domain_adversarial", DomainAdversarialLoss)

    def domain_adversarial_loss(self, features: Tensor, domains: Tensor, targets: Tensor | None = None) -> Tensor:
        """What to add to the loss, for features ``(N, D)``, domains ``(N,)`` and, for CDANN, classes ``(N,)``."""
        return self.domain_adversarial(features, domains, targets)
