"""Names of torch, Lightning, Python and matplotlib in the API link to their own documentation.

``sphinx.ext.intersphinx`` would load each project's whole inventory at every build; the pages need a dozen names, and a
build needs no network.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

_TORCH = "https://docs.pytorch.org/docs/stable/"
_LIGHTNING = "https://lightning.ai/docs/pytorch/stable/"
_PYTHON = "https://docs.python.org/3/library/"

#: Pages, by the name that they document.
PAGES = {
    "torch.Generator": f"{_TORCH}generated/torch.Generator.html#torch.Generator",
    "torch.Tensor": f"{_TORCH}tensors.html#torch.Tensor",
    "torch.nn.Module": f"{_TORCH}generated/torch.nn.Module.html#torch.nn.Module",
    "torch.nn.parameter.Parameter": (
        f"{_TORCH}generated/torch.nn.parameter.Parameter.html#torch.nn.parameter.Parameter"
    ),
    "torch.optim.Optimizer": f"{_TORCH}optim.html#torch.optim.Optimizer",
    "lightning.pytorch.Callback": (
        f"{_LIGHTNING}api/lightning.pytorch.callbacks.Callback.html#lightning.pytorch.callbacks.Callback"
    ),
    "lightning.pytorch.LightningModule": (
        f"{_LIGHTNING}api/lightning.pytorch.core.LightningModule.html#lightning.pytorch.core.LightningModule"
    ),
    "lightning.pytorch.Trainer": (
        f"{_LIGHTNING}api/lightning.pytorch.trainer.trainer.Trainer.html#lightning.pytorch.trainer.trainer.Trainer"
    ),
    "collections.abc.Callable": f"{_PYTHON}collections.abc.html#collections.abc.Callable",
    "collections.abc.Iterator": f"{_PYTHON}collections.abc.html#collections.abc.Iterator",
    "collections.abc.Mapping": f"{_PYTHON}collections.abc.html#collections.abc.Mapping",
    "collections.abc.Sequence": f"{_PYTHON}collections.abc.html#collections.abc.Sequence",
    "matplotlib.figure.Figure": (
        "https://matplotlib.org/stable/api/_as_gen/matplotlib.figure.Figure.html#matplotlib.figure.Figure"
    ),
}
#: Where a class was defined, or how a docstring calls it, by the name of its page.
ALIASES = {
    "torch.nn.modules.module.Module": "torch.nn.Module",
    "nn.Module": "torch.nn.Module",
    "Tensor": "torch.Tensor",
    "torch.optim.optimizer.Optimizer": "torch.optim.Optimizer",
    "Figure": "matplotlib.figure.Figure",
}


def _link(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.Node) -> nodes.reference | None:
    target = str(node.get("reftarget", ""))
    page = PAGES.get(ALIASES.get(target, target))
    if page is None:
        return None
    reference = nodes.reference("", "", internal=False, refuri=page)
    reference.append(content)
    return reference


def setup(app: Sphinx) -> dict[str, Any]:
    """Link names that no page of this documentation has."""
    app.connect("missing-reference", _link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
