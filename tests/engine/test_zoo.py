"""Networks that people bring, whole, under the callback: the loss falls and no trainable parameter is left out.

Those of Hugging Face are built from a config with random weights; nothing is downloaded. Their loss is computed
inside the model, and discovered there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
from tests.helpers.nets import classes

# Lightning's own advice, and its own use of what torch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.`"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches"),
    pytest.mark.slow,
]

VOCABULARY, LENGTH, EXAMPLES, LABELS = 12, 8, 24, 3


class Task(pl.LightningModule):
    """A network with a loss of its batch."""

    def __init__(self, network: nn.Module, loss: Callable[[Any, Any], Tensor], lr: float = 0.3) -> None:
        super().__init__()
        self.network, self.loss, self.lr = network, loss, lr
        self.losses: list[float] = []

    def training_step(self, batch: Any) -> Tensor:
        value = self.loss(self.network, batch)
        self.losses.append(float(value.detach()))
        return value

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


def train(task: Task, batch: Any, steps: int = 40) -> KFCCallback:
    """Train on one batch, again and again."""
    # With one sampled target for each of 24 examples the curvature is noisy: a small trust region.
    callback = KFCCallback(kl_clip=0.003)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, DataLoader([batch] * steps, batch_size=None))
    return callback


def assert_trained(task: Task, callback: KFCCallback, *, to: float) -> None:
    """The loss fell to a fraction of its start, every parameter has a curvature, and nothing went wrong on the way."""
    start, end = sum(task.losses[:3]) / 3, sum(task.losses[-5:]) / 5
    assert end < to * start, f"loss fell from {start:.4g} to {end:.4g}, a ratio of {end / start:.3g}"
    coverage = callback.kfc.coverage()
    assert sum(row.numel for row in coverage) == sum(p.numel() for p in task.parameters() if p.requires_grad)
    assert {row.parameter for row in coverage if row.treatment == "plain"} == set()
    # A step taken back or shortened is the trust region at work; nothing else may happen.
    at_work = ("undone_steps", "shortened_steps")
    events = {name: count for name, count in callback.kfc.events.state_dict().items() if name not in at_work}
    assert not any(events.values()), callback.kfc.events


def token_ids() -> Tensor:
    return classes(EXAMPLES, LENGTH, count=VOCABULARY)


def labels() -> Tensor:
    return classes(EXAMPLES, count=LABELS, seed=3)


# Hugging Face. Imported in the tests: the import takes seconds.

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_vision_transformer_trains_with_every_parameter_covered(attention: str) -> None:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, image_size=8, patch_size=4, num_channels=1, num_labels=LABELS)
    config._attn_implementation = attention
    task = Task(ViTForImageClassification(config), lambda network, batch: network(**batch).loss)
    batch = {"pixel_values": torch.randn(EXAMPLES, 1, 8, 8), "labels": labels()}
    callback = train(task, batch)
    assert_trained(task, callback, to=0.6)
    assert {"network.vit.layers.0.attention.q_proj", "network.classifier"} <= set(callback.kfc.layers)


def test_gpt2_trains_with_its_transposed_linears_preconditioned_and_its_tied_head_listed() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    task = Task(GPT2LMHeadModel(config), lambda network, batch: network(**batch).loss)
    ids = token_ids()
    callback = train(task, {"input_ids": ids, "labels": ids})
    assert_trained(task, callback, to=0.7)
    rows = {row.parameter: row for row in callback.kfc.coverage()}
    assert rows["network.transformer.h.0.attn.c_attn.weight"].treatment == "kfc"
    assert rows["network.transformer.h.0.attn.c_attn.weight"].factor_shapes == {"A": (17, 17), "G": (48, 48)}
    tied = rows["network.transformer.wte.weight"]
    assert (tied.treatment, tied.reason) == ("diagonal", "shared with a module that uses it otherwise")


@pytest.mark.parametrize("task_of", ["classification", "masked words"])
def test_bert_trains_with_every_parameter_covered(task_of: str) -> None:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(**SMALL, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=LABELS)
    kind = BertForSequenceClassification if task_of == "classification" else BertForMaskedLM
    task = Task(kind(config), lambda network, batch: network(**batch).loss)
    ids = token_ids()
    target = labels() if task_of == "classification" else ids.where(ids % 3 == 0, -100)
    padding = torch.ones_like(ids)
    padding[:4, -3:] = 0
    callback = train(task, {"input_ids": ids, "labels": target, "attention_mask": padding})
    assert_trained(task, callback, to=0.7)
    rows = {row.parameter: row for row in callback.kfc.coverage()}
    tied = task_of == "masked words"
    assert rows["network.bert.embeddings.word_embeddings.weight"].treatment == ("diagonal" if tied else "kfc")
    assert rows["network.bert.encoder.layer.1.attention.self.query.weight"].treatment == "kfc"


# Of torch's own modules.


class LSTMClassifier(nn.Module):
    """Words, a two-layer LSTM in both directions over sequences of different lengths, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12, LABELS)

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.words(ids), lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = self.lstm(packed)
        return self.head(torch.cat([hidden[-2], hidden[-1]], 1))


def test_an_lstm_classifier_trains_with_its_gates_preconditioned() -> None:
    task = Task(LSTMClassifier(), lambda network, batch: F.cross_entropy(network(*batch[:2]), batch[2]))
    callback = train(task, (token_ids(), 1 + classes(EXAMPLES, count=LENGTH, seed=4), labels()))
    assert_trained(task, callback, to=0.7)
    assert {row.treatment for row in callback.kfc.coverage()} == {"kfc"}


class Siamese(nn.Module):
    """One encoder on both sides, and whether the two belong together from their distance."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 6), nn.Tanh()
        )
        self.scale = nn.Linear(1, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        distance = (self.encoder(left) - self.encoder(right)).square().sum(1, keepdim=True)
        return self.scale(distance).squeeze(1)


def test_a_siamese_net_trains_with_the_rows_of_both_sides() -> None:
    left = torch.randn(EXAMPLES, 1, 6, 6)
    same = classes(EXAMPLES, count=2).float()
    right = torch.where(same[:, None, None, None] > 0, left + 0.1 * torch.randn_like(left), torch.randn_like(left))

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(network(*batch[:2]), batch[2])

    task = Task(Siamese(), loss)
    callback = train(task, (left, right, same))
    assert_trained(task, callback, to=0.6)
    assert {row.treatment for row in callback.kfc.coverage()} == {"kfc"}


class EncoderClassifier(nn.Module):
    """Words and learned positions, ``nn.TransformerEncoder``, a mean over what is not padding, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 8, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, LABELS)

    def forward(self, ids: Tensor) -> Tensor:
        padding = ids == 0
        padding[:, 0] = False
        hidden = self.encoder(self.words(ids) + self.positions, src_key_padding_mask=padding)
        return self.head(hidden.masked_fill(padding[..., None], 0).sum(1) / (~padding).sum(1, keepdim=True))


def test_a_transformer_encoder_classifier_trains_with_its_attention_preconditioned() -> None:
    task = Task(EncoderClassifier(), lambda network, batch: F.cross_entropy(network(batch[0]), batch[1]))
    callback = train(task, (token_ids(), labels()))
    assert_trained(task, callback, to=0.7)
    rows = {row.parameter: row.treatment for row in callback.kfc.coverage()}
    assert rows["network.encoder.layers.1.self_attn.in_proj_weight"] == "kfc"
    assert rows["network.encoder.layers.1.self_attn.out_proj.weight"] == "kfc"
    assert rows["network.positions"] == "diagonal"
