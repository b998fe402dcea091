"""The built-in task: a digit reader meets another scanner, which delivers every page turned by a quarter.

A frozen 64-128-128-10 network reads upright handwritten digits well and turned ones no better than by chance: it takes
nearly all of them for fours, since a turned digit reaches the left edge, where upright nearly none but fours have ink.
LoRA adapters on its three layers learn the turned ones from a thousand batches; the network's own weights never change.
Adapters that have learned one domain are not made to keep the other, and here they lose it: the measures report both.
Without them the network reads upright digits as before, to the bit.

The images are real (`data/digits.txt` names source and licence). A quarter of them, drawn by the seed, is held out:
neither the pre-training nor the adapters ever see one, turned or not, and all accuracies are on these.
"""

import math
from collections.abc import Mapping
from importlib import resources
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cylora.adapter import AdapterSet, Gradients, LoraAdapter
from cylora.config import LoraConfig
from cylora.errors import ConfigError, FormatError
from cylora.flat import FlatBuffer, FloatArray
from cylora.optimizer import Adam

__all__ = ["DigitsTask", "parse_digits"]

IMAGES = 1797
SIDE = 8
PIXELS = SIDE * SIDE
DIGITS = 10
ALPHABET = "0123456789abcdefg"  # ink from 0 to 16

WIDTH = 128
LAYERS = {"hidden1": (PIXELS, WIDTH), "hidden2": (WIDTH, WIDTH), "output": (WIDTH, DIGITS)}  # name: (d_in, d_out)
HELD_OUT = IMAGES // 4
BATCH = 64
ROWS = 16
PRETRAINING_STEPS = 400
PRETRAINING_RATE = 2e-3

IntArray = NDArray[np.int64]


def parse_digits(text: str) -> tuple[FloatArray, IntArray]:
    """Read the images and labels of ``data/digits.txt``.

    Returns
    -------
    images : float32 array (n, 8, 8), ink from 0 to 1
    labels : int64 array (n,), 0 to 9

    Raises
    ------
    FormatError   If a line is not an image and a label, or there are not exactly 1,797.
    """
    ink = {character: value / 16 for value, character in enumerate(ALPHABET)}
    images: list[list[float]] = []
    labels: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            continue
        pixels, label = line[:PIXELS], line[PIXELS:]
        if len(pixels) != PIXELS or not set(pixels) <= ink.keys():
            raise FormatError(f"digits line {number} must begin with {PIXELS} characters of {ALPHABET}, got {line!r}")
        if len(label) != 2 or label[0] != " " or label[1] not in ALPHABET[:DIGITS]:
            raise FormatError(f"digits line {number} must end with a space and a digit from 0 to 9, got {label!r}")
        images.append([ink[character] for character in pixels])
        labels.append(int(label))
    if len(images) != IMAGES:
        raise FormatError(f"digits must hold {IMAGES} images, got {len(images)}")
    return np.array(images, np.float32).reshape(-1, SIDE, SIDE), np.array(labels)


