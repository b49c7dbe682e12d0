"""A training loop of one's own with Lightning Fabric: the engine ``KFC`` in place of the callback.

Three calls are added to the loop, marked below. The numbers that the callback would log are at ``kfc.last_step``.

python examples/fabric_loop.py
"""

from __future__ import annotations

import time

import torch
from _shared import mnist_split, quick
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_kfc import KFC


def conv_net() -> nn.Sequential:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def train(fabric: Fabric, loader: DataLoader[tuple[Tensor, ...]], held_out: TensorDataset, epochs: int) -> None:
    """Train, and print loss and accuracy on the digits held out after each epoch."""
    model = conv_net()
    # KFC is given the module itself, before Fabric wraps it.
    kfc = KFC(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(loader)
    fabric.print(kfc.coverage())

    started = time.perf_counter()
    for epoch in range(epochs):
        wrapped.train()
        for images, labels in loader:
            wrapped_optimizer.zero_grad()
            with kfc.capture():  # 1. around forward and loss: records them where statistics are due
                loss = F.cross_entropy(wrapped(images), labels)
            kfc.update(loss)  # 2. before backward: refreshes the curvature where due
            fabric.backward(loss)
            kfc.precondition(optimizer=optimizer)  # 3. before the step: replaces the gradients
            wrapped_optimizer.step()

        wrapped.eval()
        with torch.no_grad():
            test_images, test_labels = (fabric.to_device(part) for part in held_out.tensors)
            logits = wrapped(test_images)
        accuracy = (logits.argmax(1) == test_labels).float().mean()
        seconds, clip = time.perf_counter() - started, kfc.last_step.kl_clip_factor
        fabric.print(
            f"epoch {epoch + 1:2}, {seconds:5.1f} s: loss of the last batch {loss:.4f}, held-out loss "
            f"{F.cross_entropy(logits, test_labels):.4f}, accuracy {accuracy:.4f}, last KL clip factor {clip:.2f}"
        )


def main() -> None:
    """Train on 4,096 digits in batches of 512, and measure on 904 others."""
    small = quick(__doc__)
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    fabric.seed_everything(0, verbose=False)
    train_images, train_labels, test_images, test_labels = mnist_split(256 if small else 4096)
    loader = DataLoader(TensorDataset(train_images, train_labels), 128 if small else 512, shuffle=True)
    train(fabric, loader, TensorDataset(test_images[:904], test_labels[:904]), epochs=1 if small else 10)


if __name__ == "__main__":
    main()
