"""Two ranks on the CPU: each trains on its half of every batch, and all hold the same factors.

Lightning starts the second process itself. On GPUs, leave `accelerator` and `process_group_backend` out.

    python examples/ddp.py

Outcome: accuracy 0.99 after 60 steps on 2 ranks, which hold the same factors
"""

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_kfc import KFCCallback


class ConvNet(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)


if __name__ == "__main__":
    L.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train_set, test_set = random_split(TensorDataset(images, torch.tensor(digits.target)), [1437, 360])
    strategy, kfc = DDPStrategy(process_group_backend="gloo"), KFCCallback()
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=5, callbacks=[kfc], **options)
    trainer.fit(ConvNet(), DataLoader(train_set, 64, shuffle=True), DataLoader(test_set, 180))
    factors = torch.cat([factor.flatten() for layer in kfc.kfc.layers.values() for factor in layer.factors.values()])
    if not (everywhere := trainer.strategy.all_gather(factors)).eq(everywhere[0]).all():
        raise SystemExit("The factors differ between ranks.")
    if trainer.is_global_zero:
        accuracy = float(trainer.callback_metrics["accuracy"])
        print(f"accuracy {accuracy:.2f} after {trainer.global_step} steps on 2 ranks, which hold the same factors")