class DigitsTask:
    """Handwritten digits, read upright by a frozen network, to be read turned by its adapters.

    Parameters
    ----------
    lora_config : LoraConfig
        ``target_modules`` names the layers to adapt: any of hidden1, hidden2, output.
    seed : int >= 0
        Decides the held-out images, the network's weights, the adapters' and every batch.

    Attributes
    ----------
    adapters : AdapterSet
    total_parameters : int
        Weights and biases of the network, and the adapters.
    base : dict of read-only arrays
        The frozen network: a weight (d_out, d_in) under each layer's name, a bias (d_out,) under ``<name>.bias``.

    Raises
    ------
    ConfigError   If ``target_modules`` names another layer, or ``rank`` is above 128.
    """

    training_defaults: ClassVar[Mapping[str, Any]] = {
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "log_every": 50,
        "lora_config": {"rank": 8, "alpha": 16.0, "target_modules": list(LAYERS)},
    }

    def __init__(self, lora_config: LoraConfig, seed: int) -> None:
        for name in lora_config.target_modules:
            if name not in LAYERS:
                layers = ", ".join(LAYERS)
                raise ConfigError(f"target_modules must be layers of the digits network ({layers}), got {name!r}")
        largest = max([lora_config.rank, *lora_config.rank_pattern.values()])
        if largest > WIDTH:
            raise ConfigError(f"rank must be at most {WIDTH}, the digits network's width, got {largest}")
        self._seed = seed
        rng = np.random.default_rng(seed)
        text = resources.files("cylora.tasks").joinpath("data", "digits.txt").read_text(encoding="ascii")
        images, labels = parse_digits(text)
        order = rng.permutation(IMAGES)
        held_out, seen = order[:HELD_OUT], order[HELD_OUT:]
        upright = images.reshape(IMAGES, PIXELS)
        turned = np.ascontiguousarray(np.rot90(images, axes=(1, 2))).reshape(IMAGES, PIXELS)
        self._held_out = {"upright": upright[held_out], "turned": turned[held_out]}
        self._held_out_labels = labels[held_out]
        self._images, self._labels = turned[seen], labels[seen]
        self.base = _pretrain(upright[seen], labels[seen], rng)
        adapted = {name: shape for name, shape in LAYERS.items() if name in lora_config.target_modules}
        self.adapters = AdapterSet(adapted, lora_config, seed=seed)
        self.total_parameters = sum(array.size for array in self.base.values()) + self.adapters.param_count()

    def loss_and_gradients(self, step: int, gradients: Gradients) -> float:
        """Return the mean cross-entropy of the batch of turned digits that (seed, step) draw; write its gradients."""
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges is the trainer's to refuse
            return self._loss_and_gradients(step, gradients)

    def _loss_and_gradients(self, step: int, gradients: Gradients) -> float:
        rng = np.random.default_rng([self._seed, step])
        batch = rng.integers(len(self._labels), size=BATCH)
        masks = {
            name: adapter.dropout_mask((BATCH, adapter.d_in), rng)
            for name, adapter in self.adapters.items()
            if adapter.config.dropout > 0
        }
        inputs, logits = _forward(self._images[batch], self.base, self.adapters, masks)
        loss, grad = _cross_entropy(logits, self._labels[batch])
        for name in reversed(LAYERS):
            x, mask, adapter = inputs[name], masks.get(name), self.adapters.get(name)
            if adapter is not None:
                adapter.gradients(x, grad, mask=mask, out=gradients[name])
            if name != "hidden1":  # whose input, the image, needs no gradient
                back = _product(grad, self.base[name])
                if adapter is not None:
                    back += adapter.input_gradient(grad, mask=mask)
                grad = back * (x > 0)
        return loss

    def evaluate(self) -> dict[str, float]:
        """Return the share of held-out digits read correctly, upright and turned, with the adapters on."""
        accuracies = {}
        for domain, x in self._held_out.items():
            _, logits = _forward(x, self.base, self.adapters, {})
            accuracies[f"{domain} accuracy"] = float((logits.argmax(axis=1) == self._held_out_labels).mean())
        return accuracies


def _forward(
    x: FloatArray,
    network: Mapping[str, FloatArray],
    adapters: Mapping[str, LoraAdapter],
    masks: Mapping[str, NDArray[np.bool_]],
) -> tuple[dict[str, FloatArray], FloatArray]:
    """Return every layer's input, by the layer's name, and the logits."""
    inputs: dict[str, FloatArray] = {}
    for name in LAYERS:
        inputs[name] = x
        z = _product(x, network[name].T) + network[f"{name}.bias"]
        if name in adapters:
            z += adapters[name].apply(x, mask=masks.get(name))
        x = np.maximum(z, 0)
    return inputs, z


def _pretrain(images: FloatArray, labels: IntArray, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Train the network on upright digits, from He et al. 2015's initial weights, and return it read-only."""
    weights = [(name, (d_out, d_in)) for name, (d_in, d_out) in LAYERS.items()]
    biases = [(f"{name}.bias", (d_out,)) for name, (_, d_out) in LAYERS.items()]
    layout = weights + biases
    network, gradient = FlatBuffer(layout), FlatBuffer(layout)
    views = {name: network[name] for name in network}
    for name, (d_in, d_out) in LAYERS.items():
        views[name][:] = rng.standard_normal((d_out, d_in)) * math.sqrt(2 / d_in)
    optimizer = Adam(network, learning_rate=PRETRAINING_RATE)
    for _ in range(PRETRAINING_STEPS):
        batch = rng.integers(len(labels), size=BATCH)
        inputs, logits = _forward(images[batch], views, {}, {})
        _, grad = _cross_entropy(logits, labels[batch])
        for name in reversed(LAYERS):
            gradient[name][:] = _product(grad.T, inputs[name])
            grad.sum(axis=0, out=gradient[f"{name}.bias"])
            grad = _product(grad, views[name]) * (inputs[name] > 0)
        optimizer.step(gradient.vector)
    for view in views.values():
        view.setflags(write=False)
    return views


def _product(left: FloatArray, right: FloatArray) -> FloatArray:
    """Return ``left @ right``, sixteen rows at a time.

    Sixteen rows of this network stay within the 2^18 multiplications that OpenBLAS does on the caller's thread. Above,
    it starts threads that wait for each other by spinning: on two busy cores a run took 14 s instead of 0.3 s.
    """
    product = np.empty((len(left), right.shape[1]), np.float32)
    for start in range(0, len(left), ROWS):
        np.matmul(left[start : start + ROWS], right, out=product[start : start + ROWS])
    return product


def _cross_entropy(logits: FloatArray, labels: IntArray) -> tuple[float, FloatArray]:
    """Return the mean of -log softmax(logits)[label] over the batch, and its gradient in the logits."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    sums = exponentials.sum(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    loss = float((np.log(sums[:, 0]) - shifted[rows, labels]).mean())
    grad = exponentials / sums
    grad[rows, labels] -= 1
    grad /= len(labels)
    return loss, grad
