"""How well an attribute (who it is, where it was taken) can be read from a network's features: a linear probe.

While validating or testing, features and attributes of all samples are kept. At the end of the epoch the samples of
each value are divided at random into two parts; a linear classifier is fitted on the first and scored on the second,
once with the true values and once with shuffled ones, which says what a probe reaches by accident.

Frames of one clip, slices of one scan or visits of one patient are nearly the same: with some in either part the probe
recognises the clip, not the attribute. With units (``unit=``) all samples of one stay in one part, and values are
shuffled by whole units.

The classifier is a linear discriminant with a pooled covariance::

    W_k = C^-1 m_k,   b_k = log(n_k / n) - m_k C^-1 m_k / 2,   C = (1 - a) S + a diag(S)

with m_k the mean of value k, S the covariance within values, and the shrinkage a of Ledoit and Wolf (Journal of
Multivariate Analysis, 2004) for features divided by their standard deviation within values. So the scale of a feature
does not matter: a network that only turns down what tells the attribute hides nothing. Why this one: it is a function
of sums, so it is the same on one process and on many, with no sample sent anywhere; it has a closed form, so no
learning rate or number of steps decides what it finds; and unlike least squares it masks no value where there are many.
A logistic regression can find a little more where features are far from normal, and a deep adversary more still: a
probe gives a lower bound of what is there.

Costs an epoch: the features of the set (4 N D bytes), the ids and numbers of all samples on every rank, N D^2
operations and one decomposition of a D x D matrix, twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from debias.errors import BadRowsError, BatchKeyError, DebiasError, DebiasWarning, RowsError
from debias.monitors._epoch import EpochMonitor
from debias.ops.arguments import check_count, check_number, checked
from debias.ops.distributed import gather, global_rank, global_sum, world_size
from debias.step.batch import BatchKey, key_name
from debias.step.context import Step
from debias.step.indices import evaluation_order, evaluation_sets
from debias.step.watcher import check_loss
from debias.tap.calls import LossCall
from debias.tap.features import Pool, check_features, check_pool

__all__ = ["AttributeProbe", "ledoit_wolf_shrinkage", "probe_attribute"]


@checked("scatter: float D D, fourth: float, n: any")
def ledoit_wolf_shrinkage(scatter: Tensor, fourth: Tensor, n: Tensor) -> Tensor:
    """Share of the spherical target in Ledoit and Wolf's covariance, from sums over centred samples.

    Args:
        scatter: ``sum_i x_i x_i^T``, ``(D, D)``.
        fourth: ``sum_i |x_i|^4``, scalar.
        n: number of samples, scalar.

    Returns:
        The shrinkage, scalar in [0, 1].
    """
    width = scatter.shape[0]
    mean_variance = scatter.diagonal().sum() / n / width
    squares = (scatter / n).square().sum()
    distance = squares / width - mean_variance**2
    noise = torch.minimum((fourth / n - squares) / n / width, distance)
    return torch.where(noise > 0, noise / distance.clamp_min(torch.finfo(noise.dtype).tiny), 0)


@checked(
    "features: float N D, attributes: int N | bool N, numbers: int N, units: int N",
    fit_fraction="(0, 1)",
    shrinkage="[0, 1]",
)
def probe_attribute(
    features: Tensor,
    attributes: Tensor,
    n_values: int,
    *,
    numbers: Tensor | None = None,
    units: Tensor | None = None,
    fit_fraction: float = 0.5,
    shrinkage: float | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Fit a linear probe on one part of the samples and score it on the rest; in a distributed run over all ranks.

    Args:
        features: ``(N, D)`` floating point; ranks may hold different numbers of rows, also none.
        attributes: int64 ``(N,)``, negative = unknown, left out.
        n_values: number of values of the attribute.
        numbers: number of each sample in its set, int64 ``(N,)``: the parts are drawn by it, so that they do not depend
            on ranks and batches; of samples with the same number one counts. By default every row is another sample.
        units: the clip, scan or patient of each sample, int64 ``(N,)``, any numbers, negative = unknown, left out; all
            samples of one are fitted on, or all are scored. By default every sample is a unit.
        fit_fraction: share of the units of each value to fit on; at least one is, and a value with one is not scored. A
            unit with several values counts as one of its most frequent value.
        shrinkage: share of the diagonal target in the covariance; Ledoit and Wolf's by default.
        seed: seed of the parts and of the shuffling.

    Returns:
        Scalars: ``accuracy``, ``balanced_accuracy`` (mean over values), ``chance`` (the share of the most
        frequent value, what the best guess without features reaches), ``shuffled_accuracy`` and
        ``shuffled_balanced_accuracy``; NaN where no sample can be scored.

    Raises:
        BadRowsError: an attribute is ``n_values`` or more, or a feature is not finite; on all ranks together.

    Example:
        >>> import torch
        >>> from debias.functional import probe_attribute
        >>> person = torch.arange(40) % 4
        >>> scores = probe_attribute(torch.nn.functional.one_hot(person).double(), person, n_values=4)
        >>> scores["accuracy"].item(), scores["chance"].item()
        (1.0, 0.25)
    """
    rank, device = global_rank(), features.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    numbers = torch.arange(len(features), device=device) * world_size() + rank if numbers is None else numbers
    bad_rows = global_sum((~features.isfinite().all(1)).sum().to(dtype))
    of = torch.zeros_like(numbers) if units is None else units
    table = gather(torch.stack([numbers, attributes, torch.full_like(numbers, rank), of], 1)).cpu()
    _refuse_bad(table[:, 1], n_values, bad_rows)
    table = torch.cat([table, (torch.arange(len(table)) - (table[:, 2] < rank).sum()).unsqueeze(1)], 1)
    table = table[table[:, 0].argsort(stable=True)]
    again = torch.cat([torch.zeros(min(1, len(table)), dtype=torch.bool), table[1:, 0] == table[:-1, 0]])
    table = table[~again & (table[:, 1] >= 0) & (table[:, 3] >= 0)]

    generator = torch.Generator().manual_seed(seed)
    values = table[:, 1]
    of_unit = torch.arange(len(table)) if units is None else table[:, 3].unique(return_inverse=True)[1]
    fits = _stratified(_most_frequent(values, of_unit, n_values), n_values, fit_fraction, generator)[of_unit]
    shuffled = _shuffled(values, of_unit, generator)
    own = table[:, 2] == rank
    x = features[table[own, 4].to(device)].to(dtype)
    scores: dict[str, Tensor] = {}
    for prefix, labels in (("", values), ("shuffled_", shuffled)):
        hits, totals = _fit_and_score(x, labels[own].to(device), fits[own].to(device), n_values, shrinkage)
        scores[f"{prefix}accuracy"] = hits.sum() / totals.sum()
        scores[f"{prefix}balanced_accuracy"] = (hits / totals).nanmean()
        if not prefix:
            scores["chance"] = totals.max() / totals.sum()
    return scores


