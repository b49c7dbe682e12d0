"""The settings of :class:`~lightning_kfc.KFC`, checked when they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypedDict

from lightning_kfc.distributed.factor_reduction import PRECISIONS
from lightning_kfc.distributed.placement import check_placement
from lightning_kfc.factors.inverses import INVERSES
from lightning_kfc.losses.likelihoods import LIKELIHOODS, Likelihood
from lightning_kfc.scheduling.refresh_schedule import RefreshSchedule
from lightning_kfc.utilities.checks import (
    check_choice,
    check_flag,
    check_fraction,
    check_instance,
    check_integer,
    check_patterns,
    check_period,
    check_positive,
    check_positive_or_auto,
    plain_number,
)

FISHERS = ("mc", "exact", "empirical")
RULE_NAMES = ("natural", "adam", "auto")
#: Steps of a warm-up from which periods can be chosen: after the first one, some that take statistics and inverses.
LEAST_WARMUP = 4
WEIGHT_SHARINGS = ("expand", "reduce")
#: Settings of earlier versions: what became of each.
FORMER = {
    "background_inverses": "background_inverses was removed: inverses are made at the step that is due. Leave it out.",
    "factor_examples": "factor_examples was removed: statistics come from whole batches. Leave it out.",
    "factor_storage": "factor_storage was removed: factors stay as they are on their layer's device. Leave it out.",
    "inverse_tolerance": "inverse_tolerance was removed: every inverse that is due is refreshed. Leave it out.",
    "stagger_inverses": "stagger_inverses is now timing=RefreshTiming(stagger_inverses=...).",
    "max_overhead": "max_overhead is now timing=RefreshTiming(max_overhead=...).",
    "inverse_precision": "inverse_precision is now precision=Precision(inverses=...).",
    "reduce_precision": "reduce_precision is now precision=Precision(reduction=...).",
    "log_layers": "log_layers is now logging=Logging(layers=...) of KFCCallback.",
    "progress_bar": "progress_bar is now logging=Logging(progress_bar=...) of KFCCallback.",
    "pictures_every_n_steps": (
        "pictures_every_n_steps is now logging=Logging(pictures_every_n_steps=...) of KFCCallback."
    ),
    "report_dir": "report_dir is now logging=Logging(report_dir=...) of KFCCallback.",
}


def refuse_former(owner: str, names: Iterable[str]) -> None:
    """Refuse names that are no settings.

    Args:
        owner: The class that was given them.
        names: The names.

    Raises:
        TypeError: If there is any; for a setting of an earlier version the message names the way out.
    """
    for name in names:
        raise TypeError(FORMER.get(name, f"{owner} has no setting {name!r}."))


@dataclass(frozen=True)
class RefreshTiming:
    """When inverses are refreshed within their period, and how much longer steps may take.

    Args:
        stagger_inverses: Whether, after the warm-up, layers refresh their inverses at different steps of the period, so
            that no step takes as long as all of them together.
        max_overhead: By which share a step may take longer in the mean, where a period is "auto".

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of range.
    """

    stagger_inverses: bool = True
    max_overhead: float = 0.15

    def __post_init__(self) -> None:
        """Check the options."""
        check_flag("timing.stagger_inverses", self.stagger_inverses)
        check_positive("timing.max_overhead", self.max_overhead)


@dataclass(frozen=True)
class Precision:
    """The precision of inverses, and of what ranks send to each other. Factorisations are in float32 or better.

    Args:
        inverses: Of inverses, and of the products that each step makes with them: "full", or "bfloat16" (with inverse
            "cholesky") at half the memory, and faster where the hardware has it.
        reduction: How statistics travel between ranks. "full": as they are; "bfloat16": at half the bytes, each rank's
            numbers rounded, their sum made in float32.

    Raises:
        ValueError: If a value is none of these.
    """

    inverses: Literal["full", "bfloat16"] = "full"
    reduction: Literal["full", "bfloat16"] = "full"

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("precision.inverses", self.inverses, PRECISIONS)
        check_choice("precision.reduction", self.reduction, PRECISIONS)


class Options(TypedDict, total=False):
    """The settings as keyword arguments, for type checkers; :class:`Settings` has their defaults and checks."""

    damping: float | Callable[[int], float] | Literal["auto"]
    fisher: str
    likelihood: str | Likelihood
    factor_every_n_steps: int | Literal["auto"]
    inverse_every_n_steps: int | Literal["auto"]
    warmup_steps: int
    ema_decay: float
    kl_clip: float | Literal["auto"] | None
    inverse: str
    rule: str
    weight_sharing: str
    max_factor_dim: int | None
    rows_per_dim: int | None
    include: Sequence[str] | None
    exclude: Sequence[str] | None
    seed: int
    placement: str | float
    timing: RefreshTiming
    precision: Precision


#: Defaults of a training through Lightning, where they are not the engine's own.
CALLBACK_DEFAULTS: Mapping[str, Any] = {"damping": "auto", "kl_clip": "auto", "rule": "auto"}


@dataclass(frozen=True)
class Settings:
    r"""All options of :class:`~lightning_kfc.KFC`; E4 to E7 are equations of Grosse & Martens 2016, arXiv:1602.01407.

    Args:
        damping: :math:`\lambda` of E4, in the units of the Fisher matrix of the loss; a number, or a function of
            the step such as :class:`~lightning_kfc.ExponentialSchedule`; ``"auto"`` is a share of the
            loss, in units of each layer's weights (:mod:`lightning_kfc.trust_region.region`).
        fisher: Whose targets the curvature is taken with: ``"mc"``: one sample a term from the model's own
            distribution; ``"exact"``: all its outcomes, one back-propagation each; ``"empirical"``: the data's.
        likelihood: What the loss is the negative logarithm of. ``"auto"`` recognises it from the loss
            functions that are called, and takes the empirical Fisher of a loss of which it recognises nothing;
            ``"categorical"``, ``"bernoulli"`` and ``"gaussian"`` keep only terms of that kind; a
            :class:`~lightning_kfc.losses.likelihoods.Likelihood` with ``output_of`` names the module whose output is
            the logits, for losses computed otherwise.
        factor_every_n_steps: Statistics are taken every so many optimizer steps (the paper's T_cov). ``"auto"``: chosen
            soon after the warm-up, by the time that the parts of a step have taken, to keep to ``timing.max_overhead``.
        inverse_every_n_steps: Inverses are refreshed every so many optimizer steps (the paper's T_inv), or ``"auto"``.
        warmup_steps: During the first so many optimizer steps statistics are taken at every step.
        ema_decay: :math:`\rho`, the decay of the factors' zero-debiased running averages, at least 0, below 1.
        kl_clip: :math:`\kappa` of E7, the bound on the squared norm of a step in the Fisher metric; ``"auto"`` sets
            itself by :meth:`~lightning_kfc.KFC.review`; None for none.
        inverse: How damped factors are inverted: ``"cholesky"`` (E4, E5: damping split over both factors);
            ``"eigh"`` (E6: exact damping, that of the present step); ``"ekfac"``: E6 with the running second moments of
            the examples' gradients as eigenvalues (George et al. 2018). That one keeps what the layers read, and the
            derivatives at their outputs, through the backward of the steps that refresh inverses.
        rule: How gradients and inverses make an update: ``"natural"``, the paper's KFC-pre; ``"adam"``: Adam in the
            eigenbasis of the factors (:mod:`lightning_kfc.rules.adam`), which takes the momentum of SGD out of its
            steps, implies ``inverse="eigh"``, and in which ``damping`` has no part; ``"auto"``, with
            ``damping="auto"``: ``"adam"`` for models with attention and no wide factors
            (:mod:`lightning_kfc.rules.choice`), else ``"natural"``.
        weight_sharing: ``"expand"``: each use of a weight is a row; ``"reduce"``: each example is one.
        max_factor_dim: A factor of more dimensions is held as its diagonal, which
            :meth:`~lightning_kfc.KFC.coverage` shows; None for no bound. The default admits every layer of the
            usual convolutional nets and transformers (d_in 4,609 in a ResNet-50, 9,217 in the widest ResNets), and no
            vocabulary; a factor with its inverse takes 0.8 GB there.
        rows_per_dim: A is estimated from a part of a batch's rows, at least so many times its dimensions, where there
            are more: every k-th example gives every k-th of its positions, k at most 16. None for all rows.
        include: Glob patterns over module names; only these are preconditioned. None for all.
        exclude: Glob patterns over module names that are not preconditioned.
        seed: Seed of the sampling of targets; the global random stream is never touched.
        placement: Which of several ranks hold a layer's factors and inverse: ``"comm-opt"``: all do, so that only
            refreshes communicate; ``"mem-opt"``: one rank does, and sends the preconditioned gradient at every step; a
            fraction of the ranks between both (KAISA, Pauloski et al. 2021); ``"auto"``: ``"mem-opt"`` where
            parameters are sharded, else ``"comm-opt"``.
        timing: When inverses are refreshed within their period, and how much longer steps may take.
        precision: The precision of inverses, and of what ranks send to each other.

    Raises:
        TypeError: If an option is of the wrong type.
        ValueError: If an option is out of range, or two of them exclude each other.
    """

    damping: float | Callable[[int], float] | Literal["auto"] = 0.01
    fisher: str = "mc"
    likelihood: str | Likelihood = "auto"
    factor_every_n_steps: int | Literal["auto"] = 10
    inverse_every_n_steps: int | Literal["auto"] = 20
    warmup_steps: int = 10
    ema_decay: float = 0.8
    kl_clip: float | Literal["auto"] | None = 0.03
    inverse: str = "cholesky"
    rule: str = "natural"
    weight_sharing: str = "expand"
    max_factor_dim: int | None = 10_000
    rows_per_dim: int | None = 8
    include: Sequence[str] | None = None
    exclude: Sequence[str] | None = None
    seed: int = 0
    placement: str | float = "auto"
    timing: RefreshTiming = RefreshTiming()
    precision: Precision = Precision()
    #: Until periods that are "auto" are chosen, those of the defaults.
    schedule: RefreshSchedule = field(init=False)

    def __new__(cls, *args: Any, **options: Any) -> Settings:
        """Refuse settings of earlier versions with the way out."""
        refuse_former("Settings", set(options) - setting_names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every setting."""
        for entry in fields(self):
            if entry.init:
                object.__setattr__(self, entry.name, plain_number(getattr(self, entry.name)))
        if not callable(self.damping):
            check_positive_or_auto("damping", self.damping)
        check_choice("fisher", self.fisher, FISHERS)
        if not isinstance(self.likelihood, Likelihood):
            check_choice("likelihood", self.likelihood, ("auto", *LIKELIHOODS))
        check_fraction("ema_decay", self.ema_decay)
        if self.kl_clip is not None:
            check_positive_or_auto("kl_clip", self.kl_clip)
        check_choice("inverse", self.inverse, INVERSES)
        check_choice("rule", self.rule, RULE_NAMES)
        if self.rule == "adam":
            if self.inverse == "ekfac":
                raise ValueError(
                    "rule='adam' keeps second moments of its own in the eigenbasis that inverse='eigh' has, and cannot "
                    "use those of inverse='ekfac'. Leave `inverse` out, or choose rule='natural'."
                )
            if self.placement not in ("auto", "comm-opt", 1):
                raise ValueError(
                    f"placement={self.placement!r} leaves ranks without the eigenbases in which rule='adam' keeps its "
                    "moments. Use placement='comm-opt', or rule='natural'."
                )
            # The defaults are for the other rule.
            object.__setattr__(self, "inverse", "eigh")
            object.__setattr__(self, "placement", "comm-opt")
        check_choice("weight_sharing", self.weight_sharing, WEIGHT_SHARINGS)
        for name in ("max_factor_dim", "rows_per_dim"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        check_integer("seed", self.seed, minimum=0)
        check_placement(self.placement, self.inverse)
        check_instance("timing", self.timing, RefreshTiming)
        check_instance("precision", self.precision, Precision)
        if self.precision.inverses != "full" and self.inverse != "cholesky":
            raise ValueError(
                f"precision.inverses={self.precision.inverses!r} rounds too much of an eigenbasis, which inverse="
                f"{self.inverse!r} keeps. Use inverse='cholesky', or leave precision.inverses out."
            )
        object.__setattr__(self, "include", check_patterns("include", self.include))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))
        object.__setattr__(self, "schedule", self._first_schedule())

    @property
    def automatic_periods(self) -> bool:
        """Whether a period is chosen by what the first steps cost."""
        return "auto" in (self.factor_every_n_steps, self.inverse_every_n_steps)

    def _first_schedule(self) -> RefreshSchedule:
        periods = {}
        for name in ("factor_every_n_steps", "inverse_every_n_steps"):
            value = getattr(self, name)
            check_period(name, value)
            if value != "auto":
                periods[name] = value
        schedule = RefreshSchedule(**periods, warmup_steps=self.warmup_steps)
        if self.automatic_periods and self.warmup_steps < LEAST_WARMUP:
            raise ValueError(
                "periods that are 'auto' are chosen by the times of the warm-up, which must have at least "
                f"{LEAST_WARMUP} steps, got warmup_steps={self.warmup_steps}. Give numbers, or a longer warm-up."
            )
        return schedule


def settings_of(owner: str, settings: Settings | None, options: Mapping[str, Any]) -> Settings:
    """Return settings with some of them replaced, checked together.

    Args:
        owner: The class that was given the options.
        settings: The settings to begin with; None for the defaults.
        options: The replacements, by name.

    Raises:
        TypeError: If there is no such setting, or it is of the wrong type.
        ValueError: If a setting is out of range.
    """
    refuse_former(owner, set(options) - setting_names())
    return replace(settings or Settings(), **options)


def setting_names() -> set[str]:
    """The names of all settings."""
    return {entry.name for entry in fields(Settings) if entry.init}
