"""The networks: cuda-convnet's for CIFAR-10, and the one of the dropout paper for SVHN.

**CIFAR-10.** ``layers-18pct.cfg`` and ``layer-params-18pct.cfg`` of cuda-convnet, which are public: layers, initial
weights, response normalisation, and pixels from 0 to 255 less the mean image. Its poolings cover the border, as
``ceil_mode`` does.

**SVHN.** The appendix of Srivastava et al., *Dropout: A Simple Way to Prevent Neural Networks from Overfitting*, JMLR
15, 2014: layers, shares of units that are kept, and inputs of mean 0 and variance 1 in each colour. Assumed: padding of
2, poolings that cover the border, and torch's initial weights. Left out: that paper's bound on the norm of weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normalised(nn.Module):
    """Bytes to numbers: (pixels - mean) / deviation.

    Args:
        mean: What broadcasts to an image, ``(3, 32, 32)``.
        deviation: The same.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)

    def forward(self, x: Tensor) -> Tensor:
        """The shape is unchanged."""
        return (x - self.mean) / self.deviation


class ResponseNorm(nn.Module):
    """cuda-convnet's ``rnorm``: x / (1 + scale · mean of x² over 3 x 3 locations of its channel) ^ power."""

    scale, power = 5e-5, 0.75

    def forward(self, x: Tensor) -> Tensor:
        """The shape is unchanged; beyond the border are zeros."""
        return x / (1 + self.scale * F.avg_pool2d(x.square(), 3, stride=1, padding=1)) ** self.power


def cifar10_net(images: Tensor) -> nn.Sequential:
    """Three 5x5 convolutions and a linear layer; 89,578 parameters.

    Args:
        images: Those that are trained on, as bytes.
    """
    head = nn.Linear(64 * 4 * 4, 10)
    net = nn.Sequential(
        Normalised(images.mean(0, dtype=torch.float32), torch.ones(())),
        *(nn.Conv2d(3, 32, 5, padding=2), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(), ResponseNorm()),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True), ResponseNorm()),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.AvgPool2d(3, 2, ceil_mode=True)),
        *(nn.Flatten(), head),
    )
    layers = [layer for layer in net if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer, deviation in zip(layers, (1e-4, 1e-2, 1e-2, 1e-2), strict=True):
        nn.init.normal_(layer.weight, std=deviation)
        assert layer.bias is not None
        nn.init.zeros_(layer.bias)
    return net


def svhn_net(images: Tensor) -> nn.Sequential:
    """Three 5x5 convolutions and three linear layers, with dropout; 13.7 million parameters.

    Args:
        images: Those that are trained on, as bytes.
    """

    def pooled(c_in: int, c_out: int, kept: float) -> tuple[nn.Module, ...]:
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        return nn.Dropout(1 - kept), nn.Conv2d(c_in, c_out, 5, padding=2), nn.ReLU(), pool

    counts = torch.stack([torch.bincount(images[:, channel].flatten(), minlength=256) for channel in range(3)]).double()
    shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double()
    mean = shares @ values
    deviation = (shares @ values.square() - mean.square()).sqrt()
    return nn.Sequential(
        Normalised(mean.float().reshape(3, 1, 1), deviation.float().reshape(3, 1, 1)),
        *(*pooled(3, 96, 0.9), *pooled(96, 128, 0.75), *pooled(128, 256, 0.75)),
        *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(256 * 4 * 4, 2048), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(2048, 2048), nn.ReLU()),
        *(nn.Dropout(0.5), nn.Linear(2048, 10)),
    )


#: By the name of a data set, its network, from the images that it is trained on.
NETWORKS: Mapping[str, Callable[[Tensor], nn.Sequential]] = {"cifar10": cifar10_net, "svhn": svhn_net}
