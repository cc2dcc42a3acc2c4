"""Formulas as MathML, which browsers draw themselves: a page needs no network and no script to be read."""

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml


def mathml(text, block):
    """One formula; an error of docutils where it does not know a command."""
    # An accent sits on top of its letter where the browser has no font for maths; a line is drawn above it.
    return tex2mathml(text.strip().replace(r"\bar", r"\overline"), as_block=block)


def _inline(translator, node):
    translator.body.append(mathml(node.astext(), block=False))
    raise SkipNode


def _block(translator, node):
    translator.body.append(f'<div class="formula">{mathml(node.astext(), block=True)}</div>')
    raise SkipNode


def setup(app):
    """Register the renderer under the name `mathml`."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
