r"""Statistics from a part of each batch: a second, small forward in place of a record of the whole one.

Back-propagating seeds through a part of the graph costs as much as through all of it, so the loss is evaluated again on
some examples, chosen at random, and only that small forward is recorded. In expectation nothing changes (E1, E2): A is
a mean over rows, and G a sum of the terms' own matrices, weighted by c. With n of N examples the weights that a mean
gives are N/n times those in the whole batch already, and those of a sum are multiplied by N/n here. Which of both a
loss is, the first step shows: it is recorded as a whole, and the loss on a part is evaluated besides
(:mod:`lightning_kfc.part_law`). Only where examples meet in the network, as in batch norm, a part is another thing than
the whole: its statistics are those of smaller batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_kfc.distributed import Team, is_sharded
from lightning_kfc.factors.statistics import Statistics
from lightning_kfc.isolation import RandomStreams, leaving_no_trace
from lightning_kfc.observation import Observation
from lightning_kfc.part_law import LAWS, NotDivisibleError, law_of
from lightning_kfc.review import PartLoss
from lightning_kfc.settings import Settings
from lightning_kfc.step_times import StepTimes

#: The stream of random numbers that chooses examples; others draw targets and the self-test's directions.
STREAM = 2

#: Gives the loss of the examples of some indices; None where a training step skips its batch.
Evaluation = Callable[[Tensor], Tensor | None]


@dataclass(frozen=True)
class Batch:
    """A (micro-)batch of which a part may do.

    Attributes:
        evaluate: Gives the loss of some of its examples, of the same scale as the loss of all of them.
        examples: How many it has.
        whole: Why it must be taken as a whole; empty where a part will do.
    """

    evaluate: Evaluation | None
    examples: int
    whole: str


def why_whole_batches(model: nn.Module, team: Team) -> str | None:
    """What in a model makes a second forward on a part of a batch unsafe, or None."""
    if any(map(is_sharded, model.parameters())):
        return "parameters are sharded over ranks"
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and team.size > 1:
            return f"{name!r} is a SyncBatchNorm, whose statistics are those of all ranks together"
        if getattr(module, "batch_first", True) is False:
            return f"{name!r} has batch_first=False, so that the first axis of the batch may be time"
    return None


class Parts:
    """Decides at each forward whether a part will do, and takes the statistics from it.

    Args:
        model: The model.
        settings: How many examples are wanted; None for all, with which this does nothing.
        team: The ranks; all of them decide alike.
        observation: What records a forward and sends the seeds back.
        times: Adds up the time that all this takes.
        tell: Takes a sentence on why whole batches are used.

    Attributes:
        expected: The layers whose statistics the next loss brings by way of a part; empty where none is used.
        law: How the loss depends on the size of a batch, once that is known; one of ``LAWS``.
        reason: Why whole batches are used from now on; None where they are not.
        losses: Those of the parts that this step's statistics came from.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        team: Team,
        observation: Observation,
        times: StepTimes,
        tell: Callable[[str], None],
    ) -> None:
        self._model = model
        self._wanted = settings.factor_examples
        self._team = team
        self._observation = observation
        self._times = times
        self._tell = tell
        self._batch: Batch | None = None
        self._tried_at = -1
        self._model_seen = False
        self._lasting = False
        self._told: set[str] = set()
        self.expected: list[str] = []
        self.law: str | None = None
        self.reason: str | None = None
        self.losses: list[PartLoss] = []

    @property
    def used(self) -> bool:
        """Whether parts of batches are wanted, and nothing is known against it."""
        return self._wanted is not None and self.reason is None

    def described(self) -> str:
        """Where statistics come from."""
        if self._wanted is None:
            return "whole batches"
        if self.reason is None:
            return f"{self._wanted} examples of each batch"
        return f"whole batches, in spite of factor_examples={self._wanted}: {self.reason}"

    def refuse(self, reason: str, *, lasting: bool = True) -> None:
        """Use whole batches from now on.

        Args:
            reason: What is said about it.
            lasting: Whether a resumed run must do so, too, since the data have shown it.
        """
        if self.used:
            self.reason, self._lasting = reason, lasting
            self._tell(f"KFC takes its statistics from {self.described()}.")

    def begin(self, batch: Batch, step: int, layers: Sequence[str]) -> bool:
        """A forward begins.

        Args:
            batch: What it is of.
            step: The optimizer step.
            layers: Those whose statistics are due.

        Returns:
            Whether statistics will come from a part, so that this forward is not to be recorded.

        Raises:
            ValueError: If statistics are due, and nothing was said about the batch.
        """
        self.release()
        if not layers or not self.used:
            return False
        if not self._model_seen:
            self._model_seen = True
            if (unsafe := why_whole_batches(self._model, self._team)) is not None:
                self.refuse(unsafe, lasting=False)
                return False
        if batch.evaluate is None and not batch.whole:
            raise ValueError(
                f"factor_examples={self._wanted} needs the loss of a part of each batch: open "
                "kfc.capture(lambda part: loss_fn(model(x[part]), y[part]), examples=len(x)), or set "
                "factor_examples=None."
            )
        self._batch = batch
        if batch.whole and self.law is not None and batch.whole not in self._told:
            self._told.add(batch.whole)
            self._tell(
                f"KFC takes the statistics of such batches as a whole, in spite of factor_examples: {batch.whole}."
            )
        if batch.whole or batch.examples <= self._count or self.law is None or step == self._tried_at:
            return False
        self.expected = list(layers)
        return True

    def release(self) -> None:
        """Forget the batch of the last forward."""
        self._batch, self.expected = None, []

    def statistics(
        self,
        loss: Tensor,
        step: int,
        micro_batch: int,
        *,
        loss_scale: float,
        loss_fraction: float,
        unseen: Set[str],
    ) -> dict[str, Statistics]:
        """As :meth:`Observation.statistics`, from a part of the batch where :meth:`begin` has said so."""
        batch, expected, observation = self._batch, self.expected, self._observation
        self.release()
        if expected:
            assert batch is not None
            return self._of_part(batch, step, micro_batch, loss_fraction, unseen)
        tries = batch is not None and self.used and self.law is None and observation.active
        whole = observation.outline(loss, loss_scale, loss_fraction) if tries else []
        found = observation.statistics(
            loss, step, micro_batch, loss_scale=loss_scale, loss_fraction=loss_fraction, unseen=unseen
        )
        if tries:
            assert batch is not None
            self._tried_at = step
            # A loss that trains other parameters than ours says nothing.
            own = self._tried(batch, whole, step, micro_batch, loss_fraction) if found else (None, None)
            self._agree(*own, loss.device)
        return found

    # A part.

    @property
    def _count(self) -> int:
        assert self._wanted is not None
        return self._wanted

    def _chosen(self, examples: int, count: int, step: int, micro_batch: int) -> Tensor:
        """Indices of examples, in order, on the CPU: the same choice on every kind of device."""
        generator = self._observation.generator(step, micro_batch, stream=STREAM)(torch.device("cpu"))
        return torch.randperm(examples, generator=generator)[:count].sort().values

    def _of_part(
        self, batch: Batch, step: int, micro_batch: int, loss_fraction: float, unseen: Set[str]
    ) -> dict[str, Statistics]:
        assert batch.evaluate is not None
        observation = self._observation
        chosen = self._chosen(batch.examples, self._count, step, micro_batch)
        # What weights are divided by: those of a sum are too few.
        share = len(chosen) / batch.examples if self.law == "sum" else 1.0
        try:
            with self._times.part("statistics"), leaving_no_trace(self._model), torch.enable_grad():
                try:
                    streams = RandomStreams.of(self._model)
                    with observation.capture(step):
                        loss = batch.evaluate(chosen)
                except Exception as error:
                    # The user's own code, where it did not expect to be called; the training goes on.
                    self.refuse(_raised(error))
                    return {}
                if loss is None:
                    return {}
                self.losses.append(
                    PartLoss(loss.detach() / share, partial(_again, batch.evaluate, chosen, share, streams))
                )
                return observation.statistics(
                    loss, step, micro_batch, loss_scale=share, loss_fraction=loss_fraction / share, unseen=unseen
                )
        finally:
            observation.release()

    # The trial that shows how the loss depends on the size of a batch.

    def _tried(
        self, batch: Batch, whole: list[Any], step: int, micro_batch: int, loss_fraction: float
    ) -> tuple[str | None, str | None]:
        """The law, and the reason for whole batches, as far as this rank can tell."""
        if batch.whole:
            return None, batch.whole
        if batch.examples <= self._count:
            return None, None
        evaluate = batch.evaluate
        assert evaluate is not None
        # At most a quarter of the batch, where that leaves two (batch norm needs them), so that laws lie far apart.
        count = min(self._count, max(2, batch.examples // 4))
        chosen = self._chosen(batch.examples, count, step, micro_batch)
        versions = self._parameter_versions()
        try:
            with self._times.part("statistics"), leaving_no_trace(self._model), torch.enable_grad():
                part = self._observation.outline_of(lambda: evaluate(chosen), loss_fraction)
            if self._parameter_versions() != versions:
                raise NotDivisibleError("the training step changes parameters itself")
            return (None if part is None else law_of(whole, part, count, batch.examples)), None
        except Exception as error:
            return None, _raised(error)

    def _agree(self, law: str | None, reason: str | None, device: torch.device) -> None:
        """Decide as all ranks do, whatever this one's own batch has shown; every rank must ask."""
        told = [float(law == each) for each in LAWS] + [float(reason is not None)]
        *laws, refused = self._team.largest(torch.tensor(told, device=device)).tolist()
        known = [each for each, flag in zip(LAWS, laws, strict=True) if flag]
        if refused:
            self.refuse(reason or "another rank cannot do with parts of its batches")
        elif len(known) > 1:
            self.refuse("the loss is a mean on some ranks and a sum on others")
        elif known:
            self.law = known[0]

    def _parameter_versions(self) -> list[int]:
        return [parameter._version for parameter in self._model.parameters()]

    # State.

    def restart(self) -> None:
        """Find out anew, from the next whole batch."""
        self.law, self._tried_at = None, -1
        if self._lasting:
            self.reason, self._lasting = None, False

    def state_dict(self) -> dict[str, Any]:
        """Plain strings."""
        return {"law": self.law, "reason": self.reason if self._lasting else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; nothing where a version without parts has saved it."""
        self.restart()
        self.law = state.get("law")
        if (reason := state.get("reason")) is not None:
            self.reason, self._lasting = str(reason), True


def _again(evaluate: Evaluation, chosen: Tensor, share: float, streams: RandomStreams) -> Tensor | float:
    streams.restore()
    loss = evaluate(chosen)
    return math.nan if loss is None else loss / share


def _raised(error: Exception) -> str:
    """Why an evaluation that has raised will not be tried again."""
    if isinstance(error, NotDivisibleError):
        return str(error)
    return f"the loss of a part of a batch could not be evaluated ({type(error).__name__}: {error})"
