"""Unsupervised domain adaptation in small: labelled coloured digits, and unlabelled ones that look otherwise.

The source shows handwritten digits in a random colour on black. The target shows other writers' digits on a background
of a random colour: a plain form of MNIST to MNIST-M (Ganin et al., JMLR 2016, sec. 5.2.4).
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from debias.data._common import GroupDataModule, check_stated
from debias.data.colored_digits import load_digits
from debias.data.tagging import TaggedDataset, tag
from debias.ops.arguments import checked

__all__ = ["DigitsAdaptation"]


class DigitsAdaptation(GroupDataModule):
    """1797 handwritten digits of 8 x 8 pixels: labelled ones of a source, unlabelled ones of a target. No download.

    The digits' order follows the writers. The first 60 % are the source, of which a random fifth is for validation. The
    last 40 %, of other writers, are the target: half of them for training, without labels, the others for the test.

    A training batch is ``{"source": (x, y), "target": x}``, from two loaders; an epoch ends with the longer one, the
    source. Validation batches (of the source) and test batches (of the target) are ``(x, y)``. ``x`` is float32
    ``(N, 3, 8, 8)`` in [0, 1], ``y`` int64 ``(N,)``, 0 to 9. Tags of what is labelled: ``group``, the digit. Which
    loader a training sample comes from is ``domain="loader"`` of a method. After ``setup``: ``target_set``, and what a
    :class:`GroupDataModule` has.

    Args:
        batch_size: samples per batch, rank and loader.
        seed: seed of the splits, the colours and the order of training samples.
        n_groups: always 10; stated so that other parts of a configuration can refer to it.
        n_domains: always 2; stated likewise.
        balance: None, or "group" to draw training batches of the source with each digit equally often.
        num_workers: worker processes of each loader.

    Raises:
        DebiasError: an argument is out of range, or scikit-learn is not installed (extra ``recipes``).

    Example:
        >>> from debias.data import DigitsAdaptation
        >>> digits = DigitsAdaptation()
        >>> digits.setup()
        >>> len(digits.train_set), len(digits.target_set), len(digits.val_set), len(digits.test_set)
        (862, 360, 216, 359)
    """

    target_set: TensorDataset

    @checked()
    def __init__(
        self,
        batch_size: int = 64,
        seed: int = 0,
        n_groups: int = 10,
        n_domains: int = 2,
        balance: str | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, balance=balance, num_workers=num_workers)
        check_stated("n_groups", n_groups, 10, "one group for each digit")
        check_stated("n_domains", n_domains, 2, "source and target")
        self.n_groups, self.n_domains = n_groups, n_domains
        self._target_order = torch.Generator()
        self._resumed_target: Tensor | None = None

    def setup(self, stage: str | None = None) -> None:
        """Make the sets; the same ones whatever the stage."""
        images, digits = load_digits()
        # RandomState, because its stream is frozen: results are the same with every version of NumPy.
        random = np.random.RandomState(self.seed)
        cut = round(0.6 * len(digits))
        source, target = random.permutation(cut), cut + random.permutation(len(digits) - cut)
        held_out, half = round(0.2 * cut), round(0.5 * len(target))
        ink, background = 0.4 + 0.6 * random.rand(len(digits), 3, 1, 1), 0.6 * random.rand(len(digits), 3, 1, 1)
        background[:cut] = 0
        x = background + (ink - background) * images[:, None]
        inputs, labels = torch.from_numpy(x).float(), torch.from_numpy(digits).long()
        self.val_set, self.train_set, self.test_set = (
            _tagged(inputs[rows], labels[rows]) for rows in (source[:held_out], source[held_out:], target[half:])
        )
        self.target_set = TensorDataset(inputs[target[:half]])
        self._describe_groups([str(digit) for digit in range(10)])

    def train_dataloader(self) -> Any:
        """The labelled samples of the source, and the unlabelled ones of the target, shuffled by ``seed``."""
        if self._resumed_target is None:
            self._target_order.manual_seed(self.seed)
        else:
            self._target_order.set_state(self._resumed_target)
            self._resumed_target = None
        target = DataLoader(
            self.target_set,
            batch_size=self.batch_size,
            shuffle=True,
            generator=self._target_order,
            num_workers=self.num_workers,
            collate_fn=_inputs,
        )
        return {"source": super().train_dataloader(), "target": target}

    def state_dict(self) -> dict[str, Any]:
        """Where the shuffling is, of both loaders."""
        return super().state_dict() | {"target_order": self._target_order.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there, when training."""
        super().load_state_dict(state_dict)
        if self.trainer is not None and self.trainer.state.fn == "fit":
            self._resumed_target = state_dict["target_order"]


def _tagged(x: Tensor, y: Tensor) -> TaggedDataset:
    return cast(TaggedDataset, tag(TensorDataset(x, y), group=y))


def _inputs(samples: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([x for (x,) in samples])
