"""What to do: rules on what an audit has found, each with its reason and the code to paste."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from debias.audit.columns import PURE

__all__ = ["Advice", "advise"]

FEW = 50  # training or test samples of a group: with fewer a weight of its own mostly fits noise
MANY_GROUPS = 30


@dataclass(frozen=True)
class Advice:
    """One thing to do.

    Attributes:
        what: in one sentence.
        why: the reason, from this audit.
        code: to paste; empty where none is needed.
    """

    what: str
    why: str
    code: str = ""


def advise(report: Any) -> list[Advice]:
    """The rules that apply, the most important first."""
    return list(_rules(report))


def _rules(report: Any) -> Iterator[Advice]:
    pulls, groups = report.tables.get("shortcuts", pd.DataFrame()), report.tables["groups"]
    sure = pulls[pulls["significant"].astype(bool)] if len(pulls) else pulls
    bad = groups[groups["significant"].astype(bool) & report.is_worse(groups["difference"])] if len(groups) else groups
    slices = report.tables.get("slices", pd.DataFrame())
    for row in sure.iloc[:1].to_dict("records"):
        yield from _against_shortcut(report, row)
    if len(bad) and not len(sure):
        row = bad.iloc[0]
        known = [name for name in (row["column"], row["and_column"]) if isinstance(name, str)]
        attributes = [name for name in known if name in report.sizes]
        if attributes and report.task == "detection":
            yield _detection(report, attributes[0])
        elif attributes:
            yield Advice(
                f"Weigh groups of {' and '.join(attributes)} by their size first, and compare with GroupDRO.",
                f"{row['count']:,} samples are worse than the rest, but no column pulls the predictions: they look"
                " harder, or are rarer in training. If the weights do not help, more samples of them will.",
                _callbacks(report, attributes, ["GroupReweighting", "GroupDRO"]),
            )
        else:
            yield Advice(
                f"Look at the class {row['value']}: weigh the loss by class, or collect more of it.",
                "No column explains it: the class itself is hard, or rare in training.",
            )
    elif len(slices) and not len(sure) and report.slices_stand_out:
        yield Advice(
            "Look at the samples of the first slice, name what they have in common, and give it as a column.",
            "No column of the metadata explains the errors, and a slice found without names is worse than the rest. If"
            " its name is not to be had: DSU and MixStyle need none.",
            "from debias import DSU\n\ncallbacks = [DSU(layers=['backbone.layer1', 'backbone.layer2'])]",
        )
    elif not len(sure) and not len(bad) and len(groups) and not groups["ranked"].any():
        yield Advice(
            "Collect more samples of each group, or lower `min_count`.",
            f"No group has the {report.settings['min_count']} samples that a test is made with.",
        )
    elif not len(sure) and not len(bad):
        yield Advice(
            "Nothing: no gap is larger than noise.",
            f"With {report.overall['count']:,} samples and a false-discovery rate of {report.settings['alpha']:.0%}"
            " neither a group nor a pull stands out. A gap smaller than the intervals shown can still be there.",
        )
    untested = pulls[pulls["p_value"].isna()] if len(pulls) else pulls
    names = [
        *(untested["column"] if len(untested) else []),
        *(name for name, why in report.left_out.items() if why == PURE),
    ]
    if names:
        which = ", ".join(names[:5])
        yield Advice(
            f"Collect test samples that break the association of {which} with the label.",
            "Without them nobody can tell whether the model reads the label or the column.",
        )


def _against_shortcut(report: Any, row: dict[str, Any]) -> Iterator[Advice]:
    column = row["column"]
    if report.task == "detection":
        yield _detection(report, column)
        return
    size = report.sizes[column]
    reason = f"The predictions follow {column} at the same true label."
    crossed = [report.target_name, column] if report.task == "classification" else [column]
    n_groups = size["groups"] if report.task == "classification" else size["values"]
    if n_groups > MANY_GROUPS:
        yield Advice(
            f"Treat {column} as a domain: VREx or CORAL first, then an adversary.",
            f"{reason} It has {size['values']} values, so a weight for every class in each ({n_groups} groups) is too"
            " many.",
            _callbacks(report, [column], ["VREx", "CORAL", "DomainAdversarial"]),
        )
        return
    few = size["smallest"] < FEW
    yield Advice(
        f"Balance the groups of {' x '.join(crossed)}: GroupReweighting as the baseline, then GroupDRO"
        + (", and GroupMixup for the small ones." if few else "."),
        f"{reason} There are {n_groups} groups, the smallest with {size['smallest']:,} {size['of']} samples"
        + (": few enough that weights alone overfit them, so watch the worst group in validation." if few else "."),
        _callbacks(report, crossed, ["GroupReweighting", "GroupDRO"] + (["GroupMixup"] if few else [])),
    )
    yield Advice(
        f"Watch the worst group of {' x '.join(crossed)} while training, and choose checkpoints by it.",
        "The average does not show the gap: it is what training has optimised.",
    )


def _detection(report: Any, column: str) -> Advice:
    k = report.sizes[column]["values"]
    return Advice(
        f"Weigh the domains of {column}: DomainPenalisation, with DetectionMonitor to choose checkpoints.",
        f"Images of some values of {column} are worse than the rest; for detectors the losses of an image are weighed.",
        f"from debias import DetectionMonitor, DomainPenalisation\n\ncallbacks = [\n"
        f"    DomainPenalisation(domain={column!r}, n_domains={k}, losses='image'),\n"
        f"    DetectionMonitor(domain={column!r}, n_domains={k}),\n]",
    )


def _callbacks(report: Any, columns: list[str], methods: list[str]) -> str:
    """Code that tags a dataset and sets up one method or another; numbers are those of the audit."""
    sizes = {
        name: len(report.classes) if name == report.target_name else report.sizes[name]["values"] for name in columns
    }
    attributes = {name: k for name, k in sizes.items() if name != report.target_name} or sizes
    lines = [f"from debias import {', '.join(sorted([*methods, 'GroupMonitor'], key=str.lower))}, tag", ""]
    lines.append("# `ids` holds the number of each sample's group, one array a column: " + ", ".join(
        f"{name!r} 0 .. {k - 1}" for name, k in sizes.items()
    ))  # fmt: skip
    lines.append(
        f"train = tag(train, **{{{', '.join(f'{name!r}: ids[{name!r}]' for name in columns)}}})  # validation alike"
    )
    lines.append(f"watch = GroupMonitor({_keys('group', sizes)})")
    for i, method in enumerate(methods):
        keys = _keys("domain", attributes) if method in _BY_DOMAIN else _keys("group", sizes)
        lines.append(f"{'' if i == 0 else '# or: '}callbacks = [{method}({keys}), watch]")
    return "\n".join(lines)


_BY_DOMAIN = ("VREx", "CORAL", "DomainAdversarial", "GroupMixup")  # these see the label by themselves


def _keys(argument: str, sizes: dict[str, int]) -> str:
    names, counts = tuple(sizes), tuple(sizes.values())
    if len(names) == 1:
        return f"{argument}={names[0]!r}, n_{argument}s={counts[0]}"
    return f"{argument}={names!r}, n_{argument}s={counts!r}"
