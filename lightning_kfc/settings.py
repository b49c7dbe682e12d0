"""The settings of :class:`~lightning_kfc.KFC`, checked when they are given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, TypedDict

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
#: Shortest warm-up for periods that are "auto": it must contain timed steps with statistics and inverses.
LEAST_WARMUP = 4
WEIGHT_SHARINGS = ("expand", "reduce")
#: Settings of earlier versions that are in groups now: the class of the group, the group, and the name in it.
MOVED = {
    "stagger_inverses": ("RefreshTiming", "timing", "stagger_inverses"),
    "max_overhead": ("RefreshTiming", "timing", "max_overhead"),
    "inverse_precision": ("Precision", "precision", "inverses"),
    "log_layers": ("Logging", "logging", "layers"),
    "progress_bar": ("Logging", "logging", "progress_bar"),
    "pictures_every_n_steps": ("Logging", "logging", "pictures_every_n_steps"),
    "report_dir": ("Logging", "logging", "report_dir"),
}
#: Settings of earlier versions that were removed, with what is done instead.
REMOVED = {
    "background_inverses": "inverses are made at the step that is due",
    "factor_examples": "statistics come from whole batches",
    "factor_storage": "factors stay as they are on their layer's device",
    "inverse_tolerance": "every inverse that is due is refreshed",
    "reduce_precision": "statistics are sent in their own precision",
}
#: The way out for each setting of an earlier version.
FORMER = {name: f"{name} was removed: {instead}. Leave it out." for name, instead in REMOVED.items()} | {
    name: f"{name} is now {group}={kind}({option}=...){of}, in YAML {group}.{option}."
    for name, (kind, group, option) in MOVED.items()
    for of in [" of KFCCallback" if group == "logging" else ""]
}


def refuse_former(owner: str, names: Iterable[str], settings: Collection[str]) -> None:
    """Refuse names that are not settings.

    Args:
        owner: The class in the message.
        names: The names of what was given.
        settings: The settings of that class.

    Raises:
        TypeError: For the first name, with the most similar setting; for one of an earlier version with its
            replacement.
    """
    for name in set(names).difference(settings):
        if name in FORMER:
            raise TypeError(FORMER[name])
        alike = get_close_matches(name, settings, n=1)
        way_out = f"Did you mean {alike[0]!r}?" if alike else f"Its settings are: {', '.join(sorted(settings))}."
        raise TypeError(f"{owner} has no setting {name!r}. {way_out}")


@dataclass(frozen=True)
class RefreshTiming:
    """The dates of inverses within their period, later periods, and the bound on the overhead.

    Args:
        later_periods: The factor on both periods from step 100 on, unless they are "auto"; 1 for none.
        stagger_inverses: Whether layers refresh their inverses at different steps of the period after the warm-up.
        max_overhead: The largest mean overhead of a step, as a share of its time, for a period that is "auto".

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value is out of range.
    """

    later_periods: int = 5
    stagger_inverses: bool = True
    max_overhead: float = 0.15

    def __post_init__(self) -> None:
        """Check the options."""
        check_integer("timing.later_periods", self.later_periods, minimum=1)
        check_flag("timing.stagger_inverses", self.stagger_inverses)
        check_positive("timing.max_overhead", self.max_overhead)


@dataclass(frozen=True)
class Precision:
    """The precision of inverses. Factorisations are in float32 or better.

    Args:
        inverses: Of inverses and their products: "full"; or, with inverse "cholesky", "bfloat16" at half the memory.

    Raises:
        ValueError: If the value is none of these.
    """

    inverses: Literal["full", "bfloat16"] = "full"

    def __post_init__(self) -> None:
        """Check the option."""
        check_choice("precision.inverses", self.inverses, ("full", "bfloat16"))


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


#: Defaults of the callback that differ from the engine's.
CALLBACK_DEFAULTS: Mapping[str, Any] = {"damping": "auto", "kl_clip": "auto", "rule": "auto"}


@dataclass(frozen=True)
class Settings:
    r"""All options of :class:`~lightning_kfc.KFC`; E4 to E7 are equations of Grosse & Martens 2016, arXiv:1602.01407.

    Args:
        damping: :math:`\lambda` of E4, in units of the Fisher matrix of the loss: a number; a function of the step; or
            ``"auto"``, a share of the loss in units of each layer's weights (``lightning_kfc.trust_region.region``).
        fisher: The targets of the curvature: ``"mc"``: one sample per term from the model's distribution; ``"exact"``:
            all outcomes, with one back-propagation each; ``"empirical"``: the targets of the data.
        likelihood: The likelihood whose negative logarithm is the loss. ``"auto"`` recognises it from the called loss
            functions, and uses the empirical Fisher of a loss without a recognised term; ``"categorical"``,
            ``"bernoulli"`` and ``"gaussian"`` keep only terms of this kind; for other losses, an instance of
            :class:`~lightning_kfc.losses.likelihoods.Likelihood` names the module of the logits (``output_of``).
        factor_every_n_steps: Optimizer steps between statistics (the paper's T_cov). ``"auto"``: chosen soon after the
            warm-up from measured times, within ``timing.max_overhead``.
        inverse_every_n_steps: Optimizer steps between refreshes of inverses (the paper's T_inv), or ``"auto"``.
        warmup_steps: The number of first optimizer steps that all take statistics.
        ema_decay: :math:`\rho`, the decay of the factors' zero-debiased running averages, at least 0, below 1.
        kl_clip: :math:`\kappa` of E7, the bound on the squared norm of a step in the Fisher metric; ``"auto"`` is set
            by :meth:`~lightning_kfc.KFC.review`; None for no bound.
        inverse: The inverse of damped factors: ``"cholesky"`` (E4, E5: damping split over both factors);
            ``"eigh"`` (E6: exact damping of the present step); ``"ekfac"``: E6 with the running second moments of the
            examples' gradients as eigenvalues (George et al. 2018), which keeps the layers' inputs and output
            derivatives through the backward of steps that refresh inverses.
        rule: The update from gradients and inverses: ``"natural"``, the paper's KFC-pre; ``"adam"``: Adam in the
            eigenbasis of the factors (``lightning_kfc.rules.adam``), without SGD's momentum and ``damping``, and with
            ``inverse="eigh"``; ``"auto"``, with ``damping="auto"``: ``"adam"`` for models with attention and no wide
            factors (``lightning_kfc.rules.choice``), else ``"natural"``.
        weight_sharing: ``"expand"``: each use of a weight is a row; ``"reduce"``: each example is a row.
        max_factor_dim: A factor of more dimensions is held as its diagonal; None for no bound. The default admits the
            widest ResNets (d_in 9,217), but no vocabulary; there a factor with its inverse takes 0.8 GB.
        rows_per_dim: The used rows of a batch for each dimension of A; of more rows, a sample is used. None for all.
        include: Glob patterns over module names; only these are preconditioned. None for all.
        exclude: Glob patterns over module names that are not preconditioned.
        seed: Seed of the sampling of targets; the global random stream is never touched.
        placement: The ranks that hold a layer's factors and inverse: ``"comm-opt"``: all, so that only refreshes
            communicate; ``"mem-opt"``: one, which sends the preconditioned gradient at every step; a number: this share
            (KAISA, Pauloski et al. 2021); ``"auto"``: ``"mem-opt"`` for sharded parameters, else ``"comm-opt"``.
        timing: The dates of inverses within their period, and the bound on the overhead.
        precision: The precision of inverses.

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
    #: The periods; the defaults until "auto" ones are chosen.
    schedule: RefreshSchedule = field(init=False)

    def __new__(cls, *args: Any, **options: Any) -> Settings:
        """Refuse settings of earlier versions with the way out."""
        refuse_former("Settings", options, setting_names())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Check every setting."""
        for name in setting_names():
            object.__setattr__(self, name, plain_number(getattr(self, name)))
        if not callable(self.damping):
            check_positive_or_auto("damping", self.damping)
        check_choice("fisher", self.fisher, FISHERS)
        if isinstance(self.likelihood, type) and issubclass(self.likelihood, Likelihood):
            name = self.likelihood.__name__
            raise TypeError(f"likelihood must be an instance, such as {name}(output_of='head'), got the class {name}.")
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
                    "rule='adam' does not work with inverse='ekfac': both keep second moments in the eigenbasis. "
                    "Leave `inverse` out, or choose rule='natural'."
                )
            if self.placement not in ("auto", "comm-opt", 1):
                raise ValueError(
                    f"rule='adam' needs the eigenbases of all layers on all ranks, and placement={self.placement!r} "
                    "does not keep them there. Use placement='comm-opt', or rule='natural'."
                )
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
                f"precision.inverses={self.precision.inverses!r} is too coarse for the eigenbasis of inverse="
                f"{self.inverse!r}. Use inverse='cholesky', or leave precision.inverses out."
            )
        object.__setattr__(self, "include", check_patterns("include", self.include))
        object.__setattr__(self, "exclude", check_patterns("exclude", self.exclude))
        object.__setattr__(self, "schedule", self._first_schedule())

    @property
    def automatic_periods(self) -> bool:
        """Whether a period is chosen by the costs of the first steps."""
        return "auto" in (self.factor_every_n_steps, self.inverse_every_n_steps)

    def _first_schedule(self) -> RefreshSchedule:
        periods = {name: getattr(self, name) for name in ("factor_every_n_steps", "inverse_every_n_steps")}
        for name, value in periods.items():
            check_period(name, value)
        chosen = {name: value for name, value in periods.items() if value != "auto"}
        later = 1 if self.automatic_periods else self.timing.later_periods
        schedule = RefreshSchedule(**chosen, warmup_steps=self.warmup_steps, later_periods=later)
        if self.automatic_periods and self.warmup_steps < LEAST_WARMUP:
            raise ValueError(
                "Periods that are 'auto' are chosen from times in the warm-up, which needs at least "
                f"{LEAST_WARMUP} steps, got warmup_steps={self.warmup_steps}. Give numbers, or a longer warm-up."
            )
        return schedule


def settings_of(owner: str, settings: Settings | None, options: Mapping[str, Any]) -> Settings:
    """Return settings with some of them replaced, checked together.

    Args:
        owner: The class in the message.
        settings: The initial settings; None for the defaults.
        options: The replacements, by name.

    Raises:
        TypeError: If there is no such setting, or it is of the wrong type.
        ValueError: If a setting is out of range.
    """
    refuse_former(owner, options, setting_names())
    return replace(settings or Settings(), **options)


def setting_names() -> set[str]:
    """The names of all settings."""
    return {entry.name for entry in fields(Settings) if entry.init}
