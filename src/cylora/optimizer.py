"""Adam over one flat vector, and global-norm clipping: the numerics, over the compiled kernels."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np

from cylora import checks
from cylora.config import MAX_LEARNING_RATE, LoraTrainingConfig, thread_count
from cylora.errors import InputError, NonFiniteGradientError, StateError
from cylora.flat import FlatBuffer, FloatArray, Layout, aligned_zeros, locate
from cylora.good_state import GoodState
from cylora.kernels import (
    Owned,
    PreparedAdam,
    PreparedTensors,
    Round,
    check_gradient,
    clip,
    isa,
    joined,
    norm,
    release,
    step_many,
    variants,
)
from cylora.moments import Moments, checked_sizes
from cylora.overrides import AdamParams
from cylora.parts import Part, max_rate, parts_of

__all__ = [
    "MAX_GRADIENT",
    "Adam",
    "AdamState",
    "Owned",
    "PreparedTensors",
    "Round",
    "check_gradient",
    "check_rate",
    "clip_grad_norm_",
    "grad_norm",
    "isa",
    "joined",
    "norm_limit",
    "release",
    "step_many",
    "variants",
]

# Above this, a gradient's square (the second moment) overflows float32. Clipping at or below it makes any fit.
MAX_GRADIENT = 2.0**63
# Clipping divides by at most this: below 2^-130 float32, whose normal numbers end at 2^-126, holds less than 20 bits of
# the factor. With max_grad_norm 1 that is four times the largest float32.
MAX_REDUCTION = 2.0**130


def _flat_arrays(grads: Any) -> list[Any]:
    vector = getattr(grads, "vector", None)
    if isinstance(vector, np.ndarray):
        return [vector]
    if isinstance(grads, np.ndarray) or not isinstance(grads, Sequence):
        raise InputError(f"grads must be a sequence of arrays or a Gradients, got {type(grads).__name__}")
    return list(grads)


def grad_norm(grads: Any) -> float:
    """Return the global L2 norm over all gradients together.

    Parameters
    ----------
    grads : sequence of arrays, C-contiguous, any shape; or a Gradients
        Read only. float32, float16, bfloat16 (of ml_dtypes or by DLPack), or uint16 holding the bits of bfloat16
        numbers. Each is an ndarray or offers a buffer, a DLPack tensor in CPU memory (torch's, also one that requires
        grad), or at least ``__array__``.

    Returns
    -------
    float
        Accumulated in float64 over fixed lanes and blocks of the concatenated index space, so it does not depend on how
        the elements are cut into arrays. NaN or infinite only if an element is; 0.0 for no elements.

    Raises
    ------
    InputError
        If an array is none of these, or not C-contiguous and aligned.
    """
    return norm(_flat_arrays(grads))


def clip_grad_norm_(grads: Any, max_norm: float) -> float:
    """Scale gradients in place so that their global L2 norm is at most ``max_norm``.

    Parameters
    ----------
    grads : sequence of float32 arrays, C-contiguous, any shape, written; or a Gradients
        Each is an ndarray or offers a writable buffer or DLPack tensor in CPU memory that says it may be written.
    max_norm : float > 0
        ``inf`` leaves the gradients alone. A norm equal to ``max_norm`` does not clip.

    Returns
    -------
    float
        The norm before clipping, accumulated in float64.

    Raises
    ------
    NonFiniteGradientError
        If the norm is not finite. Nothing is written.
    InputError
        If an array is not float32, C-contiguous, aligned and writable, or two overlap. Nothing is written.

    References
    ----------
    Pascanu, Mikolov & Bengio 2013 (arXiv:1211.5063), section 3.2; the scale is max_norm / norm, not
    max_norm / (norm + 1e-6) as in PyTorch.
    """
    limit = checks.norm_limit("max_norm", max_norm, InputError)
    before = clip(_flat_arrays(grads), limit)
    if not math.isfinite(before):
        raise NonFiniteGradientError(f"the norm of grads must be finite, got {before}")
    if before > limit * MAX_REDUCTION:
        raise InputError(f"the norm of grads must be at most 2^130 times max_norm, {limit!r}, got {before!r}")
    return before


def norm_limit(max_grad_norm: float) -> float:
    """Return the largest norm a gradient may have before it is clipped to ``max_grad_norm``."""
    return max_grad_norm * MAX_REDUCTION if max_grad_norm <= MAX_GRADIENT else MAX_GRADIENT


def check_rate(rate: Any, limit: float) -> float:
    """Return a learning rate as a float; InputError if it is not a number within `cylora.parts.max_rate`."""
    rule = "a number in [0, 1e6]" if limit == MAX_LEARNING_RATE else f"a number in [0, {limit:g}] (2 / weight_decay)"
    return checks.real("learning rate", rate, rule, lambda x: 0 <= x <= limit, InputError)


def _nonfinite_message(layout: Layout, index: int, value: float) -> str:
    name, place = locate(layout, index)
    return f"gradient of {name} must be finite, got {value} at [{', '.join(map(str, place))}]"


def _total(layout: Layout) -> int:
    return sum(math.prod(shape) for _, shape in layout)


class AdamState(NamedTuple):
    """What an `Adam` continues from: both moments, the number of steps done, and the layout of its parameters."""

    layout: Layout
    moments: Moments
    t: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and copies of the arrays; ``sizes`` only if not all is one run with moments."""
        layout = [[name, list(shape)] for name, shape in self.layout]
        sizes = self.moments.sizes
        runs = {} if sizes == (_total(self.layout),) else {"sizes": list(sizes)}
        return {"layout": layout, "t": self.t, **runs, **self.moments.to_dict()}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self:
        """Return the state that made ``state``, or raise StateError."""
        if not isinstance(state, Mapping) or not {"layout", "t"} <= set(state):
            got = f"the keys {', '.join(map(str, state))}" if isinstance(state, Mapping) else type(state).__name__
            raise StateError(f"adam must be a mapping with the keys layout, t and those of the moments, got {got}")
        rest = dict(state)
        pairs, t, sizes = rest.pop("layout"), rest.pop("t"), rest.pop("sizes", None)
        try:
            layout = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in pairs)
        except (TypeError, ValueError):
            raise StateError(f"adam layout must be a list of [name, shape], got {pairs!r}") from None
        total = _total(layout)
        runs = (total,) if sizes is None else checked_sizes("adam sizes", sizes)
        if sum(runs) > total:
            raise StateError(f"adam sizes must be at most {total} together, the layout's size, got {sizes!r:.80}")
        return cls(layout, Moments.from_dict(rest, runs), checks.integer("adam t", t, 1, error=StateError))


