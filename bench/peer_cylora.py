"""cylora as its users call it, in each subject and with each kind of state."""

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from built import Built, flat_gradient, gradient_array, joined
from cases import Case, initial_parameters, split

import cylora
from cylora._cli_numpy import BETA1, BETA2, EPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY
from cylora.flat import FlatBuffer
from cylora.serving import AdapterStore


def _gradients(case: Case) -> tuple[list[np.ndarray], Callable[[np.ndarray], None], Callable[[], np.ndarray]]:
    """Two arrays for a lone adapter, the one vector of ``Gradients`` for a model."""
    if case.is_model:
        flat, load = flat_gradient(case)
        return [flat], load, flat.copy
    arrays = [gradient_array(shape) for shape in case.matrix_shapes]

    def load_matrices(values: np.ndarray) -> None:
        for array, view in zip(arrays, split(values, case), strict=True):
            array[...] = view

    return arrays, load_matrices, lambda: joined(arrays)


def norm(case: Case, threads: int) -> Built:
    grads, load, read = _gradients(case)
    return Built(cylora.grad_norm, (grads,), load, read)


def clip(case: Case, threads: int) -> Built:
    grads, load, read = _gradients(case)
    return Built(cylora.clip_grad_norm_, (grads,), load, read)


def adam(case: Case, threads: int) -> Built:
    parameters = FlatBuffer([("parameters", (case.parameters,))])
    parameters.vector[:] = initial_parameters(case)
    adam = cylora.Adam(
        parameters, learning_rate=LEARNING_RATE, beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=WEIGHT_DECAY
    )
    flat, load = flat_gradient(case)
    return Built(adam.step, (flat,), load, parameters.vector.copy)


def _config(rank: int, **settings: Any) -> cylora.LoraTrainingConfig:
    return cylora.LoraTrainingConfig(
        lora_config=cylora.LoraConfig(rank=rank),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=MAX_GRAD_NORM,
        beta1=BETA1,
        beta2=BETA2,
        eps=EPS,
        warmup_steps=0,
        **settings,
    )


def _adapters(case: Case, config: cylora.LoraTrainingConfig) -> cylora.LoraAdapter | cylora.AdapterSet:
    """Adapters with the case's start values: one, or a set."""
    adapters: Any
    if case.is_model:
        layers = {f"layer{i}": (d_in, d_out) for i, (d_in, d_out, _) in enumerate(case.adapters)}
        adapters = cylora.AdapterSet(layers, config.lora_config, seed=0)
    else:
        ((d_in, d_out, _),) = case.adapters
        adapters = cylora.LoraAdapter(d_in, d_out, config.lora_config, seed=0)
    adapters.flat.vector[:] = initial_parameters(case)
    return adapters


def trainer(case: Case, threads: int, **settings: Any) -> Built:
    """Float32 gradients: two arrays as NumPy allocates them, or the ``Gradients`` of a model."""
    config = _config(case.adapters[0][2], threads=threads, **settings)
    adapters = _adapters(case, config)
    if case.is_model:
        gradients = cylora.Gradients(adapters)
        arrays, args = [gradients.vector], (gradients,)
    else:
        arrays = [gradient_array(shape) for shape in case.matrix_shapes]
        args = tuple(arrays)

    def load(values: np.ndarray) -> None:
        start = 0
        for array in arrays:
            array.ravel()[:] = values[start : start + array.size]
            start += array.size

    step = cylora.LoraTrainer(config).step
    state = settings.get("state_dtype", "float32")
    return Built(step, (0.5, adapters, *args), load, adapters.flat.vector.copy, state)


def trainer_bf16(case: Case, threads: int) -> Built:
    return trainer(case, threads, state_dtype="bfloat16")


