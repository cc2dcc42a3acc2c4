"""From finished runs to results: tables as CSV, figures, a page in Markdown, and what the terminal shows."""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from debias.compare.escape import fenced, markdown, markdown_code, plain
from debias.compare.figures import FIGURES
from debias.compare.paper import DARK, LIGHT
from debias.compare.records import RunRecord, default_group, find_records
from debias.compare.selection import Rule, default_rule
from debias.compare.table import (
    SHOWN_GROUPS,
    Comparison,
    caption,
    label,
    make_comparison,
    make_markdown,
    make_rich_table,
    runs_rows,
    setting_text,
    table_rows,
    write_rows,
)
from debias.errors import DebiasError
from debias.extras import needs_extra

with needs_extra("compare"):
    from matplotlib import rc_context
    from rich.console import Console

__all__ = ["print_report", "report", "write_report"]

DPI = 150
PAGE = "report.md"
LOGGED = ".logged_to_wandb"  # what of this folder W&B has seen
ALTERNATIVES = {
    "worst_group": "worst-group test metric of each method, sorted, with intervals",
    "worst_vs_average": "worst-group against average test metric of each method",
    "by_group": "test metric of each method in each group",
    "group_weights": "weights of groups over training steps",
}


def report(
    folders: Sequence[Path],
    rule: str | None = None,
    out: Path | None = None,
    *,
    project: str | None = None,
    entity: str | None = None,
    group: str | None = None,
    console: Console | None = None,
) -> None:
    """``debias report``: read runs, write and print everything, and log it to W&B where a project is given.

    Args:
        folders: of comparisons, or of single runs.
        rule: name of a rule; by default :func:`debias.compare.selection.default_rule`.
        out: folder of the results; by default the first of ``folders``.
        project: of W&B.
        entity: user or team of that project.
        group: of W&B; by default that of ``debias compare``.
        console: where to print.

    Raises:
        DebiasError: there are no runs, they are of several recipes, or the results cannot be written or logged.
    """
    records = find_records(folders)
    out = folders[0] if out is None else out
    comparison, paths = write_report(records, rule or default_rule(records), out, folders=folders)
    print_report(comparison, paths, console)
    if project is not None:
        from debias.compare.wandb_summary import log_summary

        group = group or default_group(comparison.recipe, comparison.recipe_hash)
        mark, state = out / LOGGED, _state(paths, project, group, entity)
        if mark.exists() and mark.read_text(encoding="utf-8") == state:  # no second run of the same
            (console or Console()).print(
                f"Logged to the W&B project {project} before, and nothing has changed since. Delete {mark} to log it"
                " again.",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
            return
        log_summary(comparison, paths, project=project, entity=entity, group=group, out=out)
        mark.unlink(missing_ok=True)  # a link would lead elsewhere
        mark.write_text(state, encoding="utf-8")


def _state(paths: Mapping[str, Path], project: str, group: str, entity: str | None) -> str:
    """What is logged to W&B, in short."""
    tables = [paths[name].read_bytes() for name in ("table.csv", "runs.csv")]
    return hashlib.sha256(
        b"\0".join([*tables, *(name.encode() for name in (project, group, entity or ""))])
    ).hexdigest()


def write_report(
    records: Sequence[RunRecord], rule: Rule | str, out: Path, title: str = "", *, folders: Sequence[Path] = ()
) -> tuple[Comparison, dict[str, Path]]:
    """Write ``table.csv``, ``runs.csv``, ``report.md`` and the figures, each for light and dark paper.

    All is made beside its place first: where that fails, what was there before is still there. Then all is moved at
    once, and the page last: a page never stands beside files of another report, also if this is killed.

    Args:
        records: runs of one recipe.
        rule: of selection, or its name.
        out: folder, made if it is not there.
        title: of the page; by default the recipe's name.
        folders: where the runs lie, for the command on the page; by default those of ``records``.

    Returns:
        The comparison; and the files by name, ``"by_group.png"``.

    Raises:
        DebiasError: the rule is not available for these runs, or ``out`` cannot be written.
    """
    comparison = make_comparison(records, rule)
    try:
        out.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".report.", dir=out))
        try:
            (draft / "table.csv").write_text(write_rows(table_rows(comparison)), encoding="utf-8")
            (draft / "runs.csv").write_text(write_rows(runs_rows(comparison)), encoding="utf-8")
            drawn = [name for name in FIGURES if _draw(comparison, name, draft)]
            page = _page(comparison, drawn, title or f"Comparison on {comparison.recipe}", folders, out)
            (draft / PAGE).write_text(page, encoding="utf-8")
            files = sorted(path.name for path in draft.iterdir())
            # Of an earlier report: its page, and the figures that this one does not show.
            for stale in (PAGE, *({f"{name}{p.end}.png" for name in FIGURES for p in (LIGHT, DARK)} - set(files))):
                (out / stale).unlink(missing_ok=True)
            for name in sorted(files, key=PAGE.__eq__):
                os.replace(draft / name, out / name)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise DebiasError(
            f"Expected to write the report to {out}, but that failed: {error}. Pass `--out` with a folder that can be"
            " written."
        ) from error
    return comparison, {name: out / name for name in files}


