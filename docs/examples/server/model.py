"""A small real model with adapters of its own for each tenant: cylora's digit reader, in NumPy.

The frozen base network reads upright digits and takes turned ones for fours. A tenant whose scanner turns its pages
corrects the answers, and that tenant's adapters learn it; the base, and every other tenant, stays as it was.
"""

import zlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig
from cylora.tasks.digits import DigitsTask

__all__ = ["DIGITS", "MAX_IMAGES", "PIXELS", "DigitReader"]

PIXELS = 64
DIGITS = 10
# Sixteen rows of this network are what OpenBLAS multiplies on the caller's thread; above, it starts others that spin.
MAX_IMAGES = 16
LAYERS = {"hidden1": (64, 128), "hidden2": (128, 128), "output": (128, 10)}  # name: (d_in, d_out)

Floats = NDArray[np.float32]
Adapters = Mapping[str, LoraAdapter]


class DigitReader:
    """The frozen base, and what a server does with it and one tenant's adapters. Safe for any number of threads.

    Parameters
    ----------
    rank : int >= 1
        Of every tenant's adapters.
    """

    def __init__(self, rank: int = 8) -> None:
        self.lora_config = LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=tuple(LAYERS))
        self._base = DigitsTask(self.lora_config, seed=0).base  # trained here and now, in half a second

    def new_adapters(self, tenant: str) -> AdapterSet:
        """Return the adapters a tenant begins with: its own A, and B zero, so that it reads as the base does."""
        return AdapterSet(LAYERS, self.lora_config, seed=zlib.crc32(tenant.encode()))

    def predict(self, adapters: Adapters, images: Floats) -> list[int]:
        """Return the digit in each of ``images``, float32 (up to 16, 64)."""
        _, logits = self._forward(adapters, images)
        return [int(digit) for digit in logits.argmax(axis=1)]

    def loss_and_gradients(self, adapters: AdapterSet, images: Floats, labels: list[int]) -> tuple[float, Gradients]:
        """Return the mean cross-entropy of ``images``, which show ``labels``, and its gradients by A and B."""
        inputs, logits = self._forward(adapters, images)
        rows = np.arange(len(labels))
        grad = np.exp(logits - logits.max(axis=1, keepdims=True))
        grad /= grad.sum(axis=1, keepdims=True)
        loss = float(-np.log(np.maximum(grad[rows, labels], np.float32(1e-30))).mean())
        grad[rows, labels] -= 1
        grad /= len(labels)
        gradients = Gradients(adapters)
        for name in reversed(LAYERS):
            adapters[name].gradients(inputs[name], grad, out=gradients[name])
            if name != "hidden1":  # whose input, the image, needs no gradient
                back = grad @ self._base[name] + adapters[name].input_gradient(grad)
                grad = back * (inputs[name] > 0)
        return loss, gradients

    def _forward(self, adapters: Adapters, images: Floats) -> tuple[dict[str, Floats], Floats]:
        """Return every layer's input, by the layer's name, and the logits."""
        inputs: dict[str, Floats] = {}
        x = z = images
        for name in LAYERS:
            inputs[name] = x
            z = x @ self._base[name].T + self._base[f"{name}.bias"] + adapters[name].apply(x)
            x = np.maximum(z, 0)
        return inputs, z
