"""What is measured: six subjects, and for each how a peer's work is checked and which call is timed.

- ``trainer``: clip and update. cylora's side is the whole public ``LoraTrainer.step``, with its checks, its record and
  its history, on gradients as NumPy allocates them; the others' is the update alone;
- ``many``: the same for thousands of adapters, each with a trainer and a clip of its own;
- ``tenants``: the same through an `AdapterStore` (tenants.py);
- ``norm``: the global L2 norm. cylora adds in float64, as ``NumPy float64`` does and the other peers do not;
- ``clip``: scale the gradients in place to a given norm;
- ``adam``: decoupled weight decay and Adam on one vector, no clipping.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from built import Built
from cases import CHECK_NORMS, ONE, Case, gradient, initial_parameters
from oracle import check_clipped, check_drift, check_norm, check_steps, true_steps

from cylora._cli_numpy import MAX_GRAD_NORM, naive_grad_norm
from cylora._cli_numpy import true_steps as steps_of_the_papers


class Errors(NamedTuple):
    """The largest of a result and, relative, of its norm."""

    result: float
    norm: float = 0.0


Timed = tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class Subject:
    """How to check a peer, and what to time."""

    check: Callable[[Case, Built], Errors]  # before timing, on an instance of its own
    timed: Callable[[Case, Built], Timed]
    check_after: Callable[[Case, Built, int], float]  # after that many timed calls


def _time_as_is(case: Case, built: Built) -> Timed:
    built.load(gradient(case, 0, built.dtype))
    return built.call, built.args


def _check_norm(case: Case, built: Built) -> Errors:
    worst = 0.0
    for i in range(len(CHECK_NORMS) - 1, -1, -1):  # ends with gradient 0, the one that is timed
        built.load(gradient(case, i))
        worst = max(worst, check_norm(built.call(*built.args), gradient(case, i), built.norm_tolerance))
    return Errors(worst, worst)


def _check_clip(case: Case, built: Built) -> Errors:
    worst = worst_norm = 0.0
    for i in range(len(CHECK_NORMS)):
        flat = gradient(case, i)
        built.load(flat)
        worst_norm = max(worst_norm, check_norm(built.call(*built.args, MAX_GRAD_NORM), flat, built.norm_tolerance))
        worst = max(worst, check_clipped(built.read(), flat, MAX_GRAD_NORM, built.norm_tolerance))
    return Errors(worst, worst_norm)


def _time_clip(case: Case, built: Built) -> Timed:
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
    norm = naive_grad_norm([found])
    return check_clipped(found, gradient(case), norm, built.norm_tolerance) if calls else 0.0


def _check_optimizer(clips: bool) -> Callable[[Case, Built], Errors]:
    def check(case: Case, built: Built) -> Errors:
        norm_error, reports_norm = 0.0, False
        for i in range(len(CHECK_NORMS)):
            flat = gradient(case, i, built.dtype)
            built.load(flat)
            result = built.call(*built.args)
            if clips and result is not None:  # thinc's Adam keeps the norm to itself
                reports_norm = True
                norm = float(getattr(result, "grad_norm", result))
                norm_error = max(norm_error, check_norm(norm, flat, built.norm_tolerance))
        truth = true_steps(case, clips=clips, dtype=built.dtype)
        allowed = norm_error if reports_norm or not clips else built.norm_tolerance
        worst = check_steps(built.read(), truth, initial_parameters(case), built.state, allowed)
        return Errors(worst, norm_error)

    return check


def _check_optimizer_after(clips: bool) -> Callable[[Case, Built, int], float]:
    def check(case: Case, built: Built, calls: int) -> float:
        return check_drift(built.read(), case, calls, clips=clips, built_from=(built.state, built.dtype))

    return check


def _check_many(case: Case, built: Built) -> Errors:
    """Neighbours get different gradients in a different order, so that a mixed-up adapter shows."""
    count, kinds = len(case.adapters), len(CHECK_NORMS)
    gradients = [gradient(ONE, i, built.dtype) for i in range(kinds)]
    for step in range(kinds):
        built.load(np.concatenate([gradients[(i + step) % kinds] for i in range(count)]))
        built.call(*built.args)
    found = built.read().reshape(count, ONE.parameters)
    start = initial_parameters(ONE)
    worst = 0.0
    for kind in range(kinds):
        truth = steps_of_the_papers(start, [gradients[(kind + step) % kinds] for step in range(kinds)])
        worst = max(worst, *(check_steps(row, truth, start, built.state) for row in found[kind::kinds]))
    return Errors(worst)


def _time_many(case: Case, built: Built) -> Timed:
    built.load(np.tile(gradient(ONE, 0, built.dtype), len(case.adapters)))
    return built.call, built.args


def _check_many_after(case: Case, built: Built, calls: int) -> float:
    rows = built.read().reshape(len(case.adapters), ONE.parameters)
    how = (built.state, built.dtype)
    return max(check_drift(row, ONE, calls, clips=True, built_from=how) for row in rows[:: max(1, len(rows) // 100)])


SUBJECTS = {
    "trainer": Subject(_check_optimizer(clips=True), _time_as_is, _check_optimizer_after(clips=True)),
    "many": Subject(_check_many, _time_many, _check_many_after),
    "tenants": Subject(_check_many, _time_many, _check_many_after),
    "norm": Subject(_check_norm, _time_as_is, lambda case, built, calls: _check_norm(case, built).norm),
    "clip": Subject(_check_clip, _time_clip, _check_clip_after),
    "adam": Subject(_check_optimizer(clips=False), _time_as_is, _check_optimizer_after(clips=False)),
}
