"""The compiled part: loops in C, dispatched by instruction set. Only `cylora.optimizer` imports this."""

from cylora.kernels.adam import PreparedAdam
from cylora.kernels.arrays import clip, joined, norm
from cylora.kernels.buffers import check_gradient
from cylora.kernels.dispatch import isa, variants
from cylora.kernels.many import step_many
from cylora.kernels.owned import Owned, Round, release
from cylora.kernels.tensors import PreparedTensors

__all__ = [
    "Owned",
    "PreparedAdam",
    "PreparedTensors",
    "Round",
    "check_gradient",
    "clip",
    "isa",
    "joined",
    "norm",
    "release",
    "step_many",
    "variants",
]
