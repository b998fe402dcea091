"""Who is measured on what: four subjects, and for each the peers that do the same work.

A subject is one of

- ``norm``: the global L2 norm. cylora adds in float64, as ``NumPy float64`` does and the other peers do not;
- ``clip``: scale the gradients in place to a given norm;
- ``adam``: decoupled weight decay and Adam on one vector, no clipping;
- ``trainer``: clip and update. cylora's side is the whole public ``LoraTrainer.step``, with its checks, its record and
  its history, on gradients as NumPy allocates them; the others' is the update alone.

Another library joins by adding a builder to the ``peers`` of the subjects it can do.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy_reference as reference
from cases import (
    BETA1,
    BETA2,
    CHECK_NORMS,
    EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    Case,
    check_clipped,
    check_drift,
    check_norm,
    check_steps,
    gradient,
    gradient_array,
    initial_parameters,
    split,
)

import cylora
from cylora.flat import FlatBuffer

CYLORA = "cylora"
TUNED = "NumPy tuned"
IN_PLACE = "NumPy in place"
NAIVE = "NumPy naive"
FLOAT64 = "NumPy float64"


class Built(NamedTuple):
    """A peer made ready for one case: ``call(*args)`` does the work once."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    load: Callable[[np.ndarray], None]  # put this flat gradient where ``args`` has its gradients
    read: Callable[[], np.ndarray]  # the flat result: parameters, or gradients if those are what is changed


@dataclass(frozen=True, slots=True)
class Subject:
    """Peers by name, how to check one of them, and what to time."""

    peers: dict[str, Callable[[Case], Built]]
    check: Callable[[Case, Built], float]  # before timing, on an instance of its own; returns the error
    timed: Callable[[Case, Built], tuple[Callable[..., Any], tuple[Any, ...]]]
    check_after: Callable[[Case, Built, int], float]  # after that many timed calls


def _gradient_copy(values: np.ndarray) -> np.ndarray:
    array = gradient_array(values.shape)
    array[...] = values
    return array


def _flat_gradient(case: Case) -> tuple[np.ndarray, Callable[[np.ndarray], None]]:
    flat = gradient_array(case.parameters)

    def load(values: np.ndarray) -> None:
        flat[:] = values

    return flat, load


def _gradient_matrices(case: Case) -> tuple[list[np.ndarray], Callable[[np.ndarray], None]]:
    """One array of its own per matrix. Loading puts fresh copies into the list, so a peer may replace its items."""
    arrays: list[np.ndarray] = []

    def load(values: np.ndarray) -> None:
        arrays[:] = [_gradient_copy(view) for view in split(values, case)]

    return arrays, load


def _gradient_vectors(case: Case) -> tuple[list[np.ndarray], Callable[[np.ndarray], None]]:
    """1-D arrays: one for a lone adapter, one per matrix for a model."""
    arrays: list[np.ndarray] = []

    def load(values: np.ndarray) -> None:
        arrays[:] = [_gradient_copy(part.ravel()) for part in (split(values, case) if case.is_model else [values])]

    return arrays, load


def _parameter_vectors(case: Case) -> list[np.ndarray]:
    flat = initial_parameters(case)
    return [view.ravel() for view in split(flat, case)] if case.is_model else [flat]


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([a.ravel() for a in arrays])


# norm and clip


def _cylora_gradients(case: Case) -> tuple[list[np.ndarray], Callable[[np.ndarray], None], Callable[[], np.ndarray]]:
    """Two arrays for a lone adapter, the one vector of ``Gradients`` for a model."""
    if case.is_model:
        flat, load = _flat_gradient(case)
        return [flat], load, flat.copy
    arrays = [gradient_array(shape) for shape in case.matrix_shapes]

    def load_matrices(values: np.ndarray) -> None:
        for array, view in zip(arrays, split(values, case), strict=True):
            array[...] = view

    return arrays, load_matrices, lambda: _joined(arrays)


