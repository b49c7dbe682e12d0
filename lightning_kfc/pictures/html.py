"""The report of a training as one HTML file, without references to other files."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from lightning_kfc.pictures.canvas import svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 62rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
pre { overflow-x: auto; background: #f6f6f6; padding: .8rem; font-size: .85rem; line-height: 1.35; }
table { border-collapse: collapse; } td, th { text-align: left; padding: .15rem 1.2rem .15rem 0; vertical-align: top; }
td { overflow-wrap: anywhere; }
th { font-weight: 600; } figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; height: auto; }
p { max-width: 46rem; } code { font-size: .9em; }
img { background: #fff; border-radius: 4px; }
@media (prefers-color-scheme: dark) { body { color: #e4e4e4; background: #181818; } pre { background: #262626; }
  h2 { border-color: #555; } a { color: #8ab4f8; } }
@media (max-width: 40rem) { .wide img { max-width: none; width: 44rem; } pre { font-size: .7rem; } }
"""


#: Wider figures, in inches, scroll on a phone instead of shrinking.
_WIDE = 6.0


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        title: Its heading.
        text: The explanation, in plain text.
        body: Its content as HTML; empty for none.
    """

    title: str
    text: str
    body: str = ""


def as_table(rows: Mapping[str, object]) -> str:
    """A table of names and values, as HTML."""
    lines = [f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows.items()]
    return f"<table>{''.join(lines)}</table>"


def as_list(sentences: Sequence[str]) -> str:
    """Sentences as an HTML list."""
    return f"<ul>{''.join(f'<li>{escape(sentence)}</li>' for sentence in sentences)}</ul>"


def as_text(text: str) -> str:
    """Text in a fixed pitch, as HTML."""
    return f"<pre>{escape(text)}</pre>"


def as_image(figure: Figure, alternative: str) -> str:
    """A figure as an HTML image, in which identifiers cannot collide with those of other figures.

    Args:
        figure: The figure.
        alternative: The alternative text.
    """
    data = base64.b64encode(svg(figure).encode()).decode()
    kind = ' class="wide"' if figure.get_figwidth() > _WIDE else ""
    return f'<figure{kind}><img alt="{escape(alternative)}" src="data:image/svg+xml;base64,{data}"></figure>'


def render(title: str, sections: Sequence[Section]) -> str:
    """The whole document.

    Args:
        title: Its title.
        sections: Its parts, in order.
    """
    parts = [
        f"<section><h2>{escape(s.title)}</h2>{f'<p>{escape(s.text)}</p>' if s.text else ''}{s.body}</section>"
        for s in sections
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    body = f"<h1>{escape(title)}</h1>\n" + "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n'
