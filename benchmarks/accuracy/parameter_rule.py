"""Compare rules for parameters without rows, by iterations to a training loss on real digits.

    python -m benchmarks.accuracy.parameter_rule [--seeds 5] [--steps 300]

Position embeddings, scalar gates, LSTM cells and weights of functional calls have no Kronecker factors. The estimate of
their curvature is the square of one derivative of sampled seeds per step. It is unbiased for the diagonal, but has one
degree of freedom, so that after few steps a coordinate with small draws looks flat. The rules:

    diagonal    f as estimated
    shrunk k    (k * mean(f) + n f) / (k + n): the tensor's mean counts as k draws, n the draws in the running average
    blend       half the coordinate's own, half the tensor's mean, however many draws there were
    mean        the tensor's mean for every coordinate
    matched     no curvature: the gradient, scaled to the relative step of the layers with factors
    plain       the gradient, at the optimizer's learning rate

Four nets: a transformer with raw position embeddings, layer scales and zero-initialised gates; an LSTM with a linear
head; a perceptron whose hidden weights are used by functional calls; a net whose logits a raw scale multiplies.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_kfc import KFC
from lightning_kfc.curvature.layer import Layer
from lightning_kfc.factors.inverses import DiagonalInverse, Inverse
from lightning_kfc.rules import natural
from lightning_kfc.rules.natural import NaturalUpdates, natural_step

BATCH, TRAINING = 128, 1500


class Transformer(nn.Module):
    """Two blocks over 16 patches of 2 x 2 pixels; position embeddings, class token, layer scales and gates are raw."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(2))
        self.scale = nn.ParameterList(nn.Parameter(torch.full((width,), 0.1)) for _ in range(2))
        self.gate = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(2))
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images ``(N, 64)``."""
        x = images.reshape(-1, 1, 8, 8)
        x = F.unfold(x, 2, stride=2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x)], 1) + self.position
        for qkv, out, up, down, scale, gate in zip(
            self.qkv, self.out, self.up, self.down, self.scale, self.gate, strict=True
        ):
            q, k, v = (
                t.unflatten(-1, (4, -1)).transpose(1, 2) for t in qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1)
            )
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + scale * out(mixed)
            x = x + gate * down(F.gelu(up(F.layer_norm(x, x.shape[-1:]))))
        return self.head(F.layer_norm(x[:, 0], x.shape[-1:]))


class _OwnLSTM(nn.LSTM):
    """An LSTM without an adapter, since it has its own forward."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """The class's own."""
        return super().forward(input, hx)


class LSTM(nn.Module):
    """An LSTM over the eight rows of an image; its weights count as parameters without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = _OwnLSTM(8, 32, batch_first=True)
        self.head = nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images ``(N, 64)``."""
        outputs, _ = self.lstm(images.reshape(-1, 8, 8))
        return self.head(outputs[:, -1])


class Functional(nn.Module):
    """A perceptron with hidden weights in functional calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(48, 64) / 8)
        self.second = nn.Parameter(torch.randn(48, 48) / 7)
        self.biases = nn.Parameter(torch.zeros(2, 48))
        self.head = nn.Linear(48, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images ``(N, 64)``."""
        h = torch.relu(F.linear(images, self.first, self.biases[0]))
        return self.head(torch.relu(F.linear(h, self.second, self.biases[1])))


class Scaled(nn.Module):
    """A net whose logits are multiplied by a raw scale, as in contrastive nets."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 48)
        self.head = nn.Linear(48, 10, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images ``(N, 64)``."""
        h = F.normalize(torch.relu(self.hidden(images)), dim=-1)
        return self.log_scale.exp() * self.head(h)


#: Each net, and its target training loss.
NETS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "transformer": (Transformer, 0.3),
    "lstm": (LSTM, 0.1),
    "functional": (Functional, 0.1),
    "scaled logits": (Scaled, 0.02),
}

Rule = Callable[[Tensor, float], Tensor]


def draws(updates: int, decay: float) -> float:
    """The effective number of draws in a zero-debiased exponential average: (sum w)^2 / sum w^2."""
    return (1 + decay) / (1 - decay) * (1 - decay**updates) / (1 + decay**updates)


def shrunk(k: float) -> Rule:
    """The tensor's mean counts as k draws."""
    return lambda f, n: (k * f.mean() + n * f) / (k + n)


