"""Learning from Failure: a biased twin says which samples the network must learn. Nam et al., NeurIPS 2020.

Two networks of the same architecture see the same batch. The biased one, b, learns what it finds easy even faster, by
generalised cross-entropy; the main one learns what b fails at::

    A[i] = l_i at first, then rate * A[i] + (1 - rate) * l_i      running loss of each sample, of b and of the main one
    w_i  = a_b / (a_b + a_main),  a = A[i] / max of A over the training samples of i's class
    loss = mean_i w_i l_main,i   and for b   mean_i q p_b,i^q l_b,i       (q times the gradient of (1 - p^q) / q)

Three weightings circulate under this name. This is the authors' (rate 0.7, q 0.7); ``running=False`` is SubpopBench's,
which has neither running losses nor class maxima: there the weight of whatever the main network has fitted goes to one.

The biased twin is a copy of the user's module as it stands when training starts, run through the user's own training
step on the same batch; it has an optimiser of the user's kind, is averaged over ranks, saved with the callback, and
leaves no trace in the module. Every rank holds the running losses of all samples, by number.

Costs: a second forward and backward pass, about twice a step; twice the memory of weights and activations; over ranks a
gather of five numbers a sample. Needs the numbers of samples (``tag(train)``), and targets that name a class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from debias.errors import DebiasError, UnsupportedStrategyError
from debias.methods.base import NumberedMethod
from debias.ops import arguments as checks
from debias.ops.arguments import check_number, checked
from debias.ops.distributed import gather, weighted_mean
from debias.ops.fields import arguments
from debias.ops.samples import SampleTable
from debias.step.context import Step
from debias.step.guards import takes_index
from debias.step.owned import OwnedModule
from debias.step.samples import check_length, predictions, sample_losses, train_set
from debias.tap.calls import LossCall
from debias.tap.rows import RowTracker
from debias.tap.selection import reaching, select_calls
from debias.tap.tap import LossTap

__all__ = ["LearningFromFailure", "failure_weights", "generalized_cross_entropy"]


@checked("logits: float N C, targets: int N < C", q="(0, 1]")
def generalized_cross_entropy(logits: Tensor, targets: Tensor, *, q: float = 0.7) -> Tensor:
    """``(1 - p_y^q) / q``: cross-entropy as q goes to 0, 1 minus the probability at 1. Zhang and Sabuncu, NeurIPS 2018.

    Args:
        logits: ``(N, C)``.
        targets: class ids ``(N,)``.
        q: in (0, 1].

    Returns:
        Losses ``(N,)``, differentiable. Their gradient is ``p_y^q`` times that of cross-entropy.

    Example:
        >>> import torch
        >>> from debias.functional import generalized_cross_entropy
        >>> generalized_cross_entropy(torch.zeros(1, 2), torch.tensor([0]), q=1.0)
        tensor([0.5000])
    """
    return -torch.expm1(-q * torch.nn.functional.cross_entropy(logits, targets, reduction="none")) / q


@checked("biased: float N, main: float N, biased_scale: float N, main_scale: float N")
def failure_weights(
    biased: Tensor, main: Tensor, *, biased_scale: Tensor | None = None, main_scale: Tensor | None = None
) -> Tensor:
    """Relative difficulty of samples: the biased network's part of both (running) losses.

    Args:
        biased: losses of the biased network ``(N,)``, at least 0.
        main: losses of the main network ``(N,)``.
        biased_scale: what the biased ones are divided by, ``(N,)``: the largest of each sample's class.
        main_scale: what the main ones are divided by.

    Returns:
        Weights ``(N,)`` in [0, 1]; 0 where both losses are 0.

    Example:
        >>> import torch
        >>> from debias.functional import failure_weights
        >>> failure_weights(torch.tensor([0.05, 2.4]), torch.tensor([0.4, 0.7]))
        tensor([0.1111, 0.7742])
    """
    tiny = torch.finfo(biased.dtype).tiny
    if biased_scale is not None:
        biased = biased / biased_scale.clamp_min(tiny)
    if main_scale is not None:
        main = main / main_scale.clamp_min(tiny)
    return biased / (biased + main + 1e-8)


class FailureTable(SampleTable):
    """Running losses of both networks by sample, and the weights that follow.

    Args:
        size: number of training samples.
        rate: share of the old value in a running loss.
        running: use running losses and class maxima; False for the losses of the step alone.
    """

    def __init__(self, size: int, rate: float = 0.7, running: bool = True) -> None:
        super().__init__(size)
        self.rate = check_number("rate", rate, "[0, 1)")
        self.running = running
        self._largest: dict[str, Tensor] = {}  # by network: the largest running loss of each class, ``(C,)``

    def weigh(
        self, numbers: Tensor, biased: Tensor, main: Tensor, classes: Tensor, n_classes: int, *, stamp: int
    ) -> Tensor:
        """Note the losses of a batch, and weigh its samples.

        Args:
            numbers: of the samples in their set, int64 ``(N,)``.
            biased: losses of the biased network ``(N,)``, NaN where nothing counts.
            main: losses of the main network ``(N,)``.
            classes: class of each sample, int64 ``(N,)``.
            n_classes: number of classes.
            stamp: number of the step, from 1.

        Returns:
            Weights ``(N,)``, 0 where nothing counts.
        """
        counts = biased.isfinite() & main.isfinite()
        biased, main = torch.where(counts, biased, 0), torch.where(counts, main, 0)
        if not self.running:
            return failure_weights(biased, main) * counts
        rows, keep, labels = gather(numbers), gather(counts.long()).bool(), gather(classes)
        place = torch.where((rows >= 0) & (rows < self.size), rows, self.size)
        known = self.stamps[place] > 0
        before = {name: self._buffers[name][place] for name in self.columns}  # type: ignore[index]
        for name, losses in (("biased", biased), ("main", main)):
            self.average(name, rows, gather(losses), self.rate, keep)
        self.record(rows, stamp, keep=keep, classes=labels)
        found, scales = [], []
        for name in ("biased", "main"):
            running: Any = self._buffers[name]
            largest = self._maxima(name, n_classes, place, labels, known, before)
            found.append(running[torch.where((numbers >= 0) & (numbers < self.size), numbers, self.size)])
            scales.append(largest[classes])
        return failure_weights(*found, biased_scale=scales[0], main_scale=scales[1]) * counts

    def _maxima(
        self, name: str, n_classes: int, place: Tensor, labels: Tensor, known: Tensor, before: dict[str, Tensor]
    ) -> Tensor:
        """The largest running loss of each class over the training set, ``(C,)``.

        All samples are looked at where that is cheap, on a device; on the CPU only if a largest one has just been
        replaced, or a sample has changed its class.
        """
        running: Any = self._buffers[name]
        largest = self._largest.get(name)
        if largest is not None and len(largest) == n_classes and name in before and checks.on_host(running):
            replaced = (before[name] >= largest[labels]) | (before["classes"] != labels)
            if not bool((replaced & known).any()):
                largest.scatter_reduce_(0, labels, running[place] * (place < self.size), "amax")
                return largest
        whole = running.new_zeros(n_classes).scatter_reduce(0, self["classes"], self[name], "amax")
        self._largest[name] = whole
        return whole

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._largest.clear()


@arguments(q="(0, 1]", rate="[0, 1)")
class LearningFromFailure(NumberedMethod):
    """Train a biased twin, and let the network learn what the twin fails at; needs no group labels.

    The twin picks up the shortcut first, as it is easier; what it then fails at contradicts the shortcut, and counts
    more for the network.

    Args:
        q: of the twin's generalised cross-entropy, in (0, 1]; 0.7 published, searched over (0.05, 0.95).
        rate: share of the old value in a running loss.
        running: the authors' weights; False for SubpopBench's.
        optimizer: makes the twin's optimiser from parameters and ``lr=``; by default one of the user's class and
            options, whose learning rates follow the user's.

    Logs:
        On logging steps ``train/failure_weight``, the mean weight, ``train/biased_loss`` and ``train/average_loss``.
    """

    classifies = True
    needs = ("index", "target")
    reference = "Nam et al., NeurIPS 2020, arXiv 2007.02561"
    works = "The shortcut is easier than the task, so that the biased twin falls for it; labels are clean."
    fails = "Labels are noisy, or the twin does not fall for the shortcut."

    q: float = 0.7
    rate: float = 0.7
    running: bool = True
    optimizer: Callable[[Iterable], Optimizer] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.owned = {"twin": OwnedModule(self._copy, lr=1.0, optimizer=self._make_optimizer)}
        self._stash: dict[str, Any] | None = None
        self._source: Any = None
        self._twins: LossCall | None = None
        self._tap: Any = None

    def _start_afresh(self) -> None:
        """Twin and losses are about one module: another one begins with a copy of its own."""
        self.module = self._epoch = None
        self.owned["twin"].load_state_dict({})

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse several optimisers, whose steps the twin could not follow."""
        super().on_fit_start(trainer, pl_module)
        if len(trainer.optimizers) != 1:
            raise UnsupportedStrategyError(
                f"Expected one optimiser for {self.state_key}, whose kind the twin's is, but got"
                f" {len(trainer.optimizers)}. Join them into one with several parameter groups."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the table, and the twin before the first step changes the module."""
        size = len(train_set(trainer, self.state_key))
        saved: Any = self.module.size if self.module is not None else size
        if self._stash is not None:
            saved = len(self._stash["stamps"]) - 1
        check_length(trainer, saved, self.state_key)
        if self.module is None:
            self.module = FailureTable(size, self.rate, self.running)
        if self._stash is not None:
            self.module.load_state_dict(self._stash)
            self._stash = None
        self.module.to(pl_module.device)
        self._source = pl_module
        self._twin(pl_module)

    def begin(self, step: Step) -> None:
        """Run the twin on the batch that the network is about to see."""
        super().begin(step)
        twin, module = self._twin(step.module), step.module
        twin.train(module.training)
        for own, users in zip(twin.parameters(), module.parameters(), strict=False):
            own.requires_grad_(users.requires_grad)  # a callback may unfreeze layers while the run lasts
        device = module.device
        tap = self._tap = LossTap(tracker=RowTracker(step.batch, step.n or 0), rows=self.rows)
        # Dropout in the twin must not change what the network itself draws.
        with torch.random.fork_rng(devices=[device] if torch.cuda.is_initialized() else []):
            torch.manual_seed(self.random.generator(torch.device("cpu"), "twin").initial_seed())
            with tap:
                given = (step.batch, step.batch_idx) if takes_index(twin.training_step) else (step.batch,)
                output = twin.training_step(*given)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        found = reaching(tap, loss) if isinstance(loss, Tensor) else None
        if found is None or not found.calls:
            raise DebiasError(
                f"Expected the training step to compute a torch loss that the twin of {self.state_key} can be trained"
                " by, but got none that reaches the returned loss. Return the loss of one call."
            )
        chosen = select_calls(found.calls, self.loss, self.state_key)
        found.multiply(chosen)
        self._twins = chosen[0]

    def reweigh(self, calls: list[LossCall], step: Step) -> list[Tensor]:
        """The network's losses, weighted by relative difficulty."""
        (call,) = calls
        numbers, twins = self.sample_ids(step), self._twins
        assert twins is not None  # begin() has run
        n = len(numbers)
        (biased, has), (main, also) = sample_losses(twins, n), sample_losses(call, n)
        biased = torch.where(has & also, biased, torch.nan)
        logits, targets = predictions(call, n, self.state_key)
        several = logits.ndim > 1 and logits.shape != targets.shape
        if several and (targets.is_floating_point() or logits.ndim > 2):
            raise DebiasError(f"Expected class ids as targets for {self.state_key}, but got {tuple(targets.shape)}.")
        classes = targets if several else (targets.view(n, -1)[:, 0] > 0.5)
        n_classes = logits.shape[1] if several else 2
        classes = classes.long().clamp(0, n_classes - 1)
        weights = self.module.weigh(numbers, biased, main, classes, n_classes, stamp=step.counter + 1)
        loss = weighted_mean(call.num * call.of_rows(weights).to(call.num.dtype), call.den.detach())
        if step.logging:
            self.log_value("failure_weight", weights.mean(), step)
            self.log_value("biased_loss", twins.mean().detach(), step)
            self.log_value("average_loss", call.mean().detach(), step)
        return [loss]

    def penalise(self, call: LossCall, step: Step) -> Tensor:
        """The twin's loss: its gradients are its own, its value is not part of the network's."""
        twins = self._twins
        assert twins is not None
        self._twins = None
        num, den, _ = twins.record.rows  # of the criterion itself, whatever the step multiplies it by
        certain = torch.exp(-self.q * num.detach() / torch.where(den == 0, 1, den))
        loss = weighted_mean(twins.num * (self.q * certain).to(twins.num.dtype), twins.den.detach())
        tap, self._tap = self._tap, None
        tap.close()
        return (loss - loss.detach()).to(call.num.dtype)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Step the twin with the user's learning rates, weight decay and momentum of this moment."""
        owned = self.owned["twin"]
        if owned.optimizer is not None and self.optimizer is None:
            for group in optimizer.param_groups[len(owned.optimizer.param_groups) :]:
                owned.optimizer.add_param_group(self._twins_group(group))
            for own, users in zip(owned.optimizer.param_groups, optimizer.param_groups, strict=True):
                own.update({key: value for key, value in users.items() if key != "params"})
        super().on_before_optimizer_step(trainer, pl_module, optimizer)

    def state_dict(self) -> dict[str, Any]:
        """The table, the twin and its optimiser."""
        state = super().state_dict()
        return state if self._stash is None else {**state, "module": self._stash}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the table until the size of the training set is known."""
        self._stash, self.module = state_dict.get("module"), None
        super().load_state_dict({**state_dict})

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave the module as it was, and let go of it."""
        super().teardown(trainer, pl_module, stage)
        self._source = self._twins = self._tap = None
        twin: Any = self.owned["twin"].module
        if twin is not None and hasattr(twin, "_trainer"):
            twin._trainer = None

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_source": None, "_twins": None, "_tap": None}

    def _twin(self, module: Any) -> Any:
        twin: Any = self.owned["twin"].create(0, module.device, None)  # type: ignore[arg-type]
        if hasattr(twin, "_trainer") and twin._trainer is None:
            twin.trainer = module.trainer
        return twin

    def _copy(self, width: int) -> nn.Module:
        twin = copy.deepcopy(self._source)
        twin.log = twin.log_dict = ignore  # what it logs would count twice
        if getattr(twin, "_compiler_ctx", None) is not None:
            # What Lightning has put in place of these runs the compiled original, whoever it is called on.
            for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
                vars(twin).pop(name, None)
        return twin

    def _make_optimizer(self, parameters: Any, lr: float) -> Optimizer:
        users = self.engine.trainer.optimizers[0]  # type: ignore[union-attr]
        twins = list(parameters)
        if self.optimizer is not None:
            return self.optimizer(twins, lr=users.param_groups[0]["lr"])  # type: ignore[call-arg]
        groups = [self._twins_group(group, twins) for group in users.param_groups]
        try:
            return type(users)(groups)
        except (TypeError, ValueError) as error:
            raise DebiasError(
                f"Expected an optimiser that can be made a second time, but got {type(users).__name__}: {error}. Pass"
                " the twin's own: `optimizer=torch.optim.AdamW`."
            ) from error

    def _twins_group(self, group: dict[str, Any], twins: Any = None) -> dict[str, Any]:
        """A group of the user's optimiser, with the parameters of the twin."""
        twins = self.owned["twin"].module.parameters() if twins is None else twins  # type: ignore[union-attr]
        place = dict(zip(map(id, self._source.parameters()), twins, strict=True))
        return {**group, "params": [place[id(p)] for p in group["params"] if id(p) in place]}


def ignore(*args: Any, **kwargs: Any) -> None:
    """Log nothing."""
