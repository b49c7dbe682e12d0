"""Settings of the documentation; build it with ``make docs``."""

import sys
from importlib.util import find_spec
from pathlib import Path

from lightning_kfc.version import __version__

project = "lightning-kfc"
author = "The lightning-kfc authors"
copyright = author
version = release = __version__

sys.path.insert(0, str(Path(__file__).parent))
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "mathml",
    "breaks",
    "foreign_names",
]
# Without the package the pages only lack their copy buttons.
extensions += ["sphinx_copybutton"] if find_spec("sphinx_copybutton") else []
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

# Prompts and what a program prints are not copied.
copybutton_exclude = ".linenos, .gp, .go"
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"

# `make links` opens what is on other sites.
linkcheck_retries = 3
linkcheck_timeout = 30

# Every reference leads somewhere, but for the types of what the engine hands from one part to the next.
nitpicky = True
nitpick_ignore = [
    ("py:class", "lightning_kfc.trust_region.recording.Slot"),
    ("py:class", "lightning_kfc.trust_region.recording.Recording"),
    ("py:class", "lightning_kfc.factors.statistics.Statistics"),
    ("py:class", "lightning_kfc.factors.statistics.InputStatistic"),
    ("py:class", "lightning_kfc.factors.inverses.base.Inverse"),
    ("py:class", "AdapterOptions"),
    ("py:class", "FormerOptions"),
    ("py:class", "LayerOwnership"),
    ("py:class", "Options"),
    ("py:class", "Spectra"),
    ("py:class", "Stages"),
    ("py:class", "lightning_kfc.curvature.model_layers.ModelLayers"),
    ("py:class", "lightning_kfc.scheduling.refresh_schedule.RefreshSchedule"),
    ("py:class", "torch.utils.hooks.RemovableHandle"),
]
