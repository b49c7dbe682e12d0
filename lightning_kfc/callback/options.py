"""The callback's options: signature, documentation, checks and copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from lightning_kfc.callback.former_options import FormerOptions
from lightning_kfc.losses.likelihoods import Bernoulli, Categorical, Gaussian
from lightning_kfc.reporting.options import Logging
from lightning_kfc.scheduling.refresh_schedule import ExponentialSchedule, LinearSchedule
from lightning_kfc.settings import Precision, RefreshTiming, Settings, refuse_former, setting_names, settings_of
from lightning_kfc.utilities.checks import check_flag, check_fraction, check_instance, plain_number

DEFAULT_LOGGING = Logging()
#: How the names of callbacks' states begin in a checkpoint.
STATE_KEY = "KFCCallback"


class KFCOptions:
    r"""Preconditions gradients with KFC (Grosse & Martens 2016), whatever the module and its optimizer.

    Add it to ``Trainer(callbacks=[KFCCallback()])``. The module keeps its own optimizer;
    ``SGD(lr=0.5, momentum=0.5)`` is a good start. With several optimizers, each step
    preconditions the parameters of its own optimizer; their losses go through ``self.manual_backward(loss)``.

    Lightning's learning-rate finder and batch-size scaler run without other callbacks: they find the
    learning rate of the optimizer alone, and the largest batch that fits without the memory of the factors.

    A copied or unpickled callback has the settings, and no state of a training.

    Args:
        damping: Added to the curvature before it is inverted: larger is closer to plain SGD, smaller closer
            to the full natural gradient. "auto": a share of the loss, in units of each
            layer's weights. Else a number, or a schedule over optimizer steps.
        fisher: The targets of the curvature. "mc": sampled from the model; "exact": all
            possible targets, with one back-propagation each; "empirical": the targets of the data.
        likelihood: The likelihood whose negative logarithm is the loss. "auto" recognises it by the loss functions
            called in `training_step`; without a recognised one, the curvature comes from the loss's own gradient. A
            likelihood object with `output_of` names the module whose output is the logits, for other losses.
        factor_every_n_steps: Optimizer steps between curvature statistics. "auto": chosen soon after
            the warm-up from measured times, to keep to `timing.max_overhead`.
        inverse_every_n_steps: Optimizer steps between refreshes of inverses, or "auto".
        warmup_steps: The number of first optimizer steps that all take statistics.
        ema_decay: Decay of the running averages of the statistics, at least 0 and below 1.
        kl_clip: Bound on the size of a step, measured as the change of the model's predictions. "auto": set
            from the ratio of actual to expected decrease of the loss; null for no bound.
        inverse: The inverse of the damped curvature. "cholesky": damping split over both factors, the cheapest;
            "eigh": damping applied exactly; "ekfac": also with the second moments of single examples' gradients.
        rule: The update from gradients and inverses. "natural": the paper's. "adam": Adam in the eigenbasis of the
            curvature, with the same optimizer. "auto": "adam" for models with attention, unless they are wide, else
            "natural".
        weight_sharing: "expand": each use of a weight is one row; "reduce": all uses by an example are one row.
        max_factor_dim: A layer's factor with more dimensions than this is kept as its diagonal; null for no bound.
        rows_per_dim: The largest number of rows (locations of images, positions of sequences) for each dimension of
            a layer's input factor; beyond it a sample of the rows is used. Null for all rows.
        include: Glob patterns over module names, such as "encoder.*": only these modules are preconditioned.
        exclude: Glob patterns over module names that are not preconditioned.
        seed: Seed of the sampled targets. The global random stream is never touched.
        placement: The ranks that hold a layer's factors and inverse. "comm-opt": all ranks; "mem-opt": one rank, which
            sends the preconditioned gradient at every step; a number: this fraction of the ranks; "auto": "mem-opt"
            for sharded parameters, else "comm-opt".
        timing: The dates of inverses within their period, and the bound on the overhead.
        precision: The precision of inverses.
        average_weights: Decay of an exponential average of the weights over optimizer steps, at least 0 and below 1;
            null for none. Validation and checkpoints use the averaged weights, and so does the module after fitting.
        save_factors: Whether checkpoints hold the factors and inverses. Without them checkpoints are small, and a
            resumed run repeats the warm-up.
        logging: The numbers and pictures for loggers, the progress bar and the report.
        **removed: Settings of earlier versions; each raises an error that names its replacement, in YAML, too.

    Raises:
        TypeError: If a setting is of the wrong type, or there is no such setting.
        ValueError: If a setting is out of range.
    """

    def __init__(
        self,
        damping: float | Literal["auto"] | ExponentialSchedule | LinearSchedule = "auto",
        fisher: Literal["mc", "exact", "empirical"] = "mc",
        likelihood: Literal["auto", "categorical", "bernoulli", "gaussian"]
        | Categorical
        | Bernoulli
        | Gaussian = "auto",
        factor_every_n_steps: int | Literal["auto"] = 10,
        inverse_every_n_steps: int | Literal["auto"] = 20,
        warmup_steps: int = 10,
        ema_decay: float = 0.8,
        kl_clip: float | Literal["auto"] | None = "auto",
        inverse: Literal["cholesky", "eigh", "ekfac"] = "cholesky",
        rule: Literal["auto", "natural", "adam"] = "auto",
        weight_sharing: Literal["expand", "reduce"] = "expand",
        max_factor_dim: int | None = 10_000,
        rows_per_dim: int | None = 8,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        placement: Literal["auto", "comm-opt", "mem-opt"] | float = "auto",
        timing: RefreshTiming = Settings.timing,
        precision: Precision = Settings.precision,
        average_weights: float | None = 0.9,
        save_factors: bool = True,
        logging: Logging = DEFAULT_LOGGING,
        **removed: Unpack[FormerOptions],
    ) -> None:
        given = dict(locals())
        super().__init__()
        refuse_former("KFCCallback", removed, [*setting_names(), "average_weights", "save_factors", "logging"])
        self._settings = settings_of("KFCCallback", None, {name: given[name] for name in setting_names()})
        if average_weights is not None:
            check_fraction("average_weights", average_weights, otherwise=", or None for no average")
        self._average_weights: float | None = plain_number(average_weights)
        check_flag("save_factors", save_factors)
        self._save_factors = save_factors
        check_instance("logging", logging, Logging)
        #: What is logged and drawn.
        self.logging = logging

    def __getstate__(self) -> dict[str, Any]:
        """The options alone, without the model and the objects attached to it."""
        return {
            "settings": self._settings,
            "average_weights": self._average_weights,
            "save_factors": self._save_factors,
            "logging": self.logging,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._settings = state["settings"]
        self._average_weights = state["average_weights"]
        self._save_factors = state["save_factors"]
        self.logging = state["logging"]

    @property
    def average_weights(self) -> float | None:
        """The decay of the average of the weights; None for no average."""
        return self._average_weights

    @property
    def state_key(self) -> str:
        """The name of this callback's state in checkpoints; two callbacks of one trainer differ in ``include``."""
        include = self._settings.include
        return STATE_KEY if include is None else f"{STATE_KEY}{{include={list(include)!r}}}"