def _cylora_norm(case: Case) -> Built:
    grads, load, read = _cylora_gradients(case)
    return Built(cylora.grad_norm, (grads,), load, read)


def _tuned_norm(case: Case) -> Built:
    flat, load = _flat_gradient(case)
    return Built(reference.tuned_grad_norm, (flat,), load, flat.copy)


def _float64_norm(case: Case) -> Built:
    flat, load = _flat_gradient(case)
    return Built(reference.make_float64_grad_norm(case.parameters), (flat,), load, flat.copy)


def _in_place_norm(case: Case) -> Built:
    grads, load = _gradient_vectors(case)
    return Built(reference.in_place_grad_norm, (grads,), load, lambda: _joined(grads))


def _naive_norm(case: Case) -> Built:
    grads, load = _gradient_matrices(case)
    return Built(reference.naive_grad_norm, (grads,), load, lambda: _joined(grads))


def _check_norm(case: Case, built: Built) -> float:
    worst = 0.0
    for i in range(len(CHECK_NORMS) - 1, -1, -1):  # ends with gradient 0, the one that is timed
        built.load(gradient(case, i))
        worst = max(worst, check_norm(built.call(*built.args), gradient(case, i)))
    return worst


def _time_as_is(case: Case, built: Built) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    built.load(gradient(case))
    return built.call, built.args


def _cylora_clip(case: Case) -> Built:
    grads, load, read = _cylora_gradients(case)
    return Built(cylora.clip_grad_norm_, (grads,), load, read)


def _tuned_clip(case: Case) -> Built:
    flat, load = _flat_gradient(case)
    return Built(reference.make_tuned_clip_grad_norm_(), (flat,), load, flat.copy)


def _in_place_clip(case: Case) -> Built:
    grads, load = _gradient_vectors(case)
    return Built(reference.in_place_clip_grad_norm_, (grads,), load, lambda: _joined(grads))


def _naive_clip(case: Case) -> Built:
    grads, load = _gradient_matrices(case)
    return Built(reference.naive_clip_grad_norm_, (grads,), load, lambda: _joined(grads))


def _check_clip(case: Case, built: Built) -> float:
    worst = 0.0
    for i in range(len(CHECK_NORMS)):
        flat = gradient(case, i)
        built.load(flat)
        check_norm(built.call(*built.args, MAX_GRAD_NORM), flat)
        worst = max(worst, check_clipped(built.read(), flat, MAX_GRAD_NORM))
    return worst


