"""The shapes of layers in three well-known networks, for the cost of their curvature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Above this many dimensions a factor is its diagonal (the default of ``max_factor_dim``).
LARGEST = 10_000


@dataclass(frozen=True)
class LayerShape:
    """One layer.

    Attributes:
        name: Its name.
        d_in: Dimensions of A.
        d_out: Dimensions of G.
        rows: Rows per example: output locations, or tokens.
        one_hot: Whether its rows are one-hot (an embedding), which need no product.
    """

    name: str
    d_in: int
    d_out: int
    rows: int
    one_hot: bool = False

    def dense(self) -> tuple[int, ...]:
        """The dimensions of its dense factors."""
        sides = (self.d_out,) if self.one_hot else (self.d_in, self.d_out)
        return tuple(d for d in sides if d <= LARGEST)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of its factors, as in an adapter."""
        return {
            name: (1, d, d) if d in self.dense() and not (self.one_hot and name == "A") else (1, d)
            for name, d in (("A", self.d_in), ("G", self.d_out))
        }

    def parameters(self) -> int:
        """The number of its parameters."""
        return self.d_in * self.d_out


def resnet50(pixels: int = 224, classes: int = 1000) -> list[LayerShape]:
    """ResNet-50: convolutions without bias, and the head with one."""
    layers = [LayerShape("conv1", 3 * 49, 64, (pixels // 2) ** 2)]
    width = 64
    for stage, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
        side = pixels // 4 // 2**stage
        for block in range(blocks):
            # The first block of a stage halves the resolution in its 3x3 convolution.
            before = side * 2 if block == 0 and stage else side
            name = f"layer{stage + 1}.{block}"
            layers.append(LayerShape(f"{name}.conv1", width, planes, before**2))
            layers.append(LayerShape(f"{name}.conv2", 9 * planes, planes, side**2))
            layers.append(LayerShape(f"{name}.conv3", planes, 4 * planes, side**2))
            if block == 0:
                layers.append(LayerShape(f"{name}.downsample", width, 4 * planes, side**2))
            width = 4 * planes
    return [*layers, LayerShape("fc", width + 1, classes, 1)]


def _transformer(layers: int, d: int, tokens: int) -> list[LayerShape]:
    one = [("query", d, d), ("key", d, d), ("value", d, d), ("out", d, d), ("fc1", d, 4 * d), ("fc2", 4 * d, d)]
    return [LayerShape(f"{i}.{name}", d_in + 1, d_out, tokens) for i in range(layers) for name, d_in, d_out in one]


def vit_large(classes: int = 1000) -> list[LayerShape]:
    """ViT-L/16 on 224 pixels: 24 layers of width 1,024 on 197 tokens."""
    blocks = _transformer(24, 1024, 197)
    return [LayerShape("patches", 3 * 256 + 1, 1024, 196), *blocks, LayerShape("head", 1025, classes, 1)]


def transformer_1b(tokens: int = 2048, words: int = 32_000) -> list[LayerShape]:
    """A language model of 1.1 billion parameters: 20 layers of width 2,048, and an untied head."""
    blocks = _transformer(20, 2048, tokens)
    embedding = LayerShape("embedding", words, 2048, tokens, one_hot=True)
    return [embedding, *blocks, LayerShape("head", 2048, words, tokens)]


@dataclass(frozen=True)
class Network:
    """A network with the batch of one rank.

    Attributes:
        title: Its name.
        layers: Its layers.
        examples: Examples of a rank's batch.
    """

    title: str
    layers: Sequence[LayerShape]
    examples: int

    def parameters(self) -> int:
        """The number of parameters in its layers."""
        return sum(layer.parameters() for layer in self.layers)

    def step_flops(self) -> float:
        """Floating-point operations of a forward and a backward of a rank's batch."""
        rows = ((layer, layer.rows * self.examples) for layer in self.layers if not layer.one_hot)
        return float(sum(6 * layer.parameters() * count for layer, count in rows))


NETWORKS = {
    "resnet50": Network("ResNet-50, 32 images a rank", resnet50(), 32),
    "vit_large": Network("ViT-L/16, 32 images a rank", vit_large(), 32),
    "transformer_1b": Network("Transformer of 1.1 B parameters, 4 x 2,048 tokens a rank", transformer_1b(), 4),
}
