"""Small models that others have built or that people build, each with a batch and its loss; nothing is downloaded.

The networks of transformers and MONAI have random weights; the others are made of torch's modules. The tests train each
of them, and ``python -m benchmarks.cost.foreign_models`` measures the cost of its steps.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS, LENGTH, EXAMPLES, LABELS = 12, 8, 16, 3


@dataclass(frozen=True)
class ForeignModel:
    """A model with a batch and its loss.

    Attributes:
        make: Makes the network.
        batch: Makes a batch.
        loss: The loss of a network on a batch.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[nn.Module, Any], Tensor]


# Networks of transformers, from a config; the loss is computed inside.


def pictures() -> dict[str, Tensor]:
    """Pictures of 32 x 32 pixels; the class is the brightest of three stripes."""
    x = torch.randn(EXAMPLES, 1, 32, 32)
    return {"pixel_values": x, "labels": x[..., :30].reshape(EXAMPLES, 32, LABELS, 10).mean((1, 3)).argmax(1)}


def words() -> dict[str, Tensor]:
    """Sentences that are to be repeated; the words below 3 have a meaning of their own."""
    ids = torch.randint(3, WORDS, (EXAMPLES, LENGTH))
    return {"input_ids": ids, "labels": ids}


def classified_words() -> dict[str, Tensor]:
    """Sentences; the class is that of the first word."""
    batch = words()
    return {**batch, "labels": batch["input_ids"][:, 0] % LABELS}


def sounds() -> dict[str, Tensor]:
    """Spectrograms with sentences."""
    return {"input_features": torch.randn(EXAMPLES, 8, 16), "labels": words()["labels"]}


def from_config(batch: Callable[[], Any], config: str, network: str, **values: Any) -> ForeignModel:
    """A network of transformers.

    Args:
        batch: Makes a batch.
        config: The class of the config.
        network: The class of the network.
        **values: The config's values.
    """

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        made: nn.Module = getattr(transformers, network)(getattr(transformers, config)(**values))
        return made

    return ForeignModel(make, batch, lambda network, batch: network(**batch).loss)