def _time_clip(case: Case, built: Built) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Every call clips to a little less than the norm is, else only the first would do the work."""
    clip, (grads,) = built.call, built.args
    fresh = gradient(case)
    norm = math.inf

    def clip_a_little() -> None:
        nonlocal norm
        if norm < 1e-3 or norm == math.inf:
            built.load(fresh)
            norm = CHECK_NORMS[0]
        norm = clip(grads, norm * 0.9999)

    return clip_a_little, ()


def _check_clip_after(case: Case, built: Built, calls: int) -> float:
    """Compare directions: the gradients still point the same way, however short they have become."""
    found = built.read()
    norm = reference.naive_grad_norm([found])
    return check_clipped(found, gradient(case), norm) if calls else 0.0


# adam and trainer


def _cylora_adam(case: Case) -> Built:
    parameters = FlatBuffer([("parameters", (case.parameters,))])
    parameters.vector[:] = initial_parameters(case)
    adam = cylora.Adam(
        parameters, learning_rate=LEARNING_RATE, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    flat, load = _flat_gradient(case)
    return Built(adam.step, (flat,), load, parameters.vector.copy)


def _numpy_adam(max_grad_norm: float | None) -> dict[str, Callable[[Case], Built]]:
    def tuned(case: Case) -> Built:
        adam = reference.make_tuned(initial_parameters(case), max_grad_norm=max_grad_norm)
        flat, load = _flat_gradient(case)
        return Built(adam.step, (flat,), load, lambda: _joined(adam.parameters))

    def in_place(case: Case) -> Built:
        adam = reference.make_in_place(_parameter_vectors(case), max_grad_norm=max_grad_norm)
        grads, load = _gradient_vectors(case)
        return Built(adam.step, (grads,), load, lambda: _joined(adam.parameters))

    def naive(case: Case) -> Built:
        adam = reference.make_naive(split(initial_parameters(case), case), max_grad_norm=max_grad_norm)
        grads, load = _gradient_matrices(case)
        return Built(adam.step, (grads,), load, lambda: _joined(adam.parameters))

    return {TUNED: tuned, IN_PLACE: in_place, NAIVE: naive}


def _cylora_trainer(case: Case) -> Built:
    lora = cylora.LoraConfig(rank=case.adapters[0][2])
    trainer = cylora.LoraTrainer(
        cylora.LoraTrainingConfig(
            lora_config=lora,
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            beta1=BETA1,
            beta2=BETA2,
            eps=EPS,
            warmup_steps=0,
        )
    )
    if case.is_model:
        model = cylora.AdapterSet(
            {f"layer{i}": (d_in, d_out) for i, (d_in, d_out, _) in enumerate(case.adapters)}, lora, seed=0
        )
        pairs = cylora.Gradients(model)
        trained: Any = model
        matrices = [m for adapter in model.values() for m in (adapter.a_matrix, adapter.b_matrix)]
        grads = [g for pair in pairs.values() for g in (pair.grad_a, pair.grad_b)]
        args: tuple[Any, ...] = (pairs,)
    else:
        ((d_in, d_out, _),) = case.adapters
        trained = cylora.LoraAdapter(d_in, d_out, lora, seed=0)
        matrices = [trained.a_matrix, trained.b_matrix]
        grads = [gradient_array(shape) for shape in case.matrix_shapes]
        args = tuple(grads)
    for matrix, start in zip(matrices, split(initial_parameters(case), case), strict=True):
        matrix[...] = start

    def load(values: np.ndarray) -> None:
        for grad, view in zip(grads, split(values, case), strict=True):
            grad[...] = view

    return Built(trainer.step, (0.5, trained, *args), load, lambda: _joined(matrices))


def _check_optimizer(clips: bool) -> Callable[[Case, Built], float]:
    def check(case: Case, built: Built) -> float:
        for i in range(len(CHECK_NORMS)):
            flat = gradient(case, i)
            built.load(flat)
            result = built.call(*built.args)
            if clips:
                check_norm(getattr(result, "grad_norm", result), flat)
        return check_steps(built.read(), case, clips=clips)

    return check


def _check_optimizer_after(clips: bool) -> Callable[[Case, Built, int], float]:
    def check(case: Case, built: Built, calls: int) -> float:
        return check_drift(built.read(), case, calls, clips=clips)

    return check


SUBJECTS = {
    "trainer": Subject(
        peers={CYLORA: _cylora_trainer, **_numpy_adam(MAX_GRAD_NORM)},
        check=_check_optimizer(clips=True),
        timed=_time_as_is,
        check_after=_check_optimizer_after(clips=True),
    ),
    "norm": Subject(
        peers={
            CYLORA: _cylora_norm,
            FLOAT64: _float64_norm,
            TUNED: _tuned_norm,
            IN_PLACE: _in_place_norm,
            NAIVE: _naive_norm,
        },
        check=_check_norm,
        timed=_time_as_is,
        check_after=lambda case, built, calls: _check_norm(case, built),
    ),
    "clip": Subject(
        peers={CYLORA: _cylora_clip, TUNED: _tuned_clip, IN_PLACE: _in_place_clip, NAIVE: _naive_clip},
        check=_check_clip,
        timed=_time_clip,
        check_after=_check_clip_after,
    ),
    "adam": Subject(
        peers={CYLORA: _cylora_adam, **_numpy_adam(None)},
        check=_check_optimizer(clips=False),
        timed=_time_as_is,
        check_after=_check_optimizer_after(clips=False),
    ),
}
