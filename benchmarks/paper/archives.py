"""Reads the official archives of CIFAR-10 and SVHN from a folder."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.contest.data import Split

CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_FILES = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
SVHN_PAGE = "http://ufldl.stanford.edu/housenumbers/"
SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")


class _ArrayUnpickler(pickle.Unpickler):
    """Builds NumPy arrays and plain objects, and runs nothing else that a file names."""

    allowed = frozenset({("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")})

    def find_class(self, module: str, name: str) -> Any:
        """Return a class that belongs to an array."""
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and an official file names nothing but arrays")
        return super().find_class(module, name)


def cifar10(folder: Path) -> Split:
    """CIFAR-10: 50,000 and 10,000 images as bytes, shape ``(N, 3, 32, 32)``, and labels 0 to 9.

    Args:
        folder: Holds the "python version": ``cifar-10-python.tar.gz``, or ``cifar-10-batches-py`` unpacked from it.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not of the official format.
    """
    contents = _cifar_contents(folder)
    parts = [_cifar_batch(name, contents[name]) for name in CIFAR_FILES]
    images, labels = zip(*parts, strict=True)
    return Split(torch.cat(images[:-1]), torch.cat(labels[:-1]), images[-1], labels[-1])


def _cifar_contents(folder: Path) -> Mapping[str, bytes]:
    unpacked, archive = folder / CIFAR_FOLDER, folder / CIFAR_ARCHIVE
    if unpacked.is_dir():
        where = unpacked
        contents = {name: (unpacked / name).read_bytes() for name in CIFAR_FILES if (unpacked / name).is_file()}
    elif archive.is_file():
        where, contents = archive, {}
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is not None and Path(member.name).name in CIFAR_FILES:
                    contents[Path(member.name).name] = file.read()
    else:
        raise FileNotFoundError(
            f"{folder} has neither {CIFAR_ARCHIVE} nor {CIFAR_FOLDER}/: put the python version of CIFAR-10 from "
            f"{CIFAR_PAGE} there."
        )
    missing = [name for name in CIFAR_FILES if name not in contents]
    if missing:
        raise FileNotFoundError(f"{where} lacks {', '.join(missing)}: {CIFAR_PAGE} has the whole {CIFAR_ARCHIVE}.")
    return contents


def _cifar_batch(name: str, content: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle raises whatever it comes to
        raise ValueError(f"{name} is no file of CIFAR-10's python version: {error}.") from error
    pixels, labels = (batch.get(key) for key in (b"data", b"labels")) if isinstance(batch, dict) else (None, None)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape != (len(labels or ()), 3 * 32 * 32)
    ):
        raise ValueError(
            f"{name} is no file of CIFAR-10's python version: it lacks data of bytes, (N, 3072), and labels."
        )
    return torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()), torch.tensor(labels, dtype=torch.long)


def svhn(folder: Path) -> Split:
    """SVHN's cropped digits: 73,257 and 26,032 images as bytes, shape ``(N, 3, 32, 32)``, and digits 0 to 9.

    Args:
        folder: Holds ``train_32x32.mat`` and ``test_32x32.mat`` ("format 2"). The additional images are not used.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is not of the official format.
    """
    missing = [name for name in SVHN_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}: {SVHN_PAGE} has them, as cropped digits.")
    (train_images, train_labels), (test_images, test_labels) = (_svhn_file(folder / name) for name in SVHN_FILES)
    return Split(train_images, train_labels, test_images, test_labels)


def _svhn_file(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    # scikit-learn, which the benchmarks need, brings scipy along.
    from scipy.io import loadmat

    try:
        content = loadmat(path)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{path.name} is no MATLAB file of SVHN's cropped digits: {error}.") from error
    pixels, labels = content.get("X"), content.get("y")
    if pixels is None or labels is None or pixels.dtype != np.uint8 or pixels.shape != (32, 32, 3, labels.size):
        raise ValueError(
            f"{path.name} is no file of SVHN's cropped digits: it lacks X of bytes, (32, 32, 3, N), and y."
        )
    # Digit 0 has the label 10.
    digits = torch.from_numpy(labels.reshape(-1).astype(np.int64) % 10)
    return torch.from_numpy(pixels.transpose(3, 2, 0, 1).copy()), digits


#: By the name of a data set, what reads it.
READERS: Mapping[str, Callable[[Path], Split]] = {"cifar10": cifar10, "svhn": svhn}
