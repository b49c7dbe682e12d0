r"""Formulas as MathML, which browsers draw by themselves: the pages need no script and no network.

Sphinx's own renderer loads MathJax from another host, and an image of each formula would neither scale nor be read out.
This one converts at build time (latex2mathml). ``\tag{E1}`` becomes a number at the right margin. A command that the
converter lacks fails the build, since the browser would show its name.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

_TAG = re.compile(r"\s*\\tag\{([^}]*)\}")

#: What the converter leaves to the browser, and browsers do other than TeX: bars that grow and keep their distance, and
#: names of functions that stand too far from, or too close to, what is around them.
_SPACING = (
    (re.compile(r"<mo[^>]*>(&#x0007C;|&#x02016;)</mo>"), r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>'),
    (re.compile(r"<mo>(tr|diag)</mo>"), r'<mo lspace="0.1em" rspace="0.1em">\1</mo>'),
    (re.compile(r"(<mi>(?:log|dim)</mi>)(?=<m[is])"), r'\1<mspace width="0.17em"/>'),
)


def to_mathml(latex: str, display: str) -> str:
    """One formula.

    Args:
        latex: The formula, without delimiters or tag.
        display: ``"inline"`` or ``"block"``.

    Raises:
        ValueError: If a command is not known to the converter, or a letter would lose its style.
    """
    mathml = convert(latex, display=display)
    unknown = re.findall(r"<m[io]>(\\\w+)", mathml)
    if unknown:
        raise ValueError(f"MathML has no counterpart of {', '.join(unknown)} in {latex!r}: write it in another way.")
    if re.search(r'mathvariant="(?!normal)', mathml):
        raise ValueError(f"A letter of {latex!r} would lose its style: write \\mathbb{{E}}, with braces.")
    for pattern, spaced in _SPACING:
        mathml = pattern.sub(spaced, mathml)
    return mathml


def _inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(f'<span class="math">{to_mathml(node.astext(), "inline")}</span>')
    raise nodes.SkipNode


def _block(self: HTML5Translator, node: nodes.math_block) -> None:
    latex = node.astext()
    if node.get("number"):
        raise ValueError(f"Number an equation with \\tag, not with a label: {latex!r}.")
    tags = _TAG.findall(latex)
    number = "".join(f'<span class="equation-number">({tag})</span>' for tag in tags)
    anchor = f' id="{tags[0]}"' if tags else ""
    formula = to_mathml(_TAG.sub("", latex), "block")
    self.body.append(f'<div class="math"{anchor}><div class="formula">{formula}</div>{number}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer as ``html_math_renderer = "mathml"``."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))  # type: ignore[arg-type]  # None: nothing to do on departure
    return {"parallel_read_safe": True, "parallel_write_safe": True}
