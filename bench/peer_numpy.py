"""NumPy in four degrees of care; the steps themselves are in numpy_reference.py."""

from collections.abc import Callable

import numpy_reference as reference
from built import (
    Built,
    flat_gradient,
    gradient_matrices,
    gradient_vectors,
    joined,
    parameter_vectors,
)
from cases import Case, initial_parameters, split
from oracle import FLOAT32_NORM_TOLERANCE

from cylora._cli_numpy import MAX_GRAD_NORM, in_place_grad_norm, make_in_place, make_naive, naive_grad_norm


def tuned_norm(case: Case, threads: int) -> Built:
    flat, load = flat_gradient(case)
    return Built(reference.tuned_grad_norm, (flat,), load, flat.copy, norm_tolerance=FLOAT32_NORM_TOLERANCE)


def float64_norm(case: Case, threads: int) -> Built:
    flat, load = flat_gradient(case)
    return Built(reference.make_float64_grad_norm(case.parameters), (flat,), load, flat.copy)


def in_place_norm(case: Case, threads: int) -> Built:
    grads, load = gradient_vectors(case)
    return Built(in_place_grad_norm, (grads,), load, lambda: joined(grads), norm_tolerance=FLOAT32_NORM_TOLERANCE)


def naive_norm(case: Case, threads: int) -> Built:
    grads, load = gradient_matrices(case)
    return Built(naive_grad_norm, (grads,), load, lambda: joined(grads), norm_tolerance=FLOAT32_NORM_TOLERANCE)


def tuned_clip(case: Case, threads: int) -> Built:
    flat, load = flat_gradient(case)
    return Built(
        reference.make_tuned_clip_grad_norm_(), (flat,), load, flat.copy, norm_tolerance=FLOAT32_NORM_TOLERANCE
    )


def in_place_clip(case: Case, threads: int) -> Built:
    grads, load = gradient_vectors(case)
    return Built(
        reference.in_place_clip_grad_norm_, (grads,), load, lambda: joined(grads), norm_tolerance=FLOAT32_NORM_TOLERANCE
    )


def naive_clip(case: Case, threads: int) -> Built:
    grads, load = gradient_matrices(case)
    return Built(
        reference.naive_clip_grad_norm_, (grads,), load, lambda: joined(grads), norm_tolerance=FLOAT32_NORM_TOLERANCE
    )


def _tuned(max_grad_norm: float | None) -> Callable[[Case, int], Built]:
    def build(case: Case, threads: int) -> Built:
        adam = reference.make_tuned(initial_parameters(case), max_grad_norm=max_grad_norm)
        flat, load = flat_gradient(case)
        return Built(adam.step, (flat,), load, lambda: joined(adam.parameters), norm_tolerance=FLOAT32_NORM_TOLERANCE)

    return build


def _in_place(max_grad_norm: float | None) -> Callable[[Case, int], Built]:
    def build(case: Case, threads: int) -> Built:
        adam = make_in_place(parameter_vectors(case), max_grad_norm=max_grad_norm)
        grads, load = gradient_vectors(case)
        return Built(adam.step, (grads,), load, lambda: joined(adam.parameters), norm_tolerance=FLOAT32_NORM_TOLERANCE)

    return build


def _naive(max_grad_norm: float | None) -> Callable[[Case, int], Built]:
    def build(case: Case, threads: int) -> Built:
        adam = make_naive(split(initial_parameters(case), case), max_grad_norm=max_grad_norm)
        grads, load = gradient_matrices(case)
        return Built(adam.step, (grads,), load, lambda: joined(adam.parameters), norm_tolerance=FLOAT32_NORM_TOLERANCE)

    return build


tuned_adam, in_place_adam, naive_adam = _tuned(None), _in_place(None), _naive(None)
tuned_trainer, in_place_trainer, naive_trainer = _tuned(MAX_GRAD_NORM), _in_place(MAX_GRAD_NORM), _naive(MAX_GRAD_NORM)
