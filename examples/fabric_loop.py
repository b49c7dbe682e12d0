"""A loop of your own with Lightning Fabric: the engine `KFC` in three calls, in the place of the callback.

    python examples/fabric_loop.py

Outcome: accuracy 0.98 on held-out digits after 60 steps
"""

import torch
from lightning.fabric import Fabric
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_kfc import KFC

if __name__ == "__main__":
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train_set, test_set = random_split(TensorDataset(images, torch.tensor(digits.target)), [1437, 360])

    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    kfc = KFC(model)  # before Fabric wraps the model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    for _ in range(5):
        for x, y in fabric.setup_dataloaders(DataLoader(train_set, 128, shuffle=True)):
            wrapped_optimizer.zero_grad()
            with kfc.capture():  # 1. around forward and loss
                loss = F.cross_entropy(wrapped(x), y)
            kfc.update(loss)  # 2. before backward
            fabric.backward(loss)
            kfc.precondition(optimizer=optimizer)  # 3. before the step
            wrapped_optimizer.step()

    x, y = fabric.to_device(test_set[:])
    with torch.no_grad():
        accuracy = float((wrapped(x).argmax(1) == y).float().mean())
    print(f"accuracy {accuracy:.2f} on held-out digits after {kfc.last_step.step + 1} steps")
