"""Hugging Face's networks from a config, with random weights: each trains with the defaults, and is accounted for."""

from __future__ import annotations

import importlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_kfc import KFCCallback
from tests.engine.test_zoo import Task
from tests.helpers.lightning_nets import QUIET, trainer
from tests.helpers.nets import classes

pytestmark = [*QUIET, pytest.mark.slow]

WORDS, LENGTH, EXAMPLES, LABELS, STEPS = 12, 8, 16, 3, 30
DECODER = {
    "vocab_size": WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS = {"intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
WHISPER = {
    **{"vocab_size": WORDS, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "num_mel_bins": 8},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"max_source_positions": 8, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None},
}
IMAGES = {"num_channels": 1, "num_labels": LABELS}


def pictures() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(EXAMPLES, 1, 32, 32), "labels": classes(EXAMPLES, count=LABELS)}


def words() -> dict[str, Tensor]:
    ids = 3 + classes(EXAMPLES, LENGTH, count=WORDS - 3)
    return {"input_ids": ids, "labels": ids}


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(EXAMPLES, 8, 16), "labels": words()["labels"]}


#: The class of the config, its values, the class of the network, and the batch.
NETWORKS: dict[str, tuple[str, dict[str, Any], str, Any]] = {
    "Swin": (
        "SwinConfig",
        {
            **IMAGES,
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 8,
            "depths": [2, 2],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "SwinForImageClassification",
        pictures,
    ),
    "ConvNeXt": (
        "ConvNextConfig",
        {**IMAGES, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0},
        "ConvNextForImageClassification",
        pictures,
    ),
    "ResNet": (
        "ResNetConfig",
        {**IMAGES, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "ResNetForImageClassification",
        pictures,
    ),
    "LLaMA, grouped queries and a tied head": (
        "LlamaConfig",
        {**DECODER, **HEADS, "tie_word_embeddings": True},
        "LlamaForCausalLM",
        words,
    ),
    "T5": ("T5Config", {**T5, "decoder_start_token_id": 0}, "T5ForConditionalGeneration", words),
    "Whisper": ("WhisperConfig", WHISPER, "WhisperForConditionalGeneration", sounds),
    "mixture of experts": (
        "MixtralConfig",
        {**DECODER, **HEADS, "num_local_experts": 4, "num_experts_per_tok": 2},
        "MixtralForCausalLM",
        words,
    ),
    "state-space model": ("MambaConfig", {**DECODER, "state_size": 4}, "MambaForCausalLM", words),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_from_a_config_trains_with_the_defaults_and_is_accounted_for(name: str) -> None:
    transformers = importlib.import_module("transformers")
    config_class, values, network_class, batch = NETWORKS[name]
    torch.manual_seed(0)
    network = getattr(transformers, network_class)(getattr(transformers, config_class)(**values))
    task, callback = Task(network, lambda network, batch: network(**batch).loss, lr=0.5), KFCCallback()
    trainer(callback, max_steps=STEPS).fit(task, DataLoader([batch()] * STEPS, batch_size=None))
    start, end = sum(task.losses[:3]) / 3, sum(task.losses[-3:]) / 3
    coverage = callback.kfc.coverage()
    treatments = Counter({row.treatment: 0 for row in coverage})
    for row in coverage:
        treatments[row.treatment] += row.numel
    print(f"{name}: loss {start:.3g} to {end:.3g}, {dict(treatments)}, {callback.kfc.events}")
    assert end < 0.8 * start
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert sum(treatments.values()) - treatments["frozen"] == trained
    assert all(row.reason for row in coverage if row.treatment == "plain")