class Adam(PreparedAdam):
    """Adam or AdamW over one flat float32 vector, with clipping by global norm.

    For t = 1, 2, ... and the clipped gradient g::

        decoupled:  p -= rate * weight_decay * p                (AdamW: Loshchilov & Hutter 2019, arXiv:1711.05101)
        l2:         g += weight_decay * p
        m += (1 - beta1) * (g - m);   v += (1 - beta2) * (g * g - v)
        p -= rate / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)    (Kingma & Ba 2015, arXiv:1412.6980)

    in float32, every scalar derived in float64 and rounded once. The clipped gradient is never written.

    Parameters
    ----------
    parameters : FlatBuffer, or float32 array (n,), C-contiguous, writable
        Updated in place. Keep no second writer on it during a step.
    learning_rate, beta1, beta2, eps, weight_decay, weight_decay_mode, max_grad_norm, state_dtype, threads
        As in `LoraTrainingConfig`; here nothing decays and nothing is clipped by default.

    Attributes
    ----------
    m, v : float32 array (n,), read-only
        First and second raw moments, not bias-corrected: live views, or of compact state decoded copies.
    t : int
        Steps done.

    Raises
    ------
    ConfigError
        If a setting breaks its rule.
    InputError
        If ``parameters`` does.
    """

    def __init__(
        self,
        parameters: FlatBuffer | FloatArray,
        *,
        learning_rate: float = 3e-4,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        weight_decay_mode: str = "decoupled",
        max_grad_norm: float = math.inf,
        state_dtype: str = "float32",
        threads: int | None = None,
    ) -> None:
        if hasattr(self, "_flat"):
            raise TypeError("an Adam is initialised once")
        config = LoraTrainingConfig(
            learning_rate=learning_rate,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            weight_decay_mode=weight_decay_mode,
            max_grad_norm=max_grad_norm,
            state_dtype=state_dtype,
            threads=threads,
        )
        flat = parameters
        if not isinstance(flat, FlatBuffer):
            if not isinstance(flat, np.ndarray):
                raise InputError(f"parameters must be a FlatBuffer or a float32 array, got {type(flat).__name__}")
            size = flat.size
            vector = checks.vector("parameters", flat, size, InputError)
            flat = FlatBuffer([("parameters", vector.shape)], over=vector)
        if flat.vector.size == 0:
            raise InputError("parameters must not be empty, got 0 elements")
        self._prepare(flat, config)

    def _prepare(
        self,
        flat: FlatBuffer,
        config: LoraTrainingConfig,
        state: AdamState | None = None,
        ema: FloatArray | None = None,
    ) -> None:
        if not flat.vector.flags.writeable:
            hint = "a snapshot's; adapters.with_parameters(vector) copies one"
            raise InputError(f"parameters must be writable to be trained, got read-only memory ({hint})")
        self._flat, self._config = flat, config
        self._parts = parts_of(flat.layout, config)
        self._max_rate = max_rate(config, self._parts)
        if ema is None and config.ema_decay is not None:
            ema = aligned_zeros(flat.vector.size, np.float32, phase=0)
            ema[...] = flat.vector
        self.ema = ema
        self.good: GoodState | None = None
        if state is not None and state.moments.dtype != config.state_dtype:
            raise StateError(f"adam dtype must be {config.state_dtype!r}, as configured, got {state.moments.dtype!r}")
        sizes = (flat.vector.size,) if self._parts is None else [part.size for part in self._parts]
        self._moments = Moments(sizes, config.state_dtype) if state is None else state.moments
        shapes = [shape for _, shape in flat.layout]
        is_pair = len(shapes) == 2 and all(len(shape) == 2 for shape in shapes)
        (rows_a, columns_a), (rows_b, columns_b) = shapes if is_pair else ((-1, -1), (-1, -1))
        super().__init__(
            flat.vector,
            self._moments.buffers(),
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            l2=config.weight_decay_mode == "l2",
            max_grad_norm=config.max_grad_norm,
            norm_limit=norm_limit(config.max_grad_norm),
            max_rate=self._max_rate,
            t=0 if state is None else state.t,
            threads=thread_count(config.threads),
            skips=config.nonfinite == "skip",
            shape_a=(rows_a, columns_a),
            shape_b=(rows_b, columns_b),
            parts=None if self._parts is None else [part[:4] for part in self._parts],
            average=self.ema,
            average_weight=0.0 if config.ema_decay is None else 1.0 - config.ema_decay,
        )

    @property
    def m(self) -> FloatArray:  # noqa: D102 - described with the class
        return self._moments.m

    @property
    def v(self) -> FloatArray:  # noqa: D102
        return self._moments.v

    @classmethod
    def for_training(
        cls,
        flat: FlatBuffer,
        config: LoraTrainingConfig,
        state: AdamState | None = None,
        ema: FloatArray | None = None,
    ) -> Self:
        """Return a trainer's optimizer, which may continue from ``state`` and ``ema`` and then updates these arrays."""
        adam = cls.__new__(cls)
        adam._prepare(flat, config, state, ema)
        return adam

    def keep_good(self, good: GoodState | None, every: int) -> None:
        """Keep a copy of everything after every so many applied steps, from ``good`` on or from now."""
        parameters, moments, t = self._flat.vector, self._moments, self.t
        kept = GoodState.of(parameters, moments, self.ema, t) if good is None else good
        live = GoodState(parameters, moments, self.ema, t)
        of_live, of_kept = ([array.view(np.uint8) for array in one.arrays().values()] for one in (live, kept))
        self.keep_state(of_live, of_kept, kept.steps, every)
        self.good = kept

    def step(self, gradient: Any, learning_rate: float | None = None) -> float:
        """Do one step and return the gradient's norm before clipping.

        Parameters
        ----------
        gradient : array (n,), or (if made from an adapter's FlatBuffer) anything with such a ``vector``
            Read only; of the types that `grad_norm` takes. Must not overlap the parameters.
        learning_rate : float in [0, 1e6], optional
            For this step; default the one given at creation.

        Raises
        ------
        NonFiniteGradientError, InputError, TrainerBusyError
            Nothing was written.
        """
        rate = self._config.learning_rate if learning_rate is None else check_rate(learning_rate, self._max_rate)
        return self.apply(getattr(gradient, "vector", gradient), rate)

    # What the kernel asks when something is out of the ordinary.

    def to_loss(self, loss: Any) -> float:
        """Return what the caller gave as a loss as a float."""
        return checks.real("loss", loss, error=InputError)

    def to_rate(self, rate: Any) -> float:
        """Return what the schedule gave as a float."""
        return check_rate(rate, self._max_rate)

    def too_fast(self, rate: float, limit: float) -> InputError:
        """Return the error for a schedule's rate that an overridden weight decay forbids."""
        return InputError(f"learning rate must be at most {limit:g} with this step's weight_decay, got {rate:g}")

    def overridden(self, overrides: AdamParams) -> tuple[Any, ...]:
        """Return what the kernel needs for a step with these overrides."""
        if not isinstance(overrides, AdamParams):
            raise InputError(f"overrides must be AdamParams, got {type(overrides).__name__}")
        config, decays, limit = self._config, None, self._max_rate
        if overrides.weight_decay is not None:
            parts = self._parts or [Part(0, self._flat.vector.size, 1.0, 0.0, False)]
            parts = [p if p.has_own_decay else p._replace(weight_decay=overrides.weight_decay) for p in parts]
            decays, limit = [part.weight_decay for part in parts], max_rate(config, parts)
        rate = -1.0 if overrides.learning_rate is None else check_rate(overrides.learning_rate, limit)
        clip = overrides.grad_clip_norm
        max_norm = config.max_grad_norm if clip is None else clip or math.inf
        given = overrides.beta1, overrides.beta2, overrides.eps
        own = config.beta1, config.beta2, config.eps
        adam = [mine if other is None else other for mine, other in zip(own, given, strict=True)]
        return (rate, *adam, decays, max_norm, norm_limit(max_norm), limit)

    def state(self) -> AdamState:
        """Return what this optimizer would continue from: views of the live moments."""
        return AdamState(self._flat.layout, self._moments, self.t)

    def refusal(self, norm: float, limit: float = MAX_GRADIENT) -> NonFiniteGradientError:
        """Return the error for a gradient of this ``norm``, naming the matrix and the element."""
        if math.isfinite(norm):
            what = "2^63 so that its square fits float32" if limit == MAX_GRADIENT else "2^130 times max_grad_norm"
            return NonFiniteGradientError(f"the gradient's norm must be at most {what}, got {norm:.9g}")
        if self.nonfinite_index < 0:
            return NonFiniteGradientError(f"the gradient's norm must be finite, got {norm}")
        return NonFiniteGradientError(
            partial(_nonfinite_message, self._flat.layout, self.nonfinite_index, self.nonfinite_value)
        )
