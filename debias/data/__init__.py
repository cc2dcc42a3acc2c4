"""Datasets whose groups are known, tags beside a batch, and samplers; loaded on first use (PEP 562)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "BCCD": "debias.data.bccd",
    "COCOFolder": "debias.data.coco_folder",
    "ColoredDigits": "debias.data.colored_digits",
    "ColoredMNIST": "debias.data.colored_mnist",
    "DigitsAdaptation": "debias.data.digits_adaptation",
    "DigitsShift": "debias.data.digits_shift",
    "DomainFolder": "debias.data.domain_folder",
    "EvalSampler": "debias.data.samplers",
    "FacialActionUnits": "debias.data.facial_action_units",
    "GroupBalancedSampler": "debias.data.samplers",
    "IdentityShortcut": "debias.data.identity_shortcut",
    "GWHD": "debias.data.gwhd",
    "ShapesDetection": "debias.data.shapes_detection",
    "ShortcutFolder": "debias.data.shortcut_folder",
    "TagCollate": "debias.step.tagged",
    "TaggedDataset": "debias.data.tagging",
    "TaggedIterableDataset": "debias.data.tagging",
    "TokenDomains": "debias.data.token_domains",
    "VOCFolder": "debias.data.voc_folder",
    "Waterbirds": "debias.data.waterbirds",
    "tag": "debias.data.tagging",
    "untag": "debias.data.tagging",
}

__all__ = [
    "BCCD",
    "COCOFolder",
    "ColoredDigits",
    "ColoredMNIST",
    "DigitsAdaptation",
    "DigitsShift",
    "DomainFolder",
    "EvalSampler",
    "FacialActionUnits",
    "GroupBalancedSampler",
    "IdentityShortcut",
    "GWHD",
    "ShapesDetection",
    "ShortcutFolder",
    "TagCollate",
    "TaggedDataset",
    "TaggedIterableDataset",
    "TokenDomains",
    "VOCFolder",
    "Waterbirds",
    "tag",
    "untag",
]

if TYPE_CHECKING:
    from debias.data.bccd import BCCD
    from debias.data.coco_folder import COCOFolder
    from debias.data.colored_digits import ColoredDigits
    from debias.data.colored_mnist import ColoredMNIST
    from debias.data.digits_adaptation import DigitsAdaptation
    from debias.data.digits_shift import DigitsShift
    from debias.data.domain_folder import DomainFolder
    from debias.data.facial_action_units import FacialActionUnits
    from debias.data.gwhd import GWHD
    from debias.data.identity_shortcut import IdentityShortcut
    from debias.data.samplers import EvalSampler, GroupBalancedSampler
    from debias.data.shapes_detection import ShapesDetection
    from debias.data.shortcut_folder import ShortcutFolder
    from debias.data.tagging import TaggedDataset, TaggedIterableDataset, tag, untag
    from debias.data.token_domains import TokenDomains
    from debias.data.voc_folder import VOCFolder
    from debias.data.waterbirds import Waterbirds
    from debias.step.tagged import TagCollate


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
