"""PyTorch: ``torch.optim.AdamW`` after ``clip_grad_norm_``, on one Parameter per matrix, as a training loop has them.

``fused=True`` is what PyTorch recommends where it exists. ``clip_grad_norm_`` is called as documented; on a CPU it has
no foreach form, so the three peers share it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from built import Built
from cases import Case, initial_parameters, split
from oracle import FLOAT32_NORM_TOLERANCE
from torch.nn.utils import clip_grad_norm_

from cylora._cli_numpy import BETA1, BETA2, EPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY


def parameters_of(case: Case) -> list[torch.nn.Parameter]:
    """Make one Parameter per matrix, each with a gradient of its own."""
    params = [torch.nn.Parameter(torch.from_numpy(view.copy())) for view in split(initial_parameters(case), case)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return params


def loader(params: list[torch.nn.Parameter], case: Case) -> Callable[[np.ndarray], None]:
    def load(values: np.ndarray) -> None:
        for param, view in zip(params, split(values, case), strict=True):
            param.grad.copy_(torch.from_numpy(view))

    return load


def reader(params: list[torch.nn.Parameter]) -> Callable[[], np.ndarray]:
    return lambda: np.concatenate([param.detach().numpy().ravel() for param in params])


def _build(case: Case, threads: int, **form: bool) -> Built:
    torch.set_num_threads(threads)
    params = parameters_of(case)
    optimizer = torch.optim.AdamW(
        params, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY, **form
    )

    def step() -> torch.Tensor:
        norm = clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()
        return norm

    return Built(step, (), loader(params, case), reader(params), norm_tolerance=FLOAT32_NORM_TOLERANCE)


def fused(case: Case, threads: int) -> Built:
    return _build(case, threads, fused=True)


def foreach(case: Case, threads: int) -> Built:
    return _build(case, threads, foreach=True)


def for_loop(case: Case, threads: int) -> Built:
    return _build(case, threads, foreach=False, fused=False)


def many(case: Case, threads: int) -> Built:
    """One optimizer per adapter, stepped in a loop."""
    torch.set_num_threads(threads)
    lone = Case("one", case.adapters[:1])
    pairs: list[tuple[list[torch.nn.Parameter], Any]] = []
    for _ in case.adapters:
        params = parameters_of(lone)
        settings = {"lr": LEARNING_RATE, "betas": (BETA1, BETA2), "eps": EPS, "weight_decay": WEIGHT_DECAY}
        pairs.append((params, torch.optim.AdamW(params, **settings, fused=True)))
    everything = [param for params, _ in pairs for param in params]

    def step() -> None:
        for params, optimizer in pairs:
            clip_grad_norm_(params, MAX_GRAD_NORM)
            optimizer.step()

    return Built(step, (), loader(everything, case), reader(everything))
