"""Index samplers that know groups and ranks: balanced batches for training, unpadded shares for evaluation.

Both subclass PyTorch's ``DistributedSampler``, because that is the one kind of sampler which Lightning leaves in place
under DDP and whose ``set_epoch`` it calls. Unlike their base class they look up rank and world size when they are
iterated, not when they are made: loaders are usually made before the processes are launched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DistributedSampler

from debias.errors import DataError, DebiasError
from debias.ops.arguments import MOST, check_count, checked
from debias.ops.distributed import global_rank, world_size

__all__ = ["EvalSampler", "GroupBalancedSampler", "check_batches"]

_ORDER_STREAM = 2**63  # random streams are numbered: groups from 0, the order within the batches of a rank from here


class _LateRank(DistributedSampler[int]):
    """A ``DistributedSampler`` whose rank and world size are those of the moment they are read."""

    # DistributedSampler.__init__ resolves the rank, so it is not called; what it would set is set here.
    def __init__(self, dataset: Sized, *, shuffle: bool, seed: int = 0) -> None:
        self.dataset = dataset  # type: ignore[assignment]
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = False
        self.epoch = 0

    @property
    def rank(self) -> int:  # type: ignore[override]
        """The rank of this process among those that see different samples; 0 without a process group."""
        return global_rank()

    @property
    def num_replicas(self) -> int:  # type: ignore[override]
        """The number of processes that see different samples; 1 without a process group."""
        return world_size()

    @property
    def num_samples(self) -> int:  # type: ignore[override]
        """The number of indices this rank draws in an epoch."""
        return len(self)

    def __len__(self) -> int:
        raise NotImplementedError


class GroupBalancedSampler(_LateRank):
    """Draws training indices so that every batch on every rank holds each group equally often.

    With ``G`` groups and batches of ``B``, each batch holds ``B / G`` samples of every group. If ``G`` does not divide
    ``B``, the remainder rotates: counts in a batch differ by at most one, also over the global batch of all ranks,
    and are equal over any ``G`` consecutive batches of a rank.

    Each group is an endless sequence of reshuffled passes over its samples, which runs on from batch to batch and from
    epoch to epoch: no sample comes again before all others of its group came, so small groups repeat, large ones
    do not. Ranks take turns in that sequence, hence draw different samples as long as a group has enough of them; where
    ``G`` divides ``B``, ``N`` ranks with batches of ``B`` draw the very samples that one rank draws with batches of
    ``N * B``. The indices are a function of ``(seed, epoch, rank, world size)`` alone.

    An epoch is ``ceil(num_samples / (B * world size))`` whole batches per rank: with the default, as many steps as a
    plain loader makes. Outside Lightning, call ``set_epoch`` before each epoch.

    Its iterators have ``state_dict`` and ``load_state_dict``, which torchdata's ``StatefulDataLoader`` calls, so a
    run resumes in the middle of an epoch. The state is the same on all ranks, because Lightning saves rank 0's only.

    Args:
        groups: group id of each training sample, integers of shape ``(N,)``. Negative ids mean unlabelled and are never
            drawn.
        batch_size: samples per batch and rank; give the ``DataLoader`` the same, else its batches are not balanced. A
            ``GroupMonitor`` in the run refuses other ones; nobody else looks.
        n_groups: number of groups. If given, each of them must have samples; otherwise the groups are those present.
        num_samples: samples per epoch over all ranks together, rounded up to whole batches. Default: ``N``.
        seed: seed of the drawing, the same on all ranks; not negative.

    Raises:
        DataError: ``groups`` is not a 1-D sequence of integers, names no group, has ids that are too large, or lacks a
            group.
        DebiasError: another argument is out of range.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> from debias.data import GroupBalancedSampler
        >>> groups = [0, 0, 0, 0, 0, 0, 1, 1]
        >>> sampler = GroupBalancedSampler(groups, batch_size=4, n_groups=2)
        >>> [sum(batch.tolist()) for batch in DataLoader(groups, batch_size=4, sampler=sampler)]
        [2, 2]
    """

    @checked()
    def __init__(
        self,
        groups: Sequence[int] | Tensor | np.ndarray,
        batch_size: int,
        *,
        n_groups: int | None = None,
        num_samples: int | None = None,
        seed: int = 0,
    ) -> None:
        ids = _as_ids(groups)
        check_count("batch_size", batch_size)
        if n_groups is not None:
            check_count("n_groups", n_groups, 1, MOST)
        if num_samples is not None:
            check_count("num_samples", num_samples)
        check_count("seed", seed, 0)
        super().__init__(ids, shuffle=True, seed=seed)
        self.batch_size = batch_size
        self.samples_per_epoch = len(ids) if num_samples is None else num_samples
        self.group_ids = _present(ids, n_groups)
        self._members = [np.flatnonzero(ids == group) for group in self.group_ids]

    def __len__(self) -> int:
        return self._n_batches() * self.batch_size

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """The number of indices all ranks draw together in an epoch."""
        return len(self) * self.num_replicas

    def __iter__(self) -> Iterator[int]:
        return _Draws(self)

    def _n_batches(self) -> int:
        return -(-self.samples_per_epoch // (self.batch_size * self.num_replicas))

    def _draw(self, epoch: int) -> list[int]:
        """All indices of this rank in ``epoch``, batch after batch."""
        n_groups, size, rank, world = len(self._members), self.batch_size, self.rank, self.num_replicas
        n_batches = self._n_batches()
        first_batch = epoch * n_batches
        # Slots are numbered through, and slot u belongs to group u mod G. Rank r is r batches ahead of rank 0: within
        # a rank the slots run on without a gap, and side by side the ranks' batches are one run of slots too.
        slots = (first_batch + rank) * size + np.arange(n_batches * size)
        group = slots % n_groups
        skipped = (rank * size - group + n_groups - 1) // n_groups  # slots of the group before this rank's first one
        draws = (slots // n_groups - skipped) * world + rank
        indices = np.empty(len(slots), dtype=np.int64)
        for number, members in enumerate(self._members):
            of_group = group == number
            indices[of_group] = members[self._positions(number, draws[of_group])]
        # Within a batch the order is random, so that steps which pair neighbours do not always pair the same groups.
        order = _permutations(self.seed, _ORDER_STREAM + rank, first_batch, n_batches, size)
        batches: list[int] = np.take_along_axis(indices.reshape(n_batches, size), order, axis=1).ravel().tolist()
        return batches

    def _positions(self, number: int, draws: np.ndarray) -> np.ndarray:
        """Positions, among the members of a group, of its draws ``draws``: the endless sequence of shuffled passes."""
        if not len(draws):
            return draws
        size = len(self._members[number])
        passes = draws // size
        first = int(passes.min())
        shuffled = _permutations(self.seed, int(self.group_ids[number]), first, int(passes.max()) + 1 - first, size)
        return np.asarray(shuffled[passes - first, draws % size])


class EvalSampler(_LateRank):
    """Each sample exactly once: rank ``r`` of ``W`` gets the indices ``r, r + W, r + 2W, ...`` in order.

    Lightning's own sampler pads the shares to equal length by evaluating some samples twice, which shifts group
    accuracies. Here shares differ by up to one sample, so ranks may run different numbers of batches.

    Args:
        dataset: anything with a length.

    Example:
        >>> from debias.data import EvalSampler
        >>> list(EvalSampler(range(5)))
        [0, 1, 2, 3, 4]
    """

    pads = False  # monitors warn of samplers that do

    @checked()
    def __init__(self, dataset: Sized) -> None:
        super().__init__(dataset, shuffle=False)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    @property
    def total_size(self) -> int:  # type: ignore[override]
        """The number of indices all ranks draw together."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]


