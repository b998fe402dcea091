"""The optimizer's share of a step with PEFT: ours against torch's, on the 448 LoRA matrices of a Llama with 32 layers.

Ours is `CyloraAdamW(max_grad_norm=1).step()`, torch's is `clip_grad_norm_` and `AdamW(fused=True).step()`. They take
turns in one process, on gradients that autograd has just made, as after `zero_grad()` and `backward()`, which are not
timed. Before that both are compared with torch's AdamW in float64.

``python bench/torch_peft.py [--threads N] [--quick] [--json FILE]`` (extra ``bench-peers``)
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from cylora.integrations.torch import CyloraAdamW

LAYERS, RANK, MAX_NORM = 32, 8, 1.0
OPTIONS = {"lr": 1e-3, "weight_decay": 0.01}
WIDTHS = (64, 256, 1024, 4096)
TURNS, QUICK_TURNS = 60, 10
CHECKED_STEPS = 5
TOLERANCE = 2e-3  # learning rates that a parameter may be off after these
TARGET, TARGET_WIDTH = 5.0, 64


def shapes_of(width: int) -> list[tuple[int, int]]:
    """Return A's and B's shapes for the seven projections of each layer, as Llama has them."""
    inner, keys = width * 11 // 4, width // 4
    attention = [(width, width), (width, keys), (width, keys), (width, width)]
    layer = [*attention, (width, inner), (width, inner), (inner, width)]
    return [shape for d_in, d_out in layer * LAYERS for shape in ((RANK, d_in), (d_out, RANK))]


def parameters(shapes: list[tuple[int, int]], dtype: Any = torch.float32) -> list[torch.nn.Parameter]:
    """Return the same parameters at each call, of the size that trained adapters have."""
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.05).to(dtype)) for shape in shapes]


def gradients(shapes: list[tuple[int, int]], step: int) -> list[torch.Tensor]:
    """Return gradients with a norm of about 3, which clipping reduces."""
    generator = torch.Generator().manual_seed(step + 1)
    size = 3 / sum(rows * columns for rows, columns in shapes) ** 0.5
    return [torch.randn(shape, generator=generator) * size for shape in shapes]


def differentiate(params: list[torch.nn.Parameter], grads: list[torch.Tensor]) -> None:
    """Let autograd make new gradients, as a backward pass does."""
    for param in params:
        param.grad = None
    torch.autograd.backward(params, [grad.to(param.dtype) for param, grad in zip(params, grads, strict=True)])


def ours(params: list[torch.nn.Parameter]) -> Callable[[], object]:
    return CyloraAdamW(params, **OPTIONS, max_grad_norm=MAX_NORM, threads=torch.get_num_threads()).step


def theirs(params: list[torch.nn.Parameter]) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(params, **OPTIONS, fused=True)

    def step() -> None:
        clip_grad_norm_(params, MAX_NORM)
        optimizer.step()

    return step


def errors(shapes: list[tuple[int, int]]) -> dict[str, float]:
    """Return how far each is from float64 after some steps, in learning rates."""
    finals = {}
    for name, make in {"ours": ours, "torch": theirs, "exact": theirs}.items():
        params = parameters(shapes, torch.float64 if name == "exact" else torch.float32)
        step = make(params)
        for number in range(CHECKED_STEPS):
            differentiate(params, gradients(shapes, number))
            step()
        finals[name] = torch.cat([param.detach().double().flatten() for param in params])
    return {name: float((finals[name] - finals["exact"]).abs().max()) / OPTIONS["lr"] for name in ("ours", "torch")}


def measured(width: int, turns: int) -> dict[str, Any]:
    """Return the figures of one width; who goes first changes."""
    shapes = shapes_of(width)
    off = errors(shapes)
    sides = {"ours": (parameters(shapes), ours), "torch": (parameters(shapes), theirs)}
    steps = {name: (params, make(params)) for name, (params, make) in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    grads = gradients(shapes, 0)
    gc.collect()
    gc.disable()
    for turn in range(turns + 2):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            params, step = steps[name]
            differentiate(params, grads)
            started = time.perf_counter()
            step()
            if turn >= 2:
                times[name].append(time.perf_counter() - started)
    gc.enable()
    return {
        "width": width,
        "matrices": len(shapes),
        "parameters": sum(rows * columns for rows, columns in shapes),
        "threads": torch.get_num_threads(),
        "correct": off["ours"] <= TOLERANCE,
        **{f"{name}_off": one for name, one in off.items()},
        **{f"{name}_us": statistics.median(one) * 1e6 for name, one in times.items()},
        "ratio": statistics.median(b / a for a, b in zip(times["ours"], times["torch"], strict=True)),
    }


def main() -> int:
    """Measure, print a table, and say in the exit code whether results are right and the target is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="of each side (default 1)")
    parser.add_argument("--quick", action="store_true", help="few turns, and not the largest")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    widths, turns = (WIDTHS[:-1], QUICK_TURNS) if options.quick else (WIDTHS, TURNS)
    found = [measured(width, turns) for width in widths]
    print(f"448 LoRA matrices of rank {RANK}, torch {torch.__version__}, {options.threads} threads, {turns} turns")
    print(f"{'width':>6}{'parameters':>12}{'ours us':>10}{'torch us':>10}{'ratio':>7}{'ours off':>11}{'torch off':>11}")
    for one in found:
        times = f"{one['ours_us']:10.0f}{one['torch_us']:10.0f}{one['ratio']:7.1f}"
        print(f"{one['width']:6}{one['parameters']:12,}{times}{one['ours_off']:11.1e}{one['torch_off']:11.1e}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    meets = all(one["ratio"] >= TARGET for one in found if one["width"] == TARGET_WIDTH)
    correct = all(one["correct"] for one in found)
    print(f"all correct: {correct}; at width {TARGET_WIDTH} at least {TARGET:g} times less: {meets}")
    return 0 if meets and correct else 1


if __name__ == "__main__":
    raise SystemExit(main())
