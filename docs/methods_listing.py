"""The list of methods on the API page, made from those that are registered."""

import inspect

import debias.methods

MARK = ".. the classes of debias.methods\n"


def filled(page: str) -> str:
    """Put what stands at the top of each method's file, and its classes, where the page has the mark."""
    lines, modules = [], set()
    for name, value in vars(debias.methods).items():
        if inspect.isclass(value):
            if value.__module__ not in modules:
                modules.add(value.__module__)
                lines.append(f".. automodule:: {value.__module__}\n")
            lines.append(f".. autoclass:: debias.{name}\n")
    return page.replace(MARK, "\n".join(lines))


def fill(app, docname, source):
    """Do so when Sphinx reads the page."""
    source[0] = filled(source[0])