def print_report(comparison: Comparison, paths: dict[str, Path], console: Console | None = None) -> None:
    """Print the table, its notes, and where the files lie.

    Args:
        comparison: from :func:`write_report`.
        paths: files by name, from there.
        console: where to; by default the terminal, or 120 columns where there is none.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    console.print(make_rich_table(comparison, console.width))
    console.print()
    if len(comparison.groups) > SHOWN_GROUPS:
        console.print(f"- {len(comparison.groups)} groups: each is in table.csv and by_group.png.", markup=False)
    for note in comparison.notes:
        console.print(f"- {plain(note)}", highlight=False, markup=False)
    console.print()
    for name, path in paths.items():
        if not name.endswith(f"{DARK.end}.png"):
            console.print(plain(str(path)), highlight=False, markup=False, soft_wrap=True)


def _draw(comparison: Comparison, name: str, folder: Path) -> bool:
    for paper in (LIGHT, DARK):
        # A dollar in a name is a dollar, and a character that the font lacks a box.
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            figure = FIGURES[name](comparison, paper)
            if figure is None:
                return False
            # No time and no version in the file: the same runs give the same bytes.
            figure.savefig(folder / f"{name}{paper.end}.png", dpi=DPI, metadata={"Software": None})
    return True


def _page(comparison: Comparison, drawn: Sequence[str], title: str, folders: Sequence[Path], out: Path) -> str:
    rows = comparison.rows
    runs = sum(len(row.runs) for row in rows)
    used = list(folders) or list(dict.fromkeys(r.folder.parent for r in comparison.records if r.folder is not None))
    words = ["debias", "report", *map(str, used), "--select", comparison.rule.name, "--out", str(out)]
    lines = [
        f"# {markdown(title)}",
        "",
        f"{len(rows)} methods on the recipe {markdown_code(comparison.recipe)}:"
        f" {', '.join(markdown(label(row.method)) for row in rows)}."
        f" {len(comparison.records)} runs were made, and {runs} of them are in the table.",
        "",
        *(["**ORACLE: checkpoints and settings were chosen by test data.**", ""] if comparison.rule.oracle else []),
        make_markdown(comparison),
        markdown(caption(comparison)),
        "",
        "Every number is in `table.csv`, one row a method, and in `runs.csv`, one row a run.",
        "",
    ]
    for name in drawn:
        lines += [
            "<picture>",
            f'  <source media="(prefers-color-scheme: dark)" srcset="{name}{DARK.end}.png">',
            f'  <img alt="{ALTERNATIVES[name]}" src="{name}.png" width="720">',
            "</picture>",
            "",
        ]
    lines += ["## Settings", "", "| method | setting | chosen from | score |", "|---|---|---:|---:|"]
    for row in rows:
        score = f"{row.score.mean:.4g}" if row.score.n else "-"
        method, setting = markdown(label(row.method)), markdown(setting_text(row.params))
        lines.append(f"| {method} | {setting} | {row.settings} | {score} |")
    lines += ["", "## Notes", "", *(f"- {markdown(note)}" for note in comparison.notes), ""]
    lines += _audit(comparison, out)
    lines += ["## Rebuild", "", fenced(shlex.join(words)), ""]
    return "\n".join(lines)


def _audit(comparison: Comparison, out: Path) -> list[str]:
    """How to audit the best method, against ERM with the same seed; a link to the page once it is there."""
    sign = 1 if comparison.direction == "max" else -1
    rows = {row.method: row for row in comparison.rows if row.worst.n and all(run.record.folder for run in row.runs)}
    if not rows:
        return []
    best = max(rows.values(), key=lambda row: sign * row.worst.mean)
    plain_runs = {run.seed: run for run in rows["erm"].runs} if "erm" in rows and best.method != "erm" else {}
    run = next((run for run in best.runs if run.seed in plain_runs), best.runs[0])
    runs = [plain_runs[run.seed], run] if run.seed in plain_runs else [run]
    folders = [run.record.folder or out for run in runs]
    # The model of all runs is one, and so are the test data.
    words = ["debias", "audit", "--config", str(folders[0] / "config.yaml")]
    words += ["--compare" if len(runs) > 1 else "--ckpt_path"]
    words += [
        str(folder / r.record.candidates[r.candidate].checkpoint) for folder, r in zip(folders, runs, strict=True)
    ]
    what = markdown_code(best.method) + (" against `erm`" if len(runs) > 1 else "")
    lines = ["## Audit", "", f"Whom it helps, whom it hurts, and why: {what}, seed {run.seed}.", ""]
    lines += [fenced(shlex.join([*words, "--out", str(out / "audit")])), ""]
    return [*lines, "[The page](audit/audit.html)", ""] if (out / "audit" / "audit.html").is_file() else lines
