"""The list of methods on the API page, made from those that are registered."""

import inspect

import debias.methods

MARK = ".. the classes of debias.methods\n"


def filled(page: str) -> str:
    """Put a directive for every class of every method where the page has the mark."""
    names = [name for name, value in vars(debias.methods).items() if inspect.isclass(value)]
    return page.replace(MARK, "\n".join(f".. autoclass:: debias.{name}\n" for name in names))


def fill(app, docname, source):
    """Do so when Sphinx reads the page."""
    source[0] = filled(source[0])
