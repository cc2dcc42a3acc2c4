"""Links of built pages, checked without a network."""

import importlib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_links_that_lead_nowhere_are_found(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    dead_links = importlib.import_module("check_links").dead_links
    (tmp_path / "below").mkdir()
    (tmp_path / "style.css").touch()
    (tmp_path / "a.html").write_text(
        '<link href="style.css?v=1"><h1 id="here">A</h1><a href="#here">1</a><a href="below/b.html#there">2</a>'
        '<a href="https://example.org/nowhere">elsewhere</a><a href="#gone">3</a><img src="gone.png">'
    )
    below = '<a id="there" href="../a.html#here">4</a><a href="../a.html#there">5</a>'
    (tmp_path / "below" / "b.html").write_text(below)
    assert sorted(dead_links(tmp_path)) == ["a.html: #gone", "a.html: gone.png", "below/b.html: ../a.html#there"]
