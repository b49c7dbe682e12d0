"""Six whole recipes; the longest run takes five to fifteen CPU seconds with SGD.

No recipe chose a constant of KFC: its defaults were fixed before the first run. Four recipes have networks and data of
the contest, whose conv net and ResNet have chosen defaults; segmentation and the table are held-back tasks away from
home.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.away import data as away_data
from benchmarks.away.networks import SegmentationNet, table_net
from benchmarks.contest import data
from benchmarks.contest.attention_networks import LanguageModel, VisionTransformer
from benchmarks.contest.data import Split
from benchmarks.contest.networks import conv_net, resnet20
from benchmarks.contest.tasks import next_byte_cross_entropy

Augment = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def cosine(done: float, warm_up: float = 0.05) -> float:
    """The share of the highest learning rate at a share of the run: a linear warm-up, then a half cosine."""
    if done < warm_up:
        return (done + 0.2 * warm_up) / (1.2 * warm_up)
    return (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up))) / 2


def one_cycle(done: float, rise: float = 0.3) -> float:
    """As :func:`cosine`, for torch's ``OneCycleLR`` with ``cycle_momentum=False``: half cosines up and down."""
    if done < rise:
        begin, end, part = 1 / 25, 1.0, done / rise
    else:
        begin, end, part = 1.0, 1 / 25e4, (done - rise) / (1 - rise)
    return end + (begin - end) * (1 + math.cos(math.pi * part)) / 2


def shifted(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images shifted by up to two pixels either way."""
    return data.shifted(inputs, generator), targets


def flipped(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images and their maps, half of them mirrored, left to right."""
    chosen = torch.rand(len(inputs), generator=generator) < 0.5
    mirrored = torch.where(chosen[:, None, None, None], inputs.flip(-1), inputs)
    return mirrored, torch.where(chosen[:, None, None], targets.flip(-1), targets)


def noisy(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Columns with normal noise of a tenth of their standard deviation."""
    return inputs + 0.1 * torch.randn(inputs.shape, generator=generator), targets


def unchanged(inputs: Tensor, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """No augmentation."""
    return inputs, targets


@functools.cache
def help_texts() -> Split:
    """The first 4,096 windows of Python's help texts for training, and the last tenth of all held out."""
    split = data.topics_text()
    return Split(split.train_inputs[:4096], split.train_targets[:4096], split.test_inputs, split.test_targets)


def error(logits: Tensor, labels: Tensor) -> float:
    """The error in percent."""
    return 100 * float((logits.argmax(1) != labels).double().mean())


def missed_overlap(logits: Tensor, kinds: Tensor) -> float:
    """100 minus the intersection over union in percent, mean over the kinds: ``(N, K, H, W)``, ``(N, H, W)``."""
    found, shares = logits.argmax(1), []
    for kind in range(logits.shape[1]):
        both, either = (found == kind) & (kinds == kind), (found == kind) | (kinds == kind)
        shares.append(float(both.sum()) / max(float(either.sum()), 1.0))
    return 100 - 100 * sum(shares) / len(shares)


def unexplained(outputs: Tensor, targets: Tensor) -> float:
    """The unexplained share of the targets' variance, in percent."""
    return 100 * float(F.mse_loss(outputs, targets) / targets.var(unbiased=False))


def nats(logits: Tensor, following: Tensor) -> float:
    """Cross entropy in nats per byte."""
    return float(next_byte_cross_entropy(logits, following))


@dataclass(frozen=True)
class Recipe:
    """A whole recipe.

    Attributes:
        name: The name on the command line and in file names.
        title: The title in tables.
        make_model: Makes the network from the global random state.
        loss: A function of outputs and targets to a scalar.
        data: Returns training and held-out examples.
        augment: Changes a batch at random.
        schedule: A function of the share of the run to the share of the highest learning rate.
        decay: Decoupled weight decay of AdamW, Muon and SOAP.
        sgd_decay: Weight decay of SGD.
        metric: A function of outputs and targets to the validation value; the lower the better.
        metric_title: The metric's name.
        batch_size: Examples in a batch.
        epochs: The epochs of the longest run.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    data: Callable[[], Split]
    augment: Augment
    schedule: Callable[[float], float]
    decay: float
    sgd_decay: float
    metric: Callable[[Tensor, Tensor], float]
    metric_title: str
    batch_size: int
    epochs: int

    @property
    def steps_per_epoch(self) -> int:
        """The number of whole batches."""
        return len(self.data().train_inputs) // self.batch_size

    def steps(self, length: float) -> int:
        """The steps of a run of this share of the longest one."""
        return max(2, round(length * self.epochs * self.steps_per_epoch))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless augmented batches, in a new order in each epoch."""
        split = self.data()
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(split.train_inputs), generator=generator)
            for indices in order.split(self.batch_size)[: self.steps_per_epoch]:
                yield self.augment(split.train_inputs[indices], split.train_targets[indices], generator)

    @torch.no_grad()
    def validate(self, model: nn.Module) -> tuple[float, float]:
        """Metric and loss on at most 1,024 held-out examples, in evaluation mode."""
        split = self.data()
        mode = model.training
        model.eval()
        outputs, targets = model(split.test_inputs[:1024]), split.test_targets[:1024]
        model.train(mode)
        return self.metric(outputs, targets), float(self.loss(outputs, targets))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "conv",
            "conv net, shifted MNIST-5000, one-cycle",
            conv_net,
            F.cross_entropy,
            data.mnist,
            shifted,
            one_cycle,
            0.01,
            5e-4,
            error,
            "error, %",
            128,
            12,
        ),
        Recipe(
            "resnet",
            "ResNet-20, a quarter as wide, shifted 16x16 MNIST-5000 on photographs, cosine",
            functools.partial(resnet20, width=4),
            F.cross_entropy,
            data.digits_on_photographs,
            shifted,
            cosine,
            0.01,
            5e-4,
            error,
            "error, %",
            128,
            8,
        ),
        Recipe(
            "vit",
            "ViT, width 48, 4 blocks, shifted MNIST-5000, cosine",
            VisionTransformer,
            F.cross_entropy,
            data.mnist,
            shifted,
            cosine,
            0.05,
            1e-4,
            error,
            "error, %",
            128,
            4,
        ),
        Recipe(
            "segmentation",
            "small U-Net, batch norm, mirrored generated shapes, cosine",
            SegmentationNet,
            F.cross_entropy,
            away_data.drawn_shapes,
            flipped,
            cosine,
            0.01,
            5e-4,
            missed_overlap,
            "100 - mean IoU, %",
            32,
            8,
        ),
        Recipe(
            "language_model",
            "causal transformer, width 64, 2 blocks, bytes of Python's help texts, cosine",
            LanguageModel,
            next_byte_cross_entropy,
            help_texts,
            unchanged,
            cosine,
            0.1,
            1e-4,
            nats,
            "nats a byte",
            32,
            2,
        ),
        Recipe(
            "table",
            "MLP, generated table with noise on its columns, regression, one-cycle",
            functools.partial(table_net, 24, 1, (128, 128, 64)),
            F.mse_loss,
            away_data.prices,
            noisy,
            one_cycle,
            0.01,
            1e-4,
            unexplained,
            "unexplained variance, %",
            512,
            64,
        ),
    )
}
