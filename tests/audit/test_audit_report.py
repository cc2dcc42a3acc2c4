"""What is written: page, JSON, CSV and what the command prints."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from _support.planted import planted
from debias.audit import audit_predictions
from debias.audit.report import harmless
from debias.cli import main
from debias.cli.recipes import recipes_folder
from debias.errors import DebiasError

EVIL = '<script>alert("1")</script>'


@pytest.fixture(scope="module")
def report():
    frame = planted(1000, 0.5, columns=1)
    frame[EVIL] = np.where(np.arange(1000) % 3, "=cmd()", f"{EVIL}'")
    frame["target"] = np.where(frame["target"] == 1, f"{EVIL}1", "0")
    frame["prediction"] = np.where(frame["prediction"] == 1, f"{EVIL}1", "0")
    return audit_predictions(frame, title=f"Audit {EVIL}", progress=False)


class Page(HTMLParser):
    """Tags and attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "srcset", "action")]


def test_the_page_needs_no_network_and_escapes_what_comes_from_data(report, tmp_path):
    text = report.to_html(tmp_path / "new" / "page.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert page.links == []
    assert EVIL not in text
    assert "&lt;script&gt;" in text
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert re.search(r"The predictions follow place.*at the same true label", text)


def test_json_is_strict_and_whole(report, tmp_path):
    found = json.loads(report.to_json(tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found["overall"]["count"] == 1000
    assert len(found["tables"]["groups"]) == len(report.frame)
    assert found["findings"] == report.findings


def test_cells_that_a_spreadsheet_would_run_are_made_harmless(report, tmp_path):
    paths = report.save(tmp_path)
    assert set(paths) == {"audit.html", "audit.json", *(f"{name}.csv" for name in report.tables)}
    values = set(pd.read_csv(paths["groups.csv"])["value"])
    assert "'=cmd()" in values
    assert "=cmd()" not in values
    table = pd.DataFrame({"=a": ["+1", "-1", "@x", " =1", "ok", -1]})
    assert harmless(table).to_csv(index=False).splitlines() == ["'=a", "'+1", "'-1", "'@x", "' =1", "ok", "-1"]


def test_what_cannot_be_written_is_said(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DebiasError, match="Choose a folder that can be written"):
        report.save(tmp_path / "file")


def test_the_command_audits_a_table(tmp_path, capsys):
    planted(600, 0.5).to_csv(tmp_path / "p.csv", index=False)
    main(["audit", "--predictions", str(tmp_path / "p.csv"), "--out", str(tmp_path / "audit"), "--columns", "place"])
    printed = capsys.readouterr().out
    assert "- The predictions follow place" in printed
    assert printed.splitlines()[-1] == str(tmp_path / "audit" / "audit.html")
    assert (tmp_path / "audit" / "groups.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "but got none of them"), (["--predictions", "nowhere.csv"], "reading nowhere.csv failed")],
)
def test_the_command_says_what_is_wrong(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["audit", *words])
    assert stop.value.code == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["jinja2", "scipy", "pandas"])
def test_without_the_extra_one_sentence_says_so(package, tmp_path, monkeypatch, capsys):
    planted(50).to_csv(tmp_path / "p.csv", index=False)
    for name in [name for name in sys.modules if name.startswith("debias.audit.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stop:
        main(["audit", "--predictions", str(tmp_path / "p.csv"), "--out", str(tmp_path / "audit")])
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert f"the package `{package}`" in said
    assert said.endswith("Run `pip install 'lightning-debias[audit]'`.\n")
    assert said.count("\n") == 1


def test_the_room_is_called():
    import debias

    assert debias.audit is sys.modules["debias.audit"]
    assert callable(debias.audit)
    with pytest.raises(AttributeError, match="nothing"):
        debias.audit.nothing  # noqa: B018


def test_the_command_audits_a_checkpoint_of_a_recipe(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = str(recipes_folder() / "colored_digits" / "base.yaml")
    quiet = ["--trainer.max_epochs", "2", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    main(["fit", "--config", base, *quiet, "--trainer.default_root_dir", str(tmp_path)])
    checkpoint = next(tmp_path.rglob("*.ckpt"))
    set_ = ["--set", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu"]
    capsys.readouterr()
    main(["audit", "--config", base, "--ckpt_path", str(checkpoint), *set_, "--out", "audit", "--columns", "color"])
    printed = capsys.readouterr().out
    assert "The predictions follow color" in printed
    assert Page((tmp_path / "audit" / "audit.html").read_text()).links  # pictures of slices, and nothing else
    assert all(link.startswith("data:image/png;base64,") for link in Page(Path("audit/audit.html").read_text()).links)
    main(["audit", "--config", base, "--compare", str(checkpoint), str(checkpoint), *set_, "--out", "again"])
    assert "no change beyond noise" in capsys.readouterr().out
