"""Settings of the documentation; build it with ``make docs``."""

import sys
from pathlib import Path

from lightning_kfc.version import __version__

project = "lightning-kfc"
author = "The lightning-kfc authors"
copyright = author
version = release = __version__

sys.path.insert(0, str(Path(__file__).parent))
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "breaks"]
html_math_renderer = "mathml"
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "attrs_inline", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
# Types only where the docstring describes the argument: the others would be rows without a word.
autodoc_typehints_description_target = "documented_params"
# Attributes in the style of arguments: autodoc describes the annotated fields themselves once already.
napoleon_use_ivar = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"lightning-kfc {__version__}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sphinx = False