def _refuse_bad(attributes: Tensor, n_values: int, bad_rows: Tensor) -> None:
    if beyond := int((attributes >= n_values).sum()):
        raise BadRowsError(
            f"Expected attributes below `n_values={n_values}`, but {beyond} samples had a higher one. Number them"
            " 0 .. n_values - 1 (-1 = unknown), or raise `n_values`."
        )
    if bad := int(bad_rows):
        raise BadRowsError(
            f"Expected finite features, but {bad} samples had a NaN or infinite one. Check their inputs and the"
            " network."
        )


def _most_frequent(values: Tensor, of_unit: Tensor, n_values: int) -> Tensor:
    """The most frequent value of each unit, the lowest of several."""
    pairs, counts = (of_unit * n_values + values).unique(return_counts=True)
    pairs = pairs[counts.argsort(descending=True, stable=True)]
    pairs = pairs[(pairs // n_values).argsort(stable=True)]
    first = pairs.new_ones(len(pairs), dtype=torch.bool)
    first[1:] = pairs[1:] // n_values != pairs[:-1] // n_values
    return pairs[first] % n_values


def _shuffled(values: Tensor, of_unit: Tensor, generator: torch.Generator) -> Tensor:
    """Values of the units in another order, so that samples of a unit mostly share theirs, as the true ones do."""
    place = torch.randperm(int(of_unit.max()) + 1 if len(of_unit) else 0, generator=generator).argsort()
    shuffled = torch.empty_like(values)
    shuffled[of_unit.argsort(stable=True)] = values[place[of_unit].argsort(stable=True)]
    return shuffled


def _stratified(values: Tensor, n_values: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Which units to fit on: of each value that share, at least one, at random."""
    order = torch.randperm(len(values), generator=generator)
    order = order[values[order].argsort(stable=True)]
    counts = torch.bincount(values, minlength=n_values)
    place = torch.arange(len(values)) - (counts.cumsum(0) - counts)[values[order]]
    fits = torch.zeros(len(values), dtype=torch.bool)
    fits[order] = place < (counts * fraction).floor().clamp_min(1)[values[order]]
    return fits


def _scale(within: Tensor, between: Tensor, centre: Tensor, n: Tensor) -> Tensor:
    """Standard deviation within values of each feature, ``(D,)``, from variances; infinite where all is rounding."""
    eps = torch.finfo(within.dtype).eps
    # A feature that is the same for all samples of a value must neither vanish nor drown the others in rounding.
    variance = torch.maximum(within, eps**0.5 * between)
    rounding = (n * eps) ** 2 * (centre.square() + within + between)  # of a mean of n numbers
    return torch.where(variance > rounding, variance, torch.inf).sqrt()


def _fit_and_score(
    x: Tensor, labels: Tensor, fits: Tensor, n_values: int, shrinkage: float | None
) -> tuple[Tensor, Tensor]:
    """Right guesses and samples by value, ``(n_values,)``, over all ranks; only values that were fitted are scored."""
    width = x.shape[1]
    fitted = x[fits]
    sums = x.new_zeros(n_values, width + 1)
    sums.index_add_(0, labels[fits], torch.cat([fitted, fitted.new_ones(len(fitted), 1)], 1))
    sums = global_sum(sums)
    counts, n = sums[:, -1], sums[:, -1].sum().clamp_min(1)
    centre = sums[:, :-1].sum(0) / n
    x = x - centre
    means = sums[:, :-1] / counts.clamp_min(1).unsqueeze(1) - centre
    centred = x[fits] - means[labels[fits]]
    scale = _scale(global_sum(centred.square().sum(0)) / n, counts @ means.square() / n, centre, n)
    x, means, centred = x / scale, means / scale, centred / scale
    fourth = centred.square().sum(1).square().sum()
    moments = global_sum(torch.cat([(centred.T @ centred).flatten(), fourth.reshape(1)]))
    scatter, varies = moments[:-1].view(width, width), scale.isfinite()
    share = ledoit_wolf_shrinkage(scatter[varies][:, varies], moments[-1], n) if shrinkage is None else shrinkage
    correlation = ((1 - share) * scatter / n).fill_diagonal_(1)
    weights = (torch.linalg.pinv(correlation, hermitian=True) @ means.T).T
    bias = (counts / n).log() - (means * weights).sum(1) / 2
    scored = ~fits & (counts[labels] > 0)
    right = (x[scored] @ weights.T + bias).argmax(1) == labels[scored]
    tally = x.new_zeros(n_values, 2)
    tally.index_add_(0, labels[scored], torch.stack([right.to(x.dtype), torch.ones_like(right, dtype=x.dtype)], 1))
    hits, totals = global_sum(tally).unbind(1)
    return hits, totals


class AttributeProbe(EpochMonitor):
    """Measure how well an attribute can be read from the features, while validating and testing.

    How is described at the top of :mod:`debias.monitors.attribute_probe`. Works alone, on a plain ERM baseline, and
    changes nothing. Logged at the end of an epoch, with ``val`` or ``test`` as the stage::

        val/identity_probe/accuracy                     samples whose attribute is told
        val/identity_probe/balanced_accuracy            the same, mean over values
        val/identity_probe/chance                       the most frequent value's share
        val/identity_probe/shuffled_accuracy            a probe of shuffled attributes: what is there by accident
        val/identity_probe/shuffled_balanced_accuracy

    ``identity`` is the instance's name. With several loaders every name ends in ``/dataloader_idx_<i>``. The sanity
    check is skipped. On several ranks the scores are those of one process, if the loader's sampler is not shuffled.

    Args:
        attribute: where the attribute is: a tag, an index, a name, a dotted path or a callable; int64 ``(N,)``,
            negative = unknown, left out. The two parts need the same values: give it the identities of the validation
            set, not those of the training set.
        n_values: number of values.
        unit: where the clip, scan or patient of a sample is, like ``attribute``, whose samples are alike and stay in
            one part; any numbers, negative = unknown, left out. A value needs two units to be scored. By default
            every sample is a unit, which is right only where samples are taken independently.
        features: dotted path of the module whose output ``(N, D)`` is probed; by default the input of the classifier
            head, found by the loss of the step or the output of the module's ``forward``.
        pool: how tokens ``(N, T, D)`` or maps ``(N, D, H, W)`` that ``features`` names become one row a sample:
            ``"mean"`` of all, padding too, or ``"first"`` token.
        head: dotted path of the head, where it is not found.
        every_n_epochs: probe in every n-th training epoch; testing and validating alone always do.
        fit_fraction: share of the units of each value to fit on.
        shrinkage: share of the diagonal target in the covariance; Ledoit and Wolf's by default.
        loss: which of several losses of a step is meant: its position, or a callable of :class:`LossCall`.
        seed: seed of the parts and of the shuffling.
        name: the first part of the logged names; by default the key.
        allow_untested_strategy: run under a strategy that was not tested.

    Raises:
        HeadNotFoundError: the features are not found or not ``(N, D)``.
        BadRowsError: an attribute is out of range, or a feature is not finite.
        RowsError: features and attributes have not as many rows.

    Example:
        >>> from debias import AttributeProbe
        >>> AttributeProbe(attribute="identity", n_values=41, every_n_epochs=5).state_key
        'AttributeProbe(identity)'
    """

    needs_features: ClassVar[bool] = True
    needs: ClassVar[tuple[str, ...]] = ("attribute", "features")
    reference: ClassVar[str] = "probe: Alain and Bengio, ICLR 2017 workshop; shrinkage: Ledoit and Wolf, 2004"
    _value_names = ("accuracy", "balanced_accuracy", "chance")

    @checked()
    def __init__(
        self,
        attribute: BatchKey,
        n_values: int,
        *,
        unit: BatchKey | None = None,
        features: str | None = None,
        pool: Pool = None,
        head: str | None = None,
        every_n_epochs: int = 1,
        fit_fraction: float = 0.5,
        shrinkage: float | None = None,
        loss: int | Callable[[LossCall], bool] | None = None,
        seed: int = 0,
        name: str | None = None,
        allow_untested_strategy: bool = False,
    ) -> None:
        super().__init__(name=name or key_name(attribute), allow_untested_strategy=allow_untested_strategy)
        check_loss(loss)
        if self.name is None:
            raise DebiasError("Expected `name` to be given where `attribute` is a callable, but got none.")
        self.attribute = attribute
        self.n_values = check_count("n_values", n_values)
        self.unit = unit
        check_pool(pool, features)
        self.features = features
        self.pool = pool
        self.head = head
        self.every_n_epochs = check_count("every_n_epochs", every_n_epochs)
        self.fit_fraction = check_number("fit_fraction", fit_fraction, "(0, 1)")
        self.shrinkage = None if shrinkage is None else check_number("shrinkage", shrinkage, "[0, 1]")
        self.loss = loss
        self.seed = seed
        self._kept: list[list[tuple[Tensor, ...]]] = []
        self._said_alone = False
        self._active = False

    def _prefix(self, stage: str) -> str:
        return f"{stage}/{self.name}_probe/"

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was."""
        self._kept = []
        super().teardown(trainer, pl_module, stage)

    def begin(self, step: Step) -> None:
        """Read the attributes, in the epochs that are probed."""
        if self._active:
            self._ids(step)

    def observe(self, step: Step, calls: list[LossCall], forward_output: Any, output: Any) -> None:
        """Keep features and attributes of one batch."""
        if not self._active:
            return
        ids = self._ids(step)
        features = check_features(step.features)
        if len(features) != len(ids[0]):
            raise RowsError(f"Expected one row of features for each of {len(ids[0])} samples, but got {len(features)}.")
        self._kept[step.dataloader_idx].append((features.detach().float(), *ids))

    def _ids(self, step: Step) -> list[Tensor]:
        """The attribute of each sample, and its unit where there are units."""
        keys = {"attribute": self.attribute} | ({} if self.unit is None else {"unit": self.unit})
        found = []
        for name, key in keys.items():
            ids = step.ids(key, self.n_values, argument=name)
            if ids.ndim != 1:
                raise BatchKeyError(
                    f"Expected `{name}={key!r}` to hold one id per sample, shape (N,), but got a membership of shape"
                    f" {tuple(ids.shape)}."
                )
            found.append(ids)
        return found

    def _start(self, trainer: Any, pl_module: Any, loaders: list[Any]) -> None:
        self._kept = [[] for _ in loaders]
        due = trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0
        self._active = due and not trainer.sanity_checking

    def _values(self, trainer: Any, pl_module: Any, stage: str) -> list[dict[str, Tensor]]:
        if not self._active:
            return []
        sets, self._kept = zip(evaluation_sets(trainer), self._kept, strict=True), []
        scores = [self._scores(loader, kept, pl_module.device) for loader, kept in sets]
        alone = self.unit is not None and any(bool(each["accuracy"].isnan()) for each in scores)
        if alone and not self._said_alone and trainer.is_global_zero:
            self._said_alone = True
            warnings.warn(
                f"{self.state_key} could score nothing: no value of `attribute={self.attribute!r}` has samples of two"
                f" units, by `unit={self.unit!r}`. One unit of a value is fitted on, another is scored: give smaller"
                " units, or more data.",
                DebiasWarning,
                stacklevel=2,
            )
        return scores

    def _scores(self, loader: Any, kept: list[tuple[Tensor, ...]], device: torch.device) -> dict[str, Tensor]:
        # A rank may have had no batch, and then does not know how wide features are.
        known = torch.tensor([kept[0][0].shape[1] if kept else 0, len(kept) > 0], dtype=torch.float32, device=device)
        width, ranks = (int(x) for x in global_sum(known))
        none = torch.zeros(0, dtype=torch.long, device=device)
        empty = (known.new_zeros(0, width // max(ranks, 1)), none, *([] if self.unit is None else [none]))
        features, ids, *units = (torch.cat(parts) for parts in zip(*(kept or [empty]), strict=True))
        return probe_attribute(
            features,
            ids,
            self.n_values,
            numbers=_numbers(loader, len(ids), device),
            units=units[0] if units else None,
            fit_fraction=self.fit_fraction,
            shrinkage=self.shrinkage,
            seed=self.seed,
        )


def _numbers(loader: Any, n: int, device: torch.device) -> Tensor | None:
    """Numbers of the samples that a loader in a fixed order gave, of which a limited run has seen the first."""
    try:
        numbers = evaluation_order(loader).to(device)[:n]
    except BatchKeyError:
        return None
    return numbers if len(numbers) == n else None
