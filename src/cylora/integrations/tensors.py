"""Torch's parameters as `PreparedTensors` takes them: checked and named, their state flat."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cylora import checks
from cylora.config import thread_count
from cylora.errors import InputError, NonFiniteGradientError, StateError
from cylora.flat import aligned_zeros
from cylora.optimizer import MAX_GRADIENT, PreparedTensors

__all__ = ["Tensors", "check_parameters", "is_plain"]

Groups = Sequence[Mapping[str, Any]]

KEYS = ("step", "exp_avg", "exp_avg_sq")
GRADIENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_STEP = 2**24  # torch counts in float32 too, which goes no further
CACHE_LINE = 16  # elements


def is_plain(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is memory, not a stand-in for something else, as FakeTensor and DTensor are."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def names(groups: Groups) -> Iterator[str]:
    """Yield what errors call each parameter."""
    for index, group in enumerate(groups):
        if "param_names" in group:
            yield from (f"parameter {name!r}" for name in group["param_names"])
        else:
            yield from (f"parameter {place} of group {index}" for place in range(len(group["params"])))


def check_parameters(groups: Groups) -> None:
    """Raise InputError, naming the parameter, unless each can be updated where it lies."""
    spans = []
    for name, tensor in zip(names(groups), (p for group in groups for p in group["params"]), strict=True):
        _check_parameter(name, tensor)
        spans.append((tensor.data_ptr(), 4 * tensor.numel(), name))
    last_end, last_name = 0, ""
    for start, n_bytes, name in sorted(span for span in spans if span[1]):
        if start < last_end:
            raise InputError(f"{name} must not share memory with {last_name}")
        last_end, last_name = start + n_bytes, name


def _check_parameter(name: str, tensor: torch.Tensor) -> None:
    if not is_plain(tensor):
        raise InputError(f"{name} must be a plain tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided:
        raise InputError(f"{name} must be dense, got layout {tensor.layout}")
    if tensor.device.type != "cpu":
        raise InputError(f"{name} must be on the CPU, got {tensor.device}")
    if tensor.dtype is not torch.float32:
        raise InputError(f"{name} must be float32, got {tensor.dtype}")
    if not _has_memory(tensor):
        got = f"{tensor.untyped_storage().nbytes()} bytes of it"
        raise InputError(f"{name} must have memory for its {tensor.numel()} elements, got {got}")
    if not tensor.is_contiguous() or tensor.is_neg() or tensor.data_ptr() % 4:
        how = "a negated view" if tensor.is_neg() else f"strides {tensor.stride()} at address {tensor.data_ptr():#x}"
        raise InputError(f"{name} must be contiguous and aligned memory, got {how}")
    if tensor.is_inference():
        raise InputError(f"{name} must not be made in inference mode, since autograd cannot know that it changes")


def _has_memory(tensor: torch.Tensor) -> bool:
    """Return whether the storage is there: `resize_` of it leaves shape and strides as they were."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    n_bytes = (tensor.storage_offset() + last + 1) * tensor.element_size()
    return tensor.numel() == 0 or bool(n_bytes <= tensor.untyped_storage().nbytes())


