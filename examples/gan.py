"""A GAN: manual optimization with two optimizers under one callback.

Each loss must go through `self.manual_backward`. The learning rate is 0.1 without momentum, since neither of two
networks that chase each other should take long steps; it was chosen on this run.

    python examples/gan.py

Outcome: a made digit is 1.12 from the nearest real one, a real one 1.03 from the nearest other
"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFCCallback


class GAN(L.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        layers = (nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.generator = nn.Sequential(*layers)
        self.discriminator = nn.Sequential(nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 1))

    def step(self, optimizer, loss):
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def training_step(self, batch, batch_idx):
        for_d, for_g = self.optimizers()
        real, noise = self.discriminator(batch[0]), torch.randn(len(batch[0]), 32)
        fake = self.discriminator(self.generator(noise).detach())
        loss = F.binary_cross_entropy_with_logits(real, torch.full_like(real, 0.9))
        self.step(for_d, loss + F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake)))
        self.toggle_optimizer(for_g)
        fake = self.discriminator(self.generator(noise))
        self.step(for_g, F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake)))
        self.untoggle_optimizer(for_g)

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.discriminator, self.generator)]


if __name__ == "__main__":
    L.seed_everything(0)
    digits = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    trainer = L.Trainer(accelerator="cpu", max_epochs=60, callbacks=[KFCCallback()], enable_progress_bar=False)
    trainer.fit(model := GAN(), DataLoader(TensorDataset(digits), 128, shuffle=True, drop_last=True))
    made = model.generator(torch.randn(len(digits), 32)).detach()
    nearest = torch.cdist(made, digits).amin(1).mean()
    between = torch.cdist(digits, digits).topk(2, largest=False).values[:, 1].mean()
    print(f"a made digit is {nearest:.2f} from the nearest real one, a real one {between:.2f} from the nearest other")
