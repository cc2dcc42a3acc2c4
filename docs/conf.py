"""Sphinx settings: warnings are errors, and the build needs no network."""

import re
import sys
import warnings
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from debias import __version__

sys.path.insert(0, str(Path(__file__).parent))
import method_pages

project = "debias"
author = copyright = "The debias authors"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_gallery.gen_gallery",
    "mathml",
]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"debias {release}"
html_static_path = ["_static"]
html_css_files = ["debias.css"]
exclude_patterns = ["_build", "notes", "examples", "sg_execution_times.rst", "gallery/sg_execution_times.rst"]

# What Lightning says of loaders and of torch is no output of an example, and begins with a folder of this machine.
warnings.filterwarnings("ignore", category=UserWarning)
warnings.filterwarnings("ignore", category=FutureWarning)

sphinx_gallery_conf = {
    "examples_dirs": "examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_signature": False,
    "abort_on_example_error": True,
}

myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def inventories(**sites):
    """Fetch the indices of other projects; links to those out of reach stay plain text instead of failing the build."""
    folder = Path(__file__).parent / "_build" / "inventories"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, site in sites.items():
        file = folder / f"{name}.inv"
        try:
            if not file.exists():
                with urlopen(f"{site}objects.inv", timeout=5) as answer:
                    content = answer.read()
                if not content.startswith(b"# Sphinx inventory"):
                    continue
                file.write_bytes(content)
        except (OSError, URLError):
            continue
        found[name] = (site, str(file))
    return found


intersphinx_mapping = inventories(
    python="https://docs.python.org/3/",
    torch="https://docs.pytorch.org/docs/stable/",
    lightning="https://lightning.ai/docs/pytorch/stable/",
    torchmetrics="https://lightning.ai/docs/torchmetrics/stable/",
)


def documented_as(app, page, template, context, doctree):
    """Lead from the source back to the names that are documented: viewcode takes the module that names them last."""
    if page.startswith("_modules/debias/") and "body" in context:
        known = app.env.domaindata["py"]["objects"]

        def lead(link):
            found = [n for n in known if n.endswith(f".{link[2]}") and link[1].endswith(f"{known[n].docname}.html")]
            return f"{link[1]}#{min(found, key=len)}" if found else link[0]

        body = re.sub(r'(?<=href=")([^"#]*)#debias\.(?:functional\.)?([\w.]+)(?=")', lead, context["body"])
        context["body"] = body


def setup(app):
    """Write the pages of the methods, and the table of them where a page asks for it."""
    method_pages.write()
    app.connect("html-page-context", documented_as)
    app.connect("source-read", lambda app, name, source: source.__setitem__(0, method_pages.filled(source[0])))
