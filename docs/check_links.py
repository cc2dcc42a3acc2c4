"""Check the built pages without a network: every link within them leads to a file, and to a place in it.

python docs/check_links.py <folder of the pages>
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """Links and the places that links can lead to."""

    def __init__(self, file):
        super().__init__()
        self.links, self.places = [], set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        """Note what a tag refers to, and what it is called."""
        given = dict(attrs)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name)]


def dead_links(folder):
    """Links of the pages below a folder that lead nowhere, as ``page: link``."""
    pages = {file.resolve(): Page(file) for file in Path(folder).rglob("*.html")}
    found = []
    for file, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or file.name == "search.html":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            place = unquote(parts.fragment)
            known = pages.get(target)
            if not target.exists() or (place and known is not None and place not in known.places):
                found.append(f"{file.relative_to(Path(folder).resolve())}: {link}")
    return found


if __name__ == "__main__":
    dead = dead_links(sys.argv[1])
    print("\n".join(dead))
    sys.exit(f"error: {len(dead)} links lead nowhere" if dead else 0)