IMAGES = {"num_channels": 1, "num_labels": LABELS}
ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
WHISPER = {
    **{"vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}

TRANSFORMERS: dict[str, ForeignModel] = {
    "ViT": from_config(
        pictures, "ViTConfig", "ViTForImageClassification", **IMAGES, **ENCODER, image_size=32, patch_size=8
    ),
    "Swin": from_config(pictures, "SwinConfig", "SwinForImageClassification", **IMAGES, **SWIN),
    "ConvNeXt": from_config(pictures, "ConvNextConfig", "ConvNextForImageClassification", **IMAGES, **CONVNEXT),
    "ResNet": from_config(pictures, "ResNetConfig", "ResNetForImageClassification", **IMAGES, **RESNET),
    "BERT": from_config(
        classified_words,
        "BertConfig",
        "BertForSequenceClassification",
        **ENCODER,
        vocab_size=WORDS,
        max_position_embeddings=LENGTH,
        num_labels=LABELS,
    ),
    "GPT-2": from_config(words, "GPT2Config", "GPT2LMHeadModel", **GPT2, bos_token_id=1, eos_token_id=2),
    "LLaMA, grouped queries and a tied head": from_config(
        words, "LlamaConfig", "LlamaForCausalLM", **DECODER, **HEADS, tie_word_embeddings=True
    ),
    "T5": from_config(words, "T5Config", "T5ForConditionalGeneration", **T5, decoder_start_token_id=0),
    "Whisper": from_config(sounds, "WhisperConfig", "WhisperForConditionalGeneration", **WHISPER),
    "mixture of experts": from_config(
        words, "MixtralConfig", "MixtralForCausalLM", **DECODER, **HEADS, num_local_experts=4, num_experts_per_tok=2
    ),
    "state-space model": from_config(words, "MambaConfig", "MambaForCausalLM", **DECODER, state_size=4),
}


# Networks of MONAI, segmentation with its loss and a classification.


def scans(*space: int, examples: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Scans, and the voxels above 0 of a smoothed scan."""

    def make() -> tuple[Tensor, Tensor]:
        x = torch.randn(examples, 1, *space)
        pool = F.avg_pool3d if len(space) == 3 else F.avg_pool2d
        return x, (pool(x, 3, 1, 1) > 0).float()

    return make


def dice(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """MONAI's sum of a Dice loss and a cross entropy."""
    value: Tensor = importlib.import_module("monai.losses").DiceCELoss(sigmoid=True)(network(batch[0]), batch[1])
    return value


def of_monai(network: str, batch: Callable[[], Any], loss: Callable[..., Tensor], **values: Any) -> ForeignModel:
    """A network of MONAI.

    Args:
        network: Its class.
        batch: Makes a batch.
        loss: Its loss.
        **values: Its arguments.
    """

    def make() -> nn.Module:
        made: nn.Module = getattr(importlib.import_module("monai.networks.nets"), network)(in_channels=1, **values)
        return made

    return ForeignModel(make, batch, loss)


MONAI: dict[str, ForeignModel] = {
    "U-Net in three dimensions, instance norm": of_monai(
        "UNet",
        scans(16, 16, 16, examples=2),
        dice,
        spatial_dims=3,
        out_channels=1,
        channels=(4, 8, 16),
        strides=(2, 2),
        num_res_units=1,
    ),
    "Swin UNETR": of_monai(
        "SwinUNETR",
        scans(64, 64, examples=2),
        dice,
        spatial_dims=2,
        out_channels=1,
        feature_size=12,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 2, 2),
    ),
    "DenseNet": of_monai(
        "DenseNet",
        lambda: tuple(pictures().values()),
        lambda network, batch: F.cross_entropy(network(batch[0]), batch[1]),
        spatial_dims=2,
        out_channels=LABELS,
        init_features=8,
        growth_rate=4,
        block_config=(2, 2),
    ),
}


# Models of torch's modules that compute their loss themselves, from 64 vectors of 16 numbers.


class VariationalAutoencoder(nn.Module):
    """Reconstruction and divergence of a sampled code."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 12), nn.Tanh(), nn.Linear(12, 16))

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        reconstruction = F.binary_cross_entropy_with_logits(self.decoder(code), (x > 0).float(), reduction="sum")
        return (reconstruction + 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()) / len(x)


class ActorCritic(nn.Module):
    """A policy by the log-probability of its actions times their advantage, and a value head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 12), nn.Tanh())
        self.policy, self.value = nn.Linear(12, 3), nn.Linear(12, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        features = self.body(x)
        value, returns = self.value(features).squeeze(-1), x[:, :4].sum(-1)
        actions = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        log_probabilities = torch.distributions.Categorical(logits=self.policy(features)).log_prob(actions)
        advantages = (returns - value.detach()).abs()
        return -(log_probabilities * advantages).mean() + 0.5 * F.mse_loss(value, returns)


class TwoTowers(nn.Module):
    """Two encoders whose matching outputs are to be alike, with a trained temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 6)) for _ in range(2))
        self.temperature = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        left, right = F.normalize(self.left(x[:, :8]), dim=-1), F.normalize(self.right(x[:, 4:12]), dim=-1)
        scores, pairs = self.temperature.exp() * left @ right.T, torch.arange(len(x))
        return (F.cross_entropy(scores, pairs) + F.cross_entropy(scores.T, pairs)) / 2


class Siamese(nn.Module):
    """One encoder for both inputs of a pair, and a margin on their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        distances = F.pairwise_distance(self.encoder(x[:, :8]), self.encoder(x[:, 8:]))
        alike = (x[:, 0] * x[:, 8] > 0).float()
        return (alike * distances.square() + (1 - alike) * (1.5 - distances).relu().square()).mean()


class Detector(nn.Module):
    """Scores and boxes at two scales, as lists: a focal loss of the scores, a smooth one of the boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1)])
        self.scores, self.boxes = nn.Conv2d(6, 2, 1), nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        features, scores, boxes = x.reshape(-1, 1, 4, 4), [], []
        for stage in self.stages:
            features = stage(features).relu()
            scores.append(self.scores(features).flatten(2))
            boxes.append(self.boxes(features).flatten(2))
        found = torch.cat(scores, -1)
        targets = (x[:, :1, None] > 0).float().expand_as(found)
        plain = F.binary_cross_entropy_with_logits(found, targets, reduction="none")
        focal = ((1 - (-plain).exp()).square() * plain).mean()
        return focal + F.smooth_l1_loss(torch.cat(boxes, -1), x[:, :4, None].expand(-1, -1, found.shape[-1]))


class Denoiser(nn.Module):
    """A U-Net with attention at its bottom that predicts noise, told the time by an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
        self.down, self.bottom = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.norm, self.attention = nn.GroupNorm(2, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.out = nn.ConvTranspose2d(8, 8, 2, stride=2), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        images, times = x.reshape(-1, 1, 4, 4).repeat(1, 1, 2, 2), torch.rand(len(x), 1)
        noise = torch.randn_like(images)
        mixed = (1 - times)[..., None, None] * images + times[..., None, None] * noise
        top = F.silu(self.down(mixed) + self.time(times)[..., None, None])
        low = self.norm(self.bottom(top))
        tokens = low.flatten(2).mT
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.reshape(low.shape)
        return F.mse_loss(self.out(torch.cat([top, self.up(low + attended)], 1)), noise)


class Transcriber(nn.Module):
    """A recurrent network with the loss of an unaligned sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.out = nn.GRU(2, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        log_probabilities = self.out(self.recurrent(x.reshape(-1, 8, 2))[0]).log_softmax(-1)
        targets = 1 + (x[:, :3] > 0).long()
        frames, symbols = (torch.full((len(x),), length) for length in (8, 3))
        return F.ctc_loss(log_probabilities.transpose(0, 1), targets, frames, symbols)


class Graph(nn.Module):
    """Messages along edges, summed at their nodes, and the class of each node."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update, self.out = nn.Linear(32, 12), nn.Linear(28, 12), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Its loss."""
        start, end = torch.arange(len(x)).repeat(2), torch.cat([torch.arange(len(x)).roll(shift) for shift in (1, 5)])
        messages = self.message(torch.cat([x[start], x[end]], 1)).relu()
        received = torch.zeros(len(x), 12).index_add(0, end, messages)
        scores = self.out(self.update(torch.cat([x, received], 1)).tanh())
        return F.cross_entropy(scores, (x[:, 0] + x[:, 1].roll(-1) > 0).long())


def vectors() -> Tensor:
    """64 vectors in a space of four directions, which the code of an autoencoder can hold in part."""
    return torch.randn(64, 4) @ torch.randn(4, 16) / 2


def own_loss(network: nn.Module, batch: Tensor) -> Tensor:
    """The output of a network that computes its loss."""
    loss: Tensor = network(batch)
    return loss


OWN: dict[str, type[nn.Module]] = {
    "variational autoencoder": VariationalAutoencoder,
    "actor and critic": ActorCritic,
    "two towers, contrastive": TwoTowers,
    "Siamese net": Siamese,
    "detection head": Detector,
    "diffusion U-Net with attention": Denoiser,
    "recurrent net with CTC": Transcriber,
    "graph net": Graph,
}

#: All models, by name.
MODELS: dict[str, ForeignModel] = {
    **TRANSFORMERS,
    **MONAI,
    **{name: ForeignModel(make, vectors, own_loss) for name, make in OWN.items()},
}
