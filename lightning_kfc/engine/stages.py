"""The stages of a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_kfc.curvature.checkpoint import STATE_VERSION, check_version, layers_state, load_layers
from lightning_kfc.curvature.model_layers import ModelLayers
from lightning_kfc.curvature.ownership import LayerOwnership
from lightning_kfc.distributed.agreement import check_agreement, facts_of
from lightning_kfc.distributed.process_group import Communication, ProcessGroup
from lightning_kfc.estimation.estimator import Estimator
from lightning_kfc.estimation.pending import PendingStatistics
from lightning_kfc.factors.inverses import INVERSES
from lightning_kfc.losses.traits import LossTraits
from lightning_kfc.monitoring.events import Events
from lightning_kfc.monitoring.messages import inform
from lightning_kfc.monitoring.timing import StepTimes
from lightning_kfc.refresh.factors import FactorRefresh
from lightning_kfc.refresh.inverses import InverseRefresh
from lightning_kfc.rules.base import Rule
from lightning_kfc.rules.choice import choose_rule, make_rule, with_rule
from lightning_kfc.scheduling.automatic_periods import PeriodChoice
from lightning_kfc.scheduling.staggering import StaggeredDates
from lightning_kfc.scheduling.step_counter import StepCounter
from lightning_kfc.scheduling.tracker import RefreshTracker
from lightning_kfc.settings import Settings
from lightning_kfc.trust_region.review import StepReviewer


class Stages:
    """The stages of a step, in their order, and their common objects.

    Args:
        model: The model.
        settings: The given settings.
        group: The ranks between which a batch is split.

    Attributes:
        settings: The settings in force, with the chosen rule.
        rule_choice: The rule, with the reason for its choice if it is ``"auto"``.
    """

    def __init__(self, model: nn.Module, settings: Settings, group: ProcessGroup) -> None:
        self.model, self.group = model, group
        self.layers = ModelLayers(model, settings)
        self.rule_choice = choose_rule(model, self.layers, settings)
        self.settings = settings = with_rule(settings, self.rule_choice)
        kind = INVERSES[settings.inverse]
        self.steps, self.times, self.events, self.communication = StepCounter(), StepTimes(), Events(), Communication()
        factors, inverses = (
            None if period == "auto" else period
            for period in (settings.factor_every_n_steps, settings.inverse_every_n_steps)
        )
        self.periods = PeriodChoice(settings.schedule, factors, inverses, settings.timing.max_overhead, self.times)
        self.tracker = RefreshTracker(
            settings.schedule,
            StaggeredDates(
                settings.schedule,
                self.layers.costs,
                staggered=settings.timing.stagger_inverses,
                # Statistics of the same step correct EKFAC's eigenvalues in the new basis.
                with_statistics=kind.wants_examples,
            ),
        )
        self.ownership = LayerOwnership(group, settings.placement, kind, self.layers, self.communication)
        self.estimator = Estimator(
            model,
            self.layers,
            self.tracker,
            group,
            self.steps,
            self.times,
            self.events,
            fisher=settings.fisher,
            likelihood=settings.likelihood,
            kind=kind,
            seed=settings.seed,
        )
        self.pending = PendingStatistics(self.layers, self.estimator, self.tracker, group, self.events)
        self.factors = FactorRefresh(settings.ema_decay, self.tracker, self.events, self.ownership)
        self.inverses = InverseRefresh(kind, self.tracker, self.events, self.ownership)
        self.rule: Rule[Any] = make_rule(settings)
        self.reviewer = StepReviewer(model, settings, self.events, self.ownership)
        self._ranks_agree = False
        # The step at which frozen layers were looked for last; at step 0 the warm-up of all layers begins.
        self._frozen_at = 0

    def require_agreement(self) -> None:
        """Require equal settings and layers of all ranks, once, and again when layers have changed. Collective.

        Raises:
            RanksDisagreeError: On every rank, with the differences.
        """
        if not self._ranks_agree:
            facts = facts_of(self.settings) | {"layers": str(self.layers)}
            check_agreement(facts, next(self.model.parameters()).device)
            self._ranks_agree = True

    def follow_structure(self) -> str | None:
        """Find modules and parameters that were added, replaced or removed; other layers keep their state.

        Call at the same step on every rank.

        Returns:
            A description of the changes; None without any.
        """
        if not self.layers.changed():
            return None
        change, step = self.layers.follow(), self.steps.number
        new = [layer.name for layer in change.new]
        self.factors.follow(change.kept)
        self.pending.follow_layers(change.kept)
        self.tracker.follow(change.kept, new, step)
        self.ownership.follow(change.kept)
        self.estimator.follow(change.kept, new, step)
        self._ranks_agree = False
        changed = str(change)
        return f"KFC at step {step}: the layers of the model have changed; {changed}." if changed else None

    def choose_periods(self) -> None:
        """Choose the ``"auto"`` periods at the first step after enough timed ones. Collective."""
        if not self.periods.open:
            return
        taken, device = bool(self.estimator.recorded), next(self.model.parameters()).device
        chosen = self.periods.step_begins(self.steps.number - self.tracker.started_at, statistics=taken, device=device)
        if chosen is not None:
            self.tracker.reschedule(self.periods.schedule)
            inform(chosen)

    def follow_frozen(self) -> None:
        """Let layers that were frozen from the start begin their statistics when they become trainable."""
        if self._frozen_at == self.steps.number:
            return
        self._frozen_at = self.steps.number
        for name, layer in self.layers.items():
            if not self.tracker.has_statistics(name):
                frozen = not layer.adapter.own_parameters()
                self.tracker.note_frozen(name, self.steps.number, frozen=frozen)

    # State.

    def state_dict(self, *, factors: bool) -> dict[str, Any]:
        """See :meth:`lightning_kfc.KFC.state_dict`."""
        return {
            "version": STATE_VERSION,
            "step": self.steps.next,
            "layers": layers_state(self.layers, self.ownership) if factors else None,
            "periods": self.periods.state_dict(),
            "dropped": dict(self.layers.dropped),
            "self_test_done": self.estimator.self_test.done,
            **asdict(self.estimator.traits),
            "last_updates": self.reviewer.regions.last_updates.state() if factors else [],
            "optimizers": self.reviewer.losses.state(),
            **{name: part.state_dict() for name, part in self._with_state().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """See :meth:`lightning_kfc.KFC.load_state_dict`."""
        check_version(state)
        self.steps.restart(int(state["step"]))
        self._frozen_at = 0
        for name, reason in state["dropped"].items():
            if name in self.layers:
                self.layers.drop(name, reason)
        traits = LossTraits(**{name: type(own)(state.get(name, own)) for name, own in asdict(LossTraits()).items()})
        self.estimator.restore(traits, self_test_done=bool(state["self_test_done"]))
        self.periods.load_state_dict(state.get("periods", {}))
        self.tracker.reschedule(self.periods.schedule)
        for name, part in self._with_state().items():
            part.load_state_dict(state.get(name, {}))
        if self.reviewer.region.automatic_radius and not self.reviewer.active:
            inform("KFC: reviews of steps had ended before this state was saved, and do not begin again.")
        self.reviewer.regions.last_updates.load(state.get("last_updates", ()), next(self.model.parameters()).device)
        self.reviewer.losses.load(state.get("optimizers", ()))
        if state["layers"] is None:
            self.tracker.restart(self.steps.number)
            return ["the state holds no factors: curvature is estimated anew, beginning with a warm-up"]
        kind, with_moments = INVERSES[self.settings.inverse], self.settings.rule == "adam"
        loaded = load_layers(self.layers, state["layers"], kind, self.ownership, with_moments=with_moments)
        for name in loaded.anew:
            self.tracker.forget(name)
        if not any(self.tracker.has_statistics(name) for name in self.layers):
            self.tracker.restart(self.steps.number)
        return list(loaded.problems)

    def _with_state(self) -> dict[str, Any]:
        """The objects that are restored after the periods, by their names in a state."""
        return {
            "due": self.tracker,
            "events": self.events,
            "trust_region": self.reviewer.regions,
            "factor_refresh": self.factors,
        }
