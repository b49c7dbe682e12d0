"""Long names break where their parts end.

``inverse_every_n_steps`` in a narrow column would push the others out of sight, or break between any two letters.
"""

from __future__ import annotations

import re
from typing import Any

from sphinx.application import Sphinx

_NAME = re.compile(r'(?<=<span class="pre">)[^<]+')
#: After an underscore, a dot and the like, or the bracket of a long call; before a capital letter within a word.
_JOINT = re.compile(r"(?<=[_./:])(?=[^\W\d_])|(?<=\w{7}\()(?=[^\W\d_])|(?<=[a-z])(?=[A-Z])")


def with_breaks(html: str) -> str:
    """Allow a break at the joints of all names in code."""
    return _NAME.sub(lambda name: _JOINT.sub("<wbr>", name[0]), html)


def _page(app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object) -> None:
    if "body" in context:
        context["body"] = with_breaks(context["body"])


def setup(app: Sphinx) -> dict[str, Any]:
    """Treat each page when it is written."""
    app.connect("html-page-context", _page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
