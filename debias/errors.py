"""Errors of debias.

Each message names the argument, the rule, what was received and what to do. All of them subclass Lightning's
``MisconfigurationException``, so one ``except`` clause catches Lightning's and ours.
"""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = [
    "AmbiguousLossError",
    "BadRowsError",
    "BatchKeyError",
    "DataError",
    "DebiasError",
    "DebiasWarning",
    "HeadNotFoundError",
    "LossNotFoundError",
    "RowsError",
    "SPLIT",
    "UnknownArgumentError",
    "UnsupportedStrategyError",
    "unwritable",
    "UntappedLossError",
]

SPLIT = "Methods that reweigh groups or domains also take `losses='split'`, which runs the step once per group."
"""A way out of every step whose loss cannot be taken apart, under automatic optimisation."""


class DebiasError(MisconfigurationException):
    """Base class of all errors of debias; raised directly for a wrong argument or an unsupported combination."""


class BatchKeyError(DebiasError):
    """A batch holds nothing usable at the place a ``BatchKey`` names."""


class LossNotFoundError(DebiasError):
    """The training step computed no loss that can be taken apart per sample."""


class AmbiguousLossError(DebiasError):
    """The training step computed several losses and nothing says which of them is meant."""


class UntappedLossError(DebiasError):
    """A loss reaches the returned loss next to the one that was taken apart, but cannot be taken apart itself."""


class RowsError(DebiasError):
    """The rows of a loss cannot be matched with the samples of the batch."""


class HeadNotFoundError(DebiasError):
    """The classifier head, or the features it reads, cannot be found."""


class BadRowsError(DebiasError):
    """Samples carried a group id outside the range or a loss that is not finite."""


class UnknownArgumentError(DebiasError, TypeError):
    """A class was called with an argument that it does not have."""


class UnsupportedStrategyError(DebiasError):
    """The Trainer's strategy or optimisation mode is not supported by a method."""


class DataError(DebiasError):
    """A dataset folder is missing, incomplete or malformed."""


def unwritable(path: Path | str, error: Exception) -> DebiasError:
    """The error for a file or folder that cannot be written."""
    return DebiasError(
        f"Expected {path} to be a place that can be written, but it is not ({error}). Free space there or name another"
        " place, then run the same command again: what has finished stays."
    )


class DebiasWarning(UserWarning):
    """A method or monitor says what would mislead; ``debias compare`` puts these of its runs under its table."""
