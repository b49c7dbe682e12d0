"""Segment images: a U-Net finds bright discs among noise, with a loss term for every pixel.

    python examples/segmentation.py

Outcome: intersection over union 0.80 on held-out images after 96 steps
"""

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback


def discs(count):
    """Noisy images of shape (count, 1, 24, 24) with a faint disc in each, and the masks of the discs."""
    y, x = torch.meshgrid(torch.arange(24.0), torch.arange(24.0), indexing="ij")
    centre, radius = 6 + 12 * torch.rand(2, count, 1, 1), 3 + 3 * torch.rand(count, 1, 1)
    masks = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 < radius**2).float().unsqueeze(1)
    return TensorDataset(masks + torch.randn_like(masks), masks)


def block(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class UNet(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.fine, self.coarse = block(1, 8), nn.Sequential(nn.MaxPool2d(2), block(8, 16), block(16, 16))
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.head = nn.Sequential(block(16, 8), nn.Conv2d(8, 1, 1))

    def forward(self, images):
        fine = self.fine(images)
        return self.head(torch.cat([fine, self.up(self.coarse(fine))], dim=1))

    def training_step(self, batch, batch_idx):
        return F.binary_cross_entropy_with_logits(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        found, mask = self(batch[0]) > 0, batch[1].bool()
        self.log("overlap", (found & mask).sum() / (found | mask).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


if __name__ == "__main__":
    L.seed_everything(0)
    trainer = L.Trainer(accelerator="cpu", max_epochs=6, callbacks=[KFCCallback()], enable_progress_bar=False)
    trainer.fit(UNet(), DataLoader(discs(1024), 64, shuffle=True), DataLoader(discs(256), 256))
    overlap = float(trainer.callback_metrics["overlap"])
    print(f"intersection over union {overlap:.2f} on held-out images after {trainer.global_step} steps")