RULES: dict[str, Rule | None] = {
    "diagonal": lambda f, n: f,
    "shrunk 1": shrunk(1),
    "shrunk 5": shrunk(5),
    "shrunk 25": shrunk(25),
    "blend": lambda f, n: 0.5 * f + 0.5 * f.mean(),
    "mean": lambda f, n: f.mean().expand_as(f),
    "matched": None,
    "plain": None,
}


@dataclass(frozen=True)
class Identity(DiagonalInverse):
    """No curvature; marks the layers whose step is matched to that of other layers."""


def refreshed_by(rule: Rule | None, decay: float) -> Callable[[Layer, type[Inverse], float, float], Inverse]:
    """A rule in the place of :meth:`Layer.refreshed`."""
    original = Layer.refreshed

    def refreshed(layer: Layer, inverse: type[Inverse], damping: float, noise_damping: float) -> Inverse:
        if layer.adapter.treatment != "diagonal":
            return original(layer, inverse, damping, noise_damping)
        average = layer.averages["F"]
        updates = round(math.log(max(1 - average.average.weight, 1e-300)) / math.log(decay))
        if rule is None:
            return Identity(torch.ones_like(average.value))
        return DiagonalInverse(1 / (rule(average.value, draws(updates, decay)) + damping))

    return refreshed


def matched_step(
    gradients: Sequence[Tensor],
    inverses: Sequence[Inverse],
    rates: Sequence[float],
    kl_clip: float | None,
    fallbacks: Sequence[Inverse | None],
    most_decrease: float | None = None,
    largest: Sequence[float] = (),
) -> NaturalUpdates:
    """A natural step; layers without curvature get the same relative step as the other layers."""
    own = [i for i, inverse in enumerate(inverses) if isinstance(inverse, Identity)]
    updates = {i: inverses[i].solve(gradients[i]) for i in range(len(inverses)) if i not in own}
    after = sum(float(u.square().sum()) for u in updates.values())
    before = sum(float(gradients[i].square().sum()) for i in updates)
    scale = math.sqrt(after / before) if before > 0 else 1.0
    given = [Identity(x.F_inverse * scale) if isinstance(x, Identity) else x for x in inverses]
    return natural_step(gradients, given, rates, kl_clip, fallbacks, most_decrease, largest)


def iterations(net: str, rule: str, seed: int, steps: int, lr: float, damping: float) -> float:
    """Steps until the loss on all training data is below the threshold; infinity if never."""
    digits = load_digits()
    x = torch.tensor(digits.data[:TRAINING] / 16, dtype=torch.float32)
    y = torch.tensor(digits.target[:TRAINING])
    torch.manual_seed(seed)
    make, target = NETS[net]
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    order = torch.Generator().manual_seed(seed)
    kfc = KFC(model, seed=seed, damping=damping)
    if rule == "plain":
        for layer in kfc.layers.values():
            if layer.adapter.treatment == "diagonal":
                layer.take = lambda fresh, step: None  # type: ignore[method-assign]  # the layer is left plain
    step_rule = matched_step if rule == "matched" else natural_step
    with (
        mock.patch.object(Layer, "refreshed", refreshed_by(RULES[rule], kfc.settings.ema_decay)),
        mock.patch.object(natural, "natural_step", step_rule),
    ):
        for step in range(steps):
            batch = torch.randint(TRAINING, (BATCH,), generator=order)
            optimizer.zero_grad()
            with kfc.capture():
                loss = F.cross_entropy(model(x[batch]), y[batch])
            kfc.update(loss)
            loss.backward()
            kfc.precondition(optimizer=optimizer)
            optimizer.step()
            if step % 5 == 4:
                with torch.no_grad():
                    whole = float(F.cross_entropy(model(x), y))
                if whole < target:
                    return step + 1
                if not math.isfinite(whole):
                    return math.inf
    return math.inf


def main() -> None:
    """Print a table: the median over seeds, in brackets the worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, nargs="+", default=[0.5, 0.1])
    parser.add_argument("--damping", type=float, nargs="+", default=[0.01])
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for lr, damping in itertools.product(options.lr, options.damping):
        print(f"steps to the training loss, lr={lr}, damping={damping}: median (worst) of {options.seeds} seeds")
        print(f"{'':10s}" + "".join(f"{net:>18s}" for net in options.nets))
        for rule in options.rules:
            cells = []
            for net in options.nets:
                found = [iterations(net, rule, seed, options.steps, lr, damping) for seed in range(options.seeds)]
                cells.append(f"{statistics.median(found):g} ({max(found):g})")
            print(f"{rule:10s}" + "".join(f"{cell:>18s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
