"""The recurrences of LSTM, GRU and RNN, step by step, with visible linear products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_kfc.layers.fused_modules import Watch
from lightning_kfc.utilities.torch_internals import fused_recurrence

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
    fused_recurrence.lstm: _lstm,
    fused_recurrence.gru: _gru,
    fused_recurrence.rnn_tanh: _rnn_tanh,
    fused_recurrence.rnn_relu: _rnn_relu,
}
CELLS: dict[Any, Cell] = {
    fused_recurrence.lstm_cell: _lstm,
    fused_recurrence.gru_cell: _gru,
    fused_recurrence.rnn_tanh_cell: _rnn_tanh,
    fused_recurrence.rnn_relu_cell: _rnn_relu,
}


def suffix(layer: int, direction: int) -> str:
    """The suffix of torch's names for the weights of a layer and direction."""
    return f"l{layer}" + ("_reverse" if direction else "")


def _states(hidden: Tensor | State) -> State:
    return (hidden,) if isinstance(hidden, Tensor) else tuple(hidden)


def one_step(
    watch: Watch,
    cell: Cell,
    input: Tensor,
    hidden: Tensor | State,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor | None = None,
    bias_hh: Tensor | None = None,
) -> Tensor | State:
    """The recurrence of a cell's fused function, with its arguments."""
    state = _states(hidden)
    from_input = watch.linear("ih", input, weight_ih, bias_ih)
    state = cell(from_input, watch.linear("hh", state[0], weight_hh, bias_hh), state)
    return state[0] if isinstance(hidden, Tensor) else state


@dataclass(frozen=True)
class _Network:
    """A recurrent module's weights and options, in the form of the fused function's arguments."""

    watch: Watch
    cell: Cell
    weights: Sequence[Tensor]
    biases: bool
    layers: int
    dropout: float
    training: bool
    directions: int

    def run(self, input: Tensor, sizes: Sequence[int], start: State) -> tuple[Tensor, State]:
        """Run all layers over concatenated steps.

        Args:
            input: All steps, ``(sum of sizes, features)``.
            sizes: The number of sequences at each step, not increasing.
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
                output, end = self._one_direction(hidden, sizes, own, number, suffix(layer, direction), direction == 1)
                outputs.append(output)
                ends.append(end)
            hidden = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
            if self.dropout and layer < self.layers - 1:
                hidden = F.dropout(hidden, self.dropout, self.training)
        return hidden, tuple(torch.stack(states) for states in zip(*ends, strict=True))

    def _weights_of(self, number: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The weights of one layer and direction: for input and state, their biases, and the projection."""
        each = len(self.weights) // (self.layers * self.directions)
        own = list(self.weights[number * each : (number + 1) * each])
        ih, hh, *rest = own
        b_ih, b_hh = (rest.pop(0), rest.pop(0)) if self.biases else (None, None)
        return ih, hh, b_ih, b_hh, rest[0] if rest else None

    def _one_direction(
        self, input: Tensor, sizes: Sequence[int], start: State, number: int, end: str, reverse: bool
    ) -> tuple[Tensor, State]:
        ih, hh, b_ih, b_hh, hr = self._weights_of(number)
        product = F.linear(input, ih, b_ih)
        # Hooks get steps of the same examples as (steps, examples).
        leading = (len(sizes), sizes[0]) if sizes[0] == sizes[-1] else (len(input),)
        self.watch.show(f"ih_{end}", input.reshape(*leading, -1), product.view(*leading, -1))
        steps = torch.split(product, list(sizes))
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


def padded(
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
    """The recurrence of a fused function over sequences of one length, with its arguments."""
    network = _Network(watch, cell, weights, biases, layers, dropout, training, 1 + bidirectional)
    steps = input.transpose(0, 1) if batch_first else input
    length, examples = steps.shape[:2]
    output, end = network.run(steps.flatten(0, 1), [examples] * length, _states(hidden))
    output = output.view(length, examples, -1)
    return output.transpose(0, 1) if batch_first else output, *end


def packed(
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
    """The recurrence of a fused function over packed sequences, with its arguments."""
    network = _Network(watch, cell, weights, biases, layers, dropout, training, 1 + bidirectional)
    output, end = network.run(input, batch_sizes.tolist(), _states(hidden))
    return output, *end