class _Draws(Iterator[int]):
    """One epoch of a :class:`GroupBalancedSampler`, with the two methods of torchdata's ``Stateful`` protocol.

    The epoch belongs to this state and not to the sampler's: loading the state of a *finished* epoch must not undo
    the ``set_epoch`` of the next one.
    """

    def __init__(self, sampler: GroupBalancedSampler) -> None:
        self.sampler = sampler
        self.epoch = sampler.epoch
        self.yielded = 0
        self._indices: list[int] | None = None  # drawn at first use

    def __next__(self) -> int:
        if self._indices is None:
            self._indices = self.sampler._draw(self.epoch)
        if self.yielded >= len(self._indices):
            raise StopIteration
        self.yielded += 1
        return self._indices[self.yielded - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "yielded": self.yielded}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch, self.yielded, self._indices = state_dict["epoch"], state_dict["yielded"], None


def _permutations(seed: int, stream: int, first: int, count: int, size: int) -> np.ndarray:
    """Permutations ``first``, ..., ``first + count - 1`` of ``range(size)`` of a stream, shape ``(count, size)``.

    Philox counts instead of carrying a state, so any permutation of an endless sequence can be computed on its own;
    its raw words are the same in all versions of NumPy.
    """
    blocks = -(-size // 4)  # Philox makes four words per count
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=first * blocks)
    keys = words.random_raw(count * blocks * 4).reshape(count, blocks * 4)
    return np.asarray(keys[:, :size].argsort(axis=1, kind="stable"))


def _as_ids(groups: Any) -> np.ndarray:
    ids = groups.detach().cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
    if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iub":
        raise DataError(
            "Expected argument `groups` to be one integer id per sample, shape (N,) with N >= 1, but got shape"
            f" {tuple(ids.shape)} of {ids.dtype}. Several attributes make one id as `first * n_second + second`."
        )
    return ids.astype(np.int64)


def _present(ids: np.ndarray, n_groups: int | None) -> np.ndarray:
    """The ids that occur, sorted; checked against ``n_groups``."""
    present = np.unique(ids[ids >= 0])
    if not len(present):
        raise DataError(
            f"Expected argument `groups` to name a group of at least one sample, but got {len(ids)} negative ids, which"
            " mean unlabelled. Check how the ids are read, or use a plain sampler."
        )
    if n_groups is None:
        return present
    if present[-1] >= n_groups:
        raise DataError(
            f"Expected argument `groups` to hold ids below `n_groups={n_groups}`, but got {present[-1]} at position"
            f" {int(np.argmax(ids))}. Number the groups from 0, or raise `n_groups`."
        )
    if absent := sorted(set(range(n_groups)) - set(present.tolist())):
        raise DataError(
            f"Expected argument `groups` to hold samples of all `n_groups={n_groups}` groups, but got none of group"
            f" {', '.join(map(str, absent))}. Leave out `n_groups` to balance the groups that are there, or correct the"
            " ids."
        )
    return present


def check_batches(loader: Any) -> None:
    """Refuse a loader whose batches are not those that its :class:`GroupBalancedSampler` balances.

    Args:
        loader: a ``DataLoader``, or anything else, which is left alone.

    Raises:
        DebiasError: their sizes differ.
    """
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    if isinstance(sampler, GroupBalancedSampler) and size is not None and size != sampler.batch_size:
        raise DebiasError(
            f"Expected the loader of a GroupBalancedSampler to have its `batch_size` {sampler.batch_size}, but got"
            f" {size}: its batches would not be balanced. Give both the same."
        )
