"""optax under jit: clip and AdamW compiled into one function whose inputs are donated, so that it updates in place."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from built import Built, joined
from cases import Case, initial_parameters, split

from cylora._cli_numpy import BETA1, BETA2, EPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY

OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(MAX_GRAD_NORM),
    optax.adamw(LEARNING_RATE, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=WEIGHT_DECAY),
)


@partial(jax.jit, donate_argnums=(0, 1))
def _update(params: Any, state: Any, grads: Any) -> Any:
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, optax.global_norm(grads)


def adamw(case: Case, threads: int) -> Built:
    """One array per matrix. Gradients are JAX's own arrays already, as ``jax.grad`` would return them."""
    params = [jax.numpy.array(view) for view in split(initial_parameters(case), case)]
    state = OPTIMIZER.init(params)
    grads: list[Any] = []

    def load(values: np.ndarray) -> None:
        grads[:] = [jax.numpy.array(view) for view in split(values, case)]

    def step() -> Any:
        nonlocal params, state
        params, state, norm = _update(params, state, grads)
        return norm.block_until_ready()

    return Built(step, (), load, lambda: joined([np.asarray(p) for p in params]))
