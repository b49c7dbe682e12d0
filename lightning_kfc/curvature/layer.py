"""One preconditioned layer: its modules' adapters, its running factors and its inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_kfc.curvature.loss_magnitude import LossMagnitude
from lightning_kfc.curvature.own_damping import OwnDamping
from lightning_kfc.curvature.weight_scale import mean_square
from lightning_kfc.distributed.process_group import is_sharded
from lightning_kfc.distributed.remote import RemoteInverse
from lightning_kfc.distributed.sharded_tensors import whole
from lightning_kfc.factors.damping import inputs_per_row
from lightning_kfc.factors.eigenbasis import Eigenbasis
from lightning_kfc.factors.inverses import EighInverse, EkfacInverse, Inverse
from lightning_kfc.factors.moments import Moments
from lightning_kfc.factors.quadratic_form import estimated_quadratic_form
from lightning_kfc.factors.running_average import StoredAverage
from lightning_kfc.factors.statistics import Statistics, factor_dtype
from lightning_kfc.layers import Adapter
from lightning_kfc.utilities.load_balancing import factorisation_cost
from lightning_kfc.utilities.torch_internals import values_of


class Layer:
    """The state of one layer of :class:`~lightning_kfc.KFC`.

    Args:
        name: The name of its (first) module in the model.
        adapters: The adapters of all modules that share the layer's parameters, in the model's order.
        reason: The reason for no Kronecker factors; empty for a layer with factors.
        inverse_precision: The precision of a Cholesky inverse and its products: ``"full"`` or ``"bfloat16"``.
    """

    def __init__(
        self, name: str, adapters: Sequence[Adapter], reason: str = "", inverse_precision: str = "full"
    ) -> None:
        self.name, self.reason, self._inverse_precision = name, reason, inverse_precision
        self.adapters = list(adapters)
        self.averages: dict[str, StoredAverage] = {}
        self.inverse: Inverse | None = None
        #: The former inverse, until the present one has given a usable update.
        self.previous_inverse: Inverse | None = None
        #: The moments of the rule "adam", in the eigenbasis of the inverse.
        self.moments: Moments | None = None
        # From its forward to its backward a sharded module has whole parameters; gradients and optimizer have parts.
        self._shards = {role: p for role, p in self.adapter.parameters().items() if is_sharded(p)}
        self.pending: Statistics | None = None
        self.factorised_at = -1
        self.own_damping = OwnDamping()
        #: The magnitude of the loss that trains the layer.
        self.loss = LossMagnitude()
        #: The most rows of a step, a bound on the rank of the gradient; None if unknown.
        self.rows: int | None = None
        #: The roles of the parameters in factors and inverse; parameters may be frozen or unfrozen later.
        self.roles: tuple[str, ...] = ()
        self._pending_roles: tuple[str, ...] = ()
        #: The identities of the layer's modules and parameters, and the precision of their factors, at the search.
        self.found_as = self._identity()

    def _identity(self) -> tuple[object, ...]:
        found: list[object] = []
        for adapter in self.adapters:
            found += type(adapter), id(adapter.module)
            for role, parameter in adapter.parameters().items():
                found += role, role in self._shards or id(parameter), factor_dtype(parameter.dtype)
        return tuple(found)

    def found_again(self, name: str, reason: str) -> None:
        """Set the name, and the reason for a diagonal curvature, from a later search for layers."""
        self.name, self.reason = name, reason

    @property
    def unchanged(self) -> bool:
        """Whether the layer's modules have the same parameters as at the search for layers, in the same precision."""
        return self._identity() == self.found_as

    @property
    def adapter(self) -> Adapter:
        """The adapter that reads and writes gradients."""
        return self.adapters[0]

    def parameters(self) -> list[nn.Parameter]:
        """The layer's parameters, trainable or not."""
        return list(self.adapter.parameters().values())

    @property
    def device(self) -> torch.device:
        """The device of the layer's parameters."""
        return self.parameters()[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the layer's factors."""
        return factor_dtype(self.parameters()[0].dtype)

    def cost(self) -> float:
        """The time to factorise the layer's factors, up to a constant."""
        return factorisation_cost(self.adapter.factor_shapes())

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are trainable now, by role, as in the optimizer."""
        own = self.adapter.own_parameters()
        return {role: self._shards.get(role, p) for role, p in own.items()} if self._shards else own

    def factor(self, name: str) -> Tensor:
        """A running factor, without the groups axis if there is one group.

        Raises:
            RuntimeError: If the layer has no statistics yet.
        """
        if name not in self.averages and isinstance(self.inverse, RemoteInverse):
            raise RuntimeError(
                f"another rank holds the factors of layer {self.name!r}: with placement='mem-opt', or a fraction, each "
                "layer's are on one rank only. Use placement='comm-opt' to have all of them on all ranks."
            )
        if name not in self.averages:
            raise RuntimeError(f"layer {self.name!r} has no factor {name} yet: no statistics have been taken.")
        value = self.averages[name].value
        return value[0] if value.shape[0] == 1 else value

    @property
    def A(self) -> Tensor:
        """The input factor (E1) as running average, ``(d_in, d_in)``; with a leading groups axis if groups > 1."""
        return self.factor("A")

    @property
    def G(self) -> Tensor:
        """The output factor (E2) as running average, ``(d_out, d_out)``; with a leading groups axis if groups > 1."""
        return self.factor("G")

    @property
    def factors(self) -> dict[str, Tensor]:
        """All running factors by name, with their groups axis."""
        return {name: average.value for name, average in self.averages.items()}

    def add(self, statistics: Statistics) -> None:
        """Add the statistics of one micro-batch of the step."""
        self.pending = statistics if self.pending is None else self.pending + statistics
        self.note_roles()

    def note_roles(self) -> None:
        """Note the trainable parameters, to which the next folded statistics belong."""
        self._pending_roles = tuple(self.adapter.own_parameters())

    def drop_pending(self) -> None:
        """Drop the statistics of the step's micro-batches."""
        self.pending = None

    def seen_rows(self, rows: int) -> None:
        """Note the number of rows of a step; 0 rows are no bound on the rank of the gradient."""
        self.rows = max(self.rows or 0, rows) or None

    def fold(self, statistics: Statistics, decay: float) -> bool:
        """Fold a step's statistics into the running averages.

        Returns:
            False if the averages started anew, since parameters were frozen or unfrozen.
        """
        factors = statistics.factors()
        kept = not self.averages or (
            self.roles == self._pending_roles
            and all(self.averages[name].shape == f.shape for name, f in factors.items())
        )
        if not kept:
            self.restart()
        self.roles = self._pending_roles
        for name, value in factors.items():
            if name in self.averages:
                self.averages[name] = self.averages[name].updated(value, decay)
            else:
                self.averages[name] = StoredAverage.start(value, decay)
        return kept

    def fold_elsewhere(self) -> bool:
        """Note that another rank folds a step's statistics into its running averages.

        Returns:
            False if the averages start anew, as in :meth:`fold`.
        """
        kept = self.roles in ((), self._pending_roles)
        if not kept:
            self.inverse = self.previous_inverse = None
        self.roles = self._pending_roles
        return kept

    def restart(self) -> None:
        """Forget factors, inverses and moments."""
        self.averages, self.moments = {}, None
        self.inverse = self.previous_inverse = None

    def restore(
        self,
        averages: dict[str, StoredAverage],
        inverse: Inverse | None,
        moments: Moments | None,
        rows: int | None,
        own_damping: OwnDamping,
        loss: LossMagnitude,
    ) -> None:
        """Restore the parts of a checkpoint, for the parameters that are trainable now."""
        self.averages, self.moments, self.rows = averages, moments, rows
        self.own_damping, self.loss = own_damping, loss
        self.roles = tuple(self.adapter.own_parameters())
        self.previous_inverse = None
        self.inverse = None if inverse is None else inverse.in_precision(self.inverse_dtype)

    def inverse_type(self, chosen: type[Inverse]) -> type[Inverse]:
        """The kind of inverse of this layer, given the user's choice."""
        own = self.adapter.inverse_type(chosen)
        # Without rows of single examples, the eigenvalues are products of the factors' own.
        return EighInverse if own is EkfacInverse and not self.adapter.pairs_rows else own

    def quadratic(self, delta: Tensor) -> float:
        r""":math:`\delta^\top F\delta` of a change ``(groups, d_out, d_in)`` of the parameters; 0 without factors.

        Estimated if far cheaper: see :func:`~lightning_kfc.factors.quadratic_form.estimated_quadratic_form`.
        """
        if not self.averages or not self.unchanged:
            return 0.0
        return float(estimated_quadratic_form(self.curvature(), delta))

    def curvature(self) -> Mapping[str, Tensor]:
        """The factors to invert: the running factors, as changed by the adapter."""
        draws = min(average.draws for average in self.averages.values())
        return self.adapter.estimate(self.factors, draws)

    def refreshed(self, inverse: type[Inverse], damping: float, noise_damping: float) -> Inverse:
        """A new inverse from the running factors, continuing the present one; raises as :meth:`Inverse.factorise`."""
        curvature = self.curvature()
        own = self.own_damping.limited(damping, noise_damping * inputs_per_row(curvature, self.rows), curvature)
        fresh = self.inverse_type(inverse).factorise(curvature, own.of(damping)).continuing_from(self.inverse)
        # After a failure the damping stays that of the present inverse, as on the other ranks.
        self.take_damping(own)
        return fresh

    def note_loss(self, loss: float, *, never_negative: bool) -> None:
        """Note the loss of a step; see :class:`~lightning_kfc.curvature.loss_magnitude.LossMagnitude`."""
        self.loss = self.loss.with_loss(loss, never_negative=never_negative)

    def measure_weights(self) -> None:
        """Note the mean square of the weights, the unit of the automatic damping, once. Collective if sharded."""
        if self.own_damping.mean_square is None and (own := self.adapter.own_parameters()):
            weights = self.matrix({role: parameter.detach() for role, parameter in own.items()})
            self.own_damping = OwnDamping(mean_square(weights, self.adapter.module))

    def take_damping(self, own: OwnDamping) -> None:
        """Use another damping from now on."""
        self.own_damping = own

    def damping(self, damping: float) -> float:
        """The damping of this layer, given the user's, or the automatic one for weights of mean square 1."""
        return self.own_damping.of(damping)

    def take(self, fresh: Inverse, step: int) -> None:
        """Use a new inverse; hold the former one until :meth:`confirm_inverse`."""
        self.factorised_at = step
        self.previous_inverse = self.previous_inverse or self.inverse
        if self.moments is not None:
            self.moments = self.moments.in_basis(self.inverse, fresh)
        self.inverse = fresh.in_precision(self.inverse_dtype)

    def go_back(self) -> None:
        """Use the former inverse again, since the new one gave no usable update."""
        self.inverse = self.previous_inverse

    def confirm_inverse(self) -> None:
        """Drop the former inverse, since the present one has given a usable update."""
        self.previous_inverse = None

    def take_moments(self, moments: Moments) -> None:
        """Hold Adam's moments after a step, in the eigenbasis of the present inverse."""
        self.moments = moments

    def forget_rows(self) -> None:
        """Forget the number of rows, until the next statistics."""
        self.rows = None

    @property
    def inverse_dtype(self) -> torch.dtype:
        """The precision of a Cholesky inverse."""
        if self._inverse_precision == "bfloat16":
            return torch.bfloat16
        return self.dtype

    def forget_momentum(self) -> None:
        """Drop the momentum of the rule "adam"."""
        if self.moments is not None:
            self.moments = self.moments.without_momentum()

    def basis_of_examples(self) -> Eigenbasis | None:
        """The basis for the gradients of single examples; None if there is no fitting one."""
        if isinstance(self.inverse, EkfacInverse) and self.inverse.basis.shape == self.adapter.matrix_shape():
            return self.inverse.basis
        return None

    def fold_second_moment(self, moment: Tensor, decay: float) -> None:
        """Fold a step's second moment into the corrected eigenvalues."""
        assert isinstance(self.inverse, EkfacInverse)
        self.inverse = self.inverse.updated(moment, decay)

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Tensors with the shapes of the parameters, by role, as one matrix ``(groups, d_out, d_in)``.

        The matrix is in float32 or better. For sharded tensors, collective: call on every rank.
        """
        joint = self.adapter.matrix({role: whole(tensor) for role, tensor in tensors.items()})
        return joint if joint.dtype.itemsize >= 4 else joint.float()

    def gradient_is_zero(self) -> bool:
        """Whether all gradients of the layer's parameters are missing or zero."""
        parameters = {**self.adapter.parameters(), **self._shards}.values()
        # Other ranks may have nonzero parts of a sharded gradient.
        return all(
            g is None or (type(g) is Tensor and not bool(values_of(g).any())) for g in (p.grad for p in parameters)
        )
