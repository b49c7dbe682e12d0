"""LSTM, GRU and RNN, as cells and over sequences: the products of all gates with input, and with state, are layers.

Their forward is one fused function, inside which no product can be seen. On due steps the same recurrence runs step by
step instead, from the same linear products; its results agree up to rounding. Rows are all examples at all steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import _VF, Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from lightning_kfc.layers.adapter import Adapter, ForwardHook
from lightning_kfc.layers.linear import LinearAdapter
from lightning_kfc.layers.registry import register_adapter
from lightning_kfc.layers.watch import Watch

#: Hidden state first, then the LSTM's cell state.
State = tuple[Tensor, ...]
#: From a step's two products and its state to the next state.
Cell = Callable[[Tensor, Tensor, State], State]


def _lstm(from_input: Tensor, from_state: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_state).chunk(4, 1)
    memory = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * memory.tanh(), memory


def _gru(from_input: Tensor, from_state: Tensor, state: State) -> State:
    (ir, iz, i_new), (hr, hz, h_new) = from_input.chunk(3, 1), from_state.chunk(3, 1)
    new = (i_new + (ir + hr).sigmoid() * h_new).tanh()
    return ((state[0] - new) * (iz + hz).sigmoid() + new,)


def _rnn_tanh(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).tanh(),)


def _rnn_relu(from_input: Tensor, from_state: Tensor, state: State) -> State:
    return ((from_input + from_state).relu(),)


#: The fused functions over sequences, and those of one step.
SEQUENCES: dict[Any, Cell] = {
    _VF.lstm: _lstm,
    _VF.gru: _gru,
    _VF.rnn_tanh: _rnn_tanh,
    _VF.rnn_relu: _rnn_relu,
}
CELLS: dict[Any, Cell] = {
    _VF.lstm_cell: _lstm,
    _VF.gru_cell: _gru,
    _VF.rnn_tanh_cell: _rnn_tanh,
    _VF.rnn_relu_cell: _rnn_relu,
}


@register_adapter(nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
class GateAdapter(LinearAdapter):
    """One product of a recurrent module, of all its gates together.

    Each step is a row, whatever ``weight_sharing`` says: how many there are is only known when the last is over.

    Args:
        module: The recurrent module.
        watch: Shows its products.
        part: ``"ih"`` (input), ``"hh"`` (state) or ``"hr"`` (an LSTM's projection), with layer and direction.
    """

    kind = "Recurrent"
    module: nn.RNNBase | nn.RNNCellBase

    def __init__(self, module: nn.RNNBase | nn.RNNCellBase, watch: Watch, part: str) -> None:
        super().__init__(module, "expand")
        self._watch, self._part = watch, part

    @classmethod
    def refusal(cls, module: nn.Module) -> str | None:
        """Weights that are computed from other parameters are not the module's own."""
        names = (f"weight_{part}" for part in _part_names(module))
        return None if all(name in module._parameters for name in names) else "its weight is re-parametrised"

    @classmethod
    def parts(cls, module: nn.Module, weight_sharing: str) -> dict[str, Adapter]:
        """One for each product."""
        assert isinstance(module, nn.RNNBase | nn.RNNCellBase)
        watch = Watch(module, _run)
        return {part: cls(module, watch, part) for part in _part_names(module)}

    def attach(self, hook: ForwardHook) -> RemovableHandle:
        """See :class:`Adapter`."""
        return self._watch.attach(self._part, hook)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The product's weight and bias."""
        found = {role: self.module._parameters.get(f"{role}_{self._part}") for role in ("weight", "bias")}
        return {role: parameter for role, parameter in found.items() if parameter is not None}


def _suffix(layer: int, direction: int) -> str:
    return f"l{layer}" + ("_reverse" if direction else "")


def _part_names(module: nn.Module) -> list[str]:
    if isinstance(module, nn.RNNCellBase):
        return ["ih", "hh"]
    assert isinstance(module, nn.RNNBase)
    products = ["ih", "hh", *(["hr"] if module.proj_size else [])]
    ends = [_suffix(layer, d) for layer in range(module.num_layers) for d in range(1 + module.bidirectional)]
    return [f"{product}_{end}" for end in ends for product in products]


def _run(watch: Watch, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    with _ShownRecurrence(watch):
        return forward(*args, **kwargs)


class _ShownRecurrence(TorchFunctionMode):
    """Takes the place of the fused function that a recurrent module calls."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the recurrence step by step; call all else through."""
        if func in CELLS:
            return _one_step(self._watch, CELLS[func], *args)
        if func in SEQUENCES:
            packed = isinstance(args[3], list)
            return (_packed if packed else _padded)(self._watch, SEQUENCES[func], *args)
        return func(*args, **(kwargs or {}))


def _states(hidden: Tensor | State) -> State:
    return (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)


def _one_step(
    watch: Watch,
    cell: Cell,
    input: Tensor,
    hidden: Tensor | State,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor | State:
    state = _states(hidden)
    from_input = watch.linear("ih", input, weight_ih, bias_ih)
    state = cell(from_input, watch.linear("hh", state[0], weight_hh, bias_hh), state)
    return state[0] if isinstance(hidden, Tensor) else state


@dataclass(frozen=True)
class _Network:
    """A recurrent module's weights and options, as its fused function is given them."""

    watch: Watch
    cell: Cell
    weights: Sequence[Tensor]
    biases: bool
    layers: int
    dropout: float
    training: bool
    directions: int

    def run(self, input: Tensor, sizes: Sequence[int], start: State) -> tuple[Tensor, State]:
        """All layers over steps that lie one after another.

        Args:
            input: All steps, ``(sum of sizes, features)``.
            sizes: The number of sequences at each step, never growing.
            start: The states of all layers and directions, ``(layers * directions, sizes[0], features)``.

        Returns:
            The last layer's hidden states, and the final states.
        """
        ends: list[State] = []
        hidden = input
        for layer in range(self.layers):
            outputs = []
            for direction in range(self.directions):
                number = layer * self.directions + direction
                own = tuple(s[number] for s in start)
                output, end = self._one_direction(hidden, sizes, own, number, _suffix(layer, direction), direction == 1)
                outputs.append(output)
                ends.append(end)
            hidden = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if self.dropout and layer < self.layers - 1:
                hidden = F.dropout(hidden, self.dropout, self.training)
        return hidden, tuple(torch.stack(states) for states in zip(*ends, strict=True))

    def _weights_of(self, number: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Of one layer and direction: for input and state, their biases, and the projection."""
        each = len(self.weights) // (self.layers * self.directions)
        own = list(self.weights[number * each : (number + 1) * each])
        ih, hh, *rest = own
        b_ih, b_hh = (rest.pop(0), rest.pop(0)) if self.biases else (None, None)
        return ih, hh, b_ih, b_hh, rest[0] if rest else None

    def _one_direction(
        self, input: Tensor, sizes: Sequence[int], start: State, number: int, end: str, reverse: bool
    ) -> tuple[Tensor, State]:
        ih, hh, b_ih, b_hh, hr = self._weights_of(number)
        steps = torch.split(self.watch.linear(f"ih_{end}", input, ih, b_ih), list(sizes))
        # Autocast runs the products in another precision, and the fused function its states with them.
        start = tuple(s.to(steps[0].dtype) for s in start)
        state, finished = tuple(s[: sizes[-1] if reverse else sizes[0]] for s in start), []
        outputs = []
        for step in reversed(steps) if reverse else steps:
            size, running = len(step), len(state[0])
            if size < running:
                finished.append(tuple(s[size:] for s in state))
                state = tuple(s[:size] for s in state)
            elif size > running:
                state = tuple(torch.cat([s, s0[running:size]]) for s, s0 in zip(state, start, strict=True))
            state = self.cell(step, self.watch.linear(f"hh_{end}", state[0], hh, b_hh), state)
            if hr is not None:
                state = (self.watch.linear(f"hr_{end}", state[0], hr, None), *state[1:])
            outputs.append(state[0])
        ended = [state, *reversed(finished)]
        final = tuple(torch.cat(parts) for parts in zip(*ended, strict=True)) if finished else state
        return torch.cat(outputs[::-1] if reverse else outputs), final


def _padded(
    watch: Watch,
    cell: Cell,
    input: Tensor,
    hidden: Tensor | State,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    network = _Network(watch, cell, weights, biases, layers, dropout, training, 1 + bidirectional)
    steps = input.transpose(0, 1) if batch_first else input
    length, examples = steps.shape[:2]
    output, end = network.run(steps.flatten(0, 1), [examples] * length, _states(hidden))
    output = output.view(length, examples, -1)
    return output.transpose(0, 1) if batch_first else output, *end


def _packed(
    watch: Watch,
    cell: Cell,
    input: Tensor,
    batch_sizes: Tensor,
    hidden: Tensor | State,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    network = _Network(watch, cell, weights, biases, layers, dropout, training, 1 + bidirectional)
    output, end = network.run(input, batch_sizes.tolist(), _states(hidden))
    return output, *end