def trainer_8bit(case: Case, threads: int) -> Built:
    """8-bit state, and gradients whose bfloat16 bits are in uint16 arrays; a model's in one flat vector."""
    config = _config(case.adapters[0][2], threads=threads, state_dtype="8bit")
    adapters = _adapters(case, config)
    bits = np.empty(case.parameters, np.uint16)

    def load(values: np.ndarray) -> None:
        bits[:] = values.view(np.uint32) >> 16  # exact: the oracle's gradients are rounded already

    args = (bits,) if case.is_model else tuple(split(bits, case))
    step = cylora.LoraTrainer(config).step
    return Built(step, (0.5, adapters, *args), load, adapters.flat.vector.copy, "8bit", "bfloat16")


def _jobs(case: Case) -> tuple[list[tuple[Any, ...]], Callable[[np.ndarray], None], Callable[[], np.ndarray]]:
    """One adapter, trainer and pair of gradients after the other, as a server holds them."""
    config, jobs = _config(case.adapters[0][2], threads=1), []
    lone = Case("one", case.adapters[:1])
    for _ in case.adapters:
        grads = [gradient_array(shape) for shape in lone.matrix_shapes]
        jobs.append((cylora.LoraTrainer(config), 0.5, _adapters(lone, config), *grads))

    def load(values: np.ndarray) -> None:
        for (*_, grad_a, grad_b), row in zip(jobs, values.reshape(len(jobs), -1), strict=True):
            grad_a.ravel()[:], grad_b.ravel()[:] = row[: grad_a.size], row[grad_a.size :]

    return jobs, load, lambda: joined([job[2].flat.vector for job in jobs])


def step_many(case: Case, threads: int) -> Built:
    jobs, load, read = _jobs(case)

    def call() -> None:
        for result in cylora.step_many(jobs, threads=threads):
            if isinstance(result, Exception):
                raise result

    return Built(call, (), load, read)


def store(case: Case, threads: int, **settings: Any) -> Built:
    """Let a store have all tenants in memory. Gradients are two arrays each, or bfloat16 bits in one vector."""
    config = _config(case.adapters[0][2], threads=1, history_limit=100, log_every=0, **settings)
    lone, is_compact = Case("one", case.adapters[:1]), "state_dtype" in settings
    folder = tempfile.TemporaryDirectory()
    tenants = AdapterStore(
        lambda _: _adapters(lone, config), config, folder=folder.name, memory_budget=2**40, threads=threads
    )
    jobs: list[tuple[Any, ...]] = []
    for index in range(len(case.adapters)):
        tenants.create(f"user{index}@example.com")
        arrays = [gradient_array(shape) for shape in lone.matrix_shapes]
        grads = [np.empty(lone.parameters, np.uint16)] if is_compact else arrays
        jobs.append((f"user{index}@example.com", 0.5, *grads))

    def load(values: np.ndarray) -> None:
        for (_, _, *grads), row in zip(jobs, values.reshape(len(jobs), -1), strict=True):
            if is_compact:
                grads[0][:] = row.view(np.uint32) >> 16  # exact: the oracle's gradients are rounded already
            else:
                grads[0].ravel()[:], grads[1].ravel()[:] = row[: grads[0].size], row[grads[0].size :]

    def call() -> None:
        for result in tenants.step_many(jobs):
            if isinstance(result, Exception):
                raise result

    def read() -> np.ndarray:
        vectors = []
        for name, *_ in jobs:
            with tenants.use(name) as (_, adapters):
                vectors.append(adapters.flat.vector.copy())
        assert folder.name  # it lives as long as the store
        return joined(vectors)

    return Built(call, (), load, read, settings.get("state_dtype", "float32"), "bfloat16" if is_compact else "float32")


def store_bf16(case: Case, threads: int) -> Built:
    return store(case, threads, state_dtype="bfloat16")


def store_8bit(case: Case, threads: int) -> Built:
    return store(case, threads, state_dtype="8bit")


def many_steps(case: Case, threads: int) -> Built:
    jobs, load, read = _jobs(case)

    def call() -> None:
        for trainer, *arguments in jobs:
            trainer.step(*arguments)

    return Built(call, (), load, read)
