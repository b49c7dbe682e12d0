"""Twelve tasks of twelve families; a run takes some CPU seconds.

The tasks of :data:`CHOOSING` may choose constants of KFC. Those of :data:`HELD_BACK` have no part in any choice: they
are run once, at the end, and reported apart. Which is which is fixed. Before the end Adam
alone trains on the held-back tasks, for their targets; when they were written KFC made twelve steps on each, to see
that they run, and nothing was chosen by it.

A task's target is the training loss (evaluation mode) that Adam with its best learning rate reaches at 70 % of the
task's budget, the median of three seeds: ``python -m benchmarks.away.targets`` measures it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.away import data, networks
from benchmarks.contest.data import Split
from benchmarks.contest.tasks import Goal, Task, next_byte_cross_entropy
from benchmarks.paths import RESULTS

#: Tasks that may choose constants.
CHOOSING = ("signals", "separable", "table_classification", "picture", "forecast", "vae")
#: Tasks that choose no constant, run once at the end.
HELD_BACK = ("table_regression", "gru", "diffusion", "segmentation", "sharpening", "contrastive")
#: Training examples that the training loss is measured on.
MEASURED = 512
#: The file of the targets.
TARGETS = RESULTS / "away_targets.json"


@dataclass(frozen=True)
class AwayTask(Task):
    """A task with a training loss of 512 examples, since three averages are measured."""

    def training_loss(self, model: nn.Module) -> float:
        """The loss on the first training examples, not augmented, in evaluation mode."""
        split = self.data()
        return self._measure(model, split.train_inputs[:MEASURED], split.train_targets[:MEASURED], None)[0]


def fresh_draws(inputs: Tensor, generator: torch.Generator, latent: int) -> Tensor:
    """The same images with new normal draws at their end."""
    return torch.cat([inputs[:, :-latent], torch.randn(len(inputs), latent, generator=generator)], 1)


def evidence_bound(outputs: tuple[Tensor, Tensor, Tensor], pixels: Tensor) -> Tensor:
    """Bernoulli loss summed over pixels plus the divergence of codes from a standard normal, mean over examples."""
    logits, mean, log_variance = outputs
    misfit = F.binary_cross_entropy_with_logits(logits, pixels, reduction="sum")
    divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum() / 2
    return (misfit + divergence) / len(pixels)


def belonging(codes: Tensor, numbers: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE over the batch (van den Oord et al. 2018, arXiv:1807.03748): which second code belongs with a first."""
    first, second = F.normalize(codes, dim=2).unbind(1)
    return F.cross_entropy(first @ second.T / temperature, torch.arange(len(numbers)))


def measured_targets() -> dict[str, float]:
    """The measured targets, by task."""
    if not TARGETS.exists():
        return {}
    return {name: entry["target"] for name, entry in json.loads(TARGETS.read_text()).items()}


def _tasks() -> dict[str, AwayTask]:
    targets = measured_targets()
    latent = 8

    def task(
        name: str,
        title: str,
        make_model: Callable[[], nn.Module],
        loss: Callable[..., Tensor],
        examples: Callable[[], Split],
        batch_size: int,
        budget: int,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> AwayTask:
        # No loss is at or below minus infinity: a task without a target is never reached.
        goal = Goal((targets.get(name, -math.inf),), budget)
        return AwayTask(name, title, make_model, loss, examples, {batch_size: goal}, batch_size, augment)

    made = (
        task(
            "signals",
            "1-D convolutions, noisy waves of eight kinds",
            networks.signal_net,
            F.cross_entropy,
            data.waveforms,
            128,
            300,
        ),
        task(
            "separable",
            "depthwise-separable net, batch norm, dropout, turned patches of photographs",
            networks.separable_net,
            F.cross_entropy,
            data.turned_patches,
            64,
            300,
        ),
        task(
            "table_classification",
            "MLP with layer norm, generated table, seven kinds",
            functools.partial(networks.table_net, 32, 7, (96, 96), norm=True),
            F.cross_entropy,
            data.customers,
            512,
            300,
        ),
        task(
            "picture",
            "coordinates to colours, sine features, a photograph",
            networks.picture_net,
            F.mse_loss,
            data.coloured_coordinates,
            1024,
            300,
        ),
        task(
            "forecast",
            "transformer over pieces of generated series, Huber loss",
            networks.Forecaster,
            F.smooth_l1_loss,
            data.series,
            128,
            300,
        ),
        task(
            "vae",
            "variational autoencoder, 8x8 digits, loss summed over pixels",
            functools.partial(networks.VariationalAutoencoder, latent=latent),
            evidence_bound,
            functools.partial(data.digits_with_draws, latent),
            256,
            300,
            functools.partial(fresh_draws, latent=latent),
        ),
        task(
            "table_regression",
            "MLP, generated table, standardised targets",
            functools.partial(networks.table_net, 24, 1, (128, 128, 64)),
            F.mse_loss,
            data.prices,
            512,
            300,
        ),
        task(
            "gru",
            "GRU language model, bytes of docstrings",
            networks.RecurrentModel,
            next_byte_cross_entropy,
            data.docstrings,
            64,
            300,
        ),
        task(
            "diffusion",
            "small U-Net, group norm, noise in patches of a photograph",
            networks.NoiseUNet,
            F.mse_loss,
            data.noisy_patches,
            64,
            200,
        ),
        task(
            "segmentation",
            "convolutions down and up, batch norm, generated shapes",
            networks.SegmentationNet,
            F.cross_entropy,
            data.drawn_shapes,
            32,
            250,
        ),
        task(
            "sharpening",
            "denoising at twice the size, pixel shuffle, patches of a photograph",
            networks.sharpening_net,
            F.mse_loss,
            data.blurred_patches,
            64,
            250,
        ),
        task(
            "contrastive",
            "InfoNCE over pairs of crops of a photograph",
            networks.PairEncoder,
            belonging,
            data.pairs_of_crops,
            256,
            200,
        ),
    )
    return {entry.name: entry for entry in made}


AWAY = _tasks()