class Tensors(PreparedTensors):
    """The parameters of an optimizer, with their moments in two flat vectors and their counts of steps in a third.

    Parameters
    ----------
    groups : the optimizer's, read only
    state : mapping of parameter to its step, exp_avg and exp_avg_sq, read only
        It is copied. Parameters without a gradient so far have none.
    threads, skips : the number of threads, and whether a gradient that is not finite is no error

    Attributes
    ----------
    state : dict
        The same state, as views of the flat vectors.

    Raises
    ------
    InputError, StateError
        If a parameter or its state breaks a rule.
    """

    def __init__(self, groups: Groups, state: Mapping[Any, Any], *, threads: int | None, skips: bool) -> None:
        check_parameters(groups)
        tensors = tuple(p for group in groups for p in group["params"])
        self._tensors, self._names, self._skips = tensors, list(names(groups)), skips
        place = {id(tensor): i for i, tensor in enumerate(tensors)}
        given: dict[int, Mapping[str, Any]] = {}
        for tensor, entry in state.items():
            if id(tensor) not in place:
                what = f"shape {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)
                raise StateError(f"state must be of the optimizer's parameters alone, got that of another, {what}")
            index = place[id(tensor)]
            if entry:  # an empty one is what looking at the state of a parameter without any leaves behind
                given[index] = _checked(self._names[index], entry, tensor)
        entries, self._flats = _zeros(tensors)  # kept, whatever becomes of the views
        for index, entry in given.items():
            for key in KEYS:
                entries[index][key].copy_(torch.as_tensor(entry[key]))
        self.state = {tensors[index]: entries[index] for index in given}
        super().__init__(
            torch.Tensor.__dlpack_c_exchange_api__,
            torch.Tensor,
            tensors,
            tuple(len(group["params"]) for group in groups),
            entries,
            linked=tuple(given),
            threads=thread_count(threads),
        )

    # What the kernel asks when something is out of the ordinary.

    def packed(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        """Return a contiguous copy of a gradient that is none, or raise InputError."""
        name, tensor = f"gradient of {self._names[index]}", self._tensors[index]
        if not is_plain(gradient):
            raise InputError(f"{name} must be a plain tensor, got {type(gradient).__name__}")
        if gradient.layout is not torch.strided:
            raise InputError(f"{name} must be dense, got layout {gradient.layout}")
        if gradient.device.type != "cpu":
            raise InputError(f"{name} must be on the CPU, got {gradient.device}")
        if gradient.dtype not in GRADIENT_DTYPES:
            raise InputError(f"{name} must be float32, float16 or bfloat16, got {gradient.dtype}")
        if gradient.shape != tensor.shape:
            raise InputError(f"{name} must have shape {tuple(tensor.shape)}, got {tuple(gradient.shape)}")
        if not _has_memory(gradient):
            got = f"{gradient.untyped_storage().nbytes()} bytes of it"
            raise InputError(f"{name} must have memory for its {gradient.numel()} elements, got {got}")
        return gradient.detach().as_subclass(torch.Tensor).clone(memory_format=torch.contiguous_format)

    def overlapping(self, index: int) -> None:
        """Raise the error for a gradient that lies in what a step writes."""
        raise InputError(f"gradient of {self._names[index]} must not overlap a parameter or the optimizer's state")

    def miscounted(self, index: int, steps: float) -> None:
        """Raise the error for a count of steps that somebody made none."""
        raise StateError(f"step of {self._names[index]} must be an integer in [0, 2^24], got {steps!r}")

    def refused(self) -> None:
        """Raise the error for gradients that cannot be applied, unless such steps are skipped."""
        if self._skips:
            return
        found = self.nonfinite
        if found is None:
            what = "2^130 times max_grad_norm" if self.norm <= MAX_GRADIENT else "2^63 so that its square fits float32"
            raise NonFiniteGradientError(f"the gradients' norm must be at most {what}, got {self.norm:.9g}")
        index, element, value = found
        spot = np.unravel_index(element, self._tensors[index].shape)
        where = ", ".join(str(int(i)) for i in spot)
        raise NonFiniteGradientError(f"gradient of {self._names[index]} must be finite, got {value} at [{where}]")


def _zeros(tensors: Sequence[torch.Tensor]) -> tuple[tuple[dict[str, torch.Tensor], ...], tuple[torch.Tensor, ...]]:
    """Return state of zeros for each, views of three vectors, and these; each tensor's moments begin a cache line."""
    rooms = [-(-tensor.numel() // CACHE_LINE) * CACHE_LINE for tensor in tensors]
    m, v = (torch.from_numpy(aligned_zeros(sum(rooms), np.float32, phase=phase)) for phase in (2, 3))
    steps = torch.zeros(len(tensors), dtype=torch.float32)
    entries, start = [], 0
    for tensor, room, step in zip(tensors, rooms, steps.unbind(), strict=True):
        exp_avg, exp_avg_sq = (flat[start : start + tensor.numel()].view(tensor.shape) for flat in (m, v))
        entries.append(dict(zip(KEYS, (step, exp_avg, exp_avg_sq), strict=True)))
        start += room
    return tuple(entries), (steps, m, v)


def _checked(name: str, entry: Any, tensor: torch.Tensor) -> Mapping[str, Any]:
    """Return the state of one parameter if it is that, else raise StateError."""
    if isinstance(entry, Mapping) and "max_exp_avg_sq" in entry:
        raise StateError(f"state of {name} must be without max_exp_avg_sq, since amsgrad is not supported")
    checks.items(f"state of {name}", entry, KEYS, StateError)
    count = checks.real(f"step of {name}", entry["step"], "an integer in [0, 2^24]", _is_count, StateError)
    for key in KEYS[1:]:
        moment = entry[key]
        what = f"{key} of {name}"
        if not isinstance(moment, torch.Tensor) or moment.layout is not torch.strided or not is_plain(moment):
            raise StateError(f"{what} must be a dense tensor, got {type(moment).__name__}")
        if moment.shape != tensor.shape or not moment.is_floating_point() or moment.device.type != "cpu":
            got = f"{moment.dtype} of shape {tuple(moment.shape)} on {moment.device}"
            raise StateError(f"{what} must be real numbers of shape {tuple(tensor.shape)} on the CPU, got {got}")
        if not torch.isfinite(moment).all() or (key == "exp_avg_sq" and (moment < 0).any()):
            rule = "finite" if key == "exp_avg" else "finite and >= 0"
            raise StateError(f"{what} must be {rule}, got values from {moment.min():g} to {moment.max():g}")
    return {"step": count, **{key: entry[key] for key in KEYS[1:]}}


def _is_count(number: float) -> bool:
    return 0 <= number <= MAX_STEP and math.floor(number) == number
