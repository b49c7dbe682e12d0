"""Resume from a checkpoint: the resumed run is the uninterrupted one, bit for bit. Nothing is to be done for it.

    python examples/resume.py

Outcome: largest difference of a weight 0 after 90 steps, resumed after half of them
"""

import tempfile
from pathlib import Path

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from lightning_kfc import KFCCallback


class ConvNet(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


def train(epochs, checkpoint=None):
    """Train to an epoch with new objects, as a new process would, and return the trainer."""
    L.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    data = TensorDataset(images, torch.tensor(digits.target))
    # An order that depends on the epoch's number alone; shuffle=True depends on how many epochs came before.
    loader = DataLoader(data, 128, sampler=DistributedSampler(data, num_replicas=1, rank=0))
    options = {"accelerator": "cpu", "enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=[KFCCallback()], **options)
    trainer.fit(ConvNet(), loader, ckpt_path=checkpoint)
    return trainer


if __name__ == "__main__":
    whole = train(6)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "half-way.ckpt"
        train(3).save_checkpoint(checkpoint)
        resumed = train(6, checkpoint)
    weights = [torch.nn.utils.parameters_to_vector(t.lightning_module.parameters()) for t in (whole, resumed)]
    difference = float((weights[0] - weights[1]).detach().abs().max())
    print(
        f"largest difference of a weight {difference:g} after {resumed.global_step} steps, resumed after half of them"
    )
