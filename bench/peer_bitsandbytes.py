"""bitsandbytes' AdamW on the CPU after PyTorch's ``clip_grad_norm_``, with moments of 32 bits and of 8."""

import bitsandbytes
import torch
from built import Built
from cases import Case
from oracle import FLOAT32_NORM_TOLERANCE
from peer_torch import loader, parameters_of, reader
from torch.nn.utils import clip_grad_norm_

from cylora._cli_numpy import BETA1, BETA2, EPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY


def _build(case: Case, threads: int, bits: int) -> Built:
    torch.set_num_threads(threads)
    params = parameters_of(case)
    optimizer = bitsandbytes.optim.AdamW(
        params, lr=LEARNING_RATE, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY, optim_bits=bits
    )

    def step() -> torch.Tensor:
        norm = clip_grad_norm_(params, MAX_GRAD_NORM)
        optimizer.step()
        return norm

    state = "8bit" if bits == 8 else "float32"
    return Built(step, (), loader(params, case), reader(params), state, norm_tolerance=FLOAT32_NORM_TOLERANCE)


def bits32(case: Case, threads: int) -> Built:
    return _build(case, threads, 32)


def bits8(case: Case, threads: int) -> Built:
    """Of a matrix with fewer than 4,096 elements the moments stay at 32 bits: bitsandbytes' own default."""
    return _build(case, threads, 8)
