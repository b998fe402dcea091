"""Memory: parameters and two moments, and nothing else that grows with size or with the number of steps."""

import gc
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest
from test_threads import in_a_process
from training import make_trainer

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig, TrainingHistory, grad_norm

KIB = 1024
# Objects of fixed size around the vectors: names, views, dicts, the history's first rows.
FIXED = 96 * KIB
# Of state for each parameter.
BYTES = {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 / 256}


class Traced:
    """What the traced part allocated and still held at its end, and the most it held."""

    held: int
    peak: int


@contextmanager
def traced() -> Iterator[Traced]:
    gc.collect()
    tracemalloc.start()
    result = Traced()
    try:
        before, _ = tracemalloc.get_traced_memory()
        yield result
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
        result.held, result.peak = now - before, peak - before
    finally:
        tracemalloc.stop()


def model(width: int) -> AdapterSet:
    return AdapterSet({"one": (width, width)}, LoraConfig(rank=8), seed=0)


@pytest.mark.parametrize("width", [64, 4096, 65536])
def test_an_adapter_costs_its_parameters(width: int) -> None:
    with traced() as cost:
        adapter = LoraAdapter(width, width, LoraConfig(rank=8), seed=0)
    assert adapter.memory_bytes() == 64 * width
    assert adapter.memory_bytes() <= cost.held <= adapter.memory_bytes() + 16 * KIB


@pytest.mark.parametrize("state_dtype", BYTES)
@pytest.mark.parametrize("width", [64, 4096, 65536])
def test_training_adds_two_moments_of_the_promised_size(width: int, state_dtype: str) -> None:
    adapters = model(width)
    gradients = Gradients(adapters)
    with traced() as cost:
        trainer = make_trainer(state_dtype=state_dtype)
        trainer.step(1.0, adapters, gradients)
    size = BYTES[state_dtype] * adapters.param_count()
    assert trainer._adam._moments.nbytes == size
    assert size <= cost.held <= size + FIXED
    assert cost.peak <= size + FIXED


@pytest.mark.parametrize("state_dtype", BYTES)
def test_saving_and_loading_copy_the_state_as_it_is_stored(state_dtype: str) -> None:
    """What is compact stays compact on its way; only the checks of a loaded one decode it, and keep nothing."""
    adapters = model(65536)
    trainer = make_trainer(state_dtype=state_dtype)
    trainer.step(1.0, adapters, Gradients(adapters))
    size = trainer._adam._moments.nbytes
    with traced() as saving:
        state = trainer.state_dict()
    assert size <= saving.held <= size + FIXED
    assert saving.peak <= size + FIXED
    resumed = make_trainer(state_dtype=state_dtype)
    with traced() as loading:
        resumed.load_state_dict(state)
    assert size <= loading.held <= size + FIXED


@pytest.mark.parametrize("state_dtype", BYTES)
def test_many_small_trainers_stay_small(state_dtype: str) -> None:
    """A server holds thousands: 128 parameters each, and objects of some 13 KiB around them."""
    gradient = np.ones(128, np.float16)
    pairs = []
    with traced() as cost:
        for seed in range(300):
            adapter = LoraAdapter(16, 16, LoraConfig(rank=4), seed=seed)
            trainer = make_trainer(state_dtype=state_dtype, history_limit=8)
            for _ in range(3):
                trainer.step(1.0, adapter, gradient)
            pairs.append((adapter, trainer))
    assert cost.held <= 300 * 16 * KIB
    assert cost.peak <= 300 * 16 * KIB + FIXED


@pytest.mark.parametrize("width", [64, 4096, 65536])
def test_micro_batches_add_one_vector_when_they_are_first_used(width: int) -> None:
    adapters, trainer = model(width), make_trainer()
    gradients = Gradients(adapters)
    trainer.step(1.0, adapters, gradients)
    with traced() as cost:
        for _ in range(10):
            trainer.accumulate(1.0, adapters, gradients)
            trainer.accumulate(1.0, adapters, gradients)
            trainer.step_accumulated()
    size = adapters.memory_bytes()
    assert size <= cost.held <= size + 16 * KIB
    assert cost.peak <= size + 16 * KIB


def _step(trainer, adapters, gradients) -> None:
    trainer.step(1.0, adapters, gradients)


def _refused(trainer, adapters, gradients) -> None:
    kept, gradients.vector[-1] = gradients.vector[-1], np.nan
    with pytest.raises(ValueError, match="must be finite"):
        trainer.step(1.0, adapters, gradients)
    gradients.vector[-1] = kept


def _accumulated(trainer, adapters, gradients) -> None:
    trainer.accumulate(1.0, adapters, gradients)
    trainer.step_accumulated()


@pytest.mark.parametrize("state_dtype", BYTES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint16])
@pytest.mark.parametrize("width", [64, 65536])
def test_a_step_of_any_types_allocates_nothing_that_grows(width: int, dtype: type, state_dtype: str) -> None:
    """Halves are widened a chunk at a time, compact moments decoded so: never a whole vector."""
    adapter, trainer = LoraAdapter(width, width, LoraConfig(rank=8), seed=0), make_trainer(state_dtype=state_dtype)
    pair = [np.ones(shape, np.float32).astype(dtype) for shape in ((8, width), (width, 8))]
    if dtype is np.uint16:
        pair = [np.full(grad.shape, 0x3F80, np.uint16) for grad in pair]
    bad = np.full((8, width), 0x7FC0, np.uint16)

    def steps() -> None:
        trainer.step(1.0, adapter, *pair)
        trainer.accumulate(1.0, adapter, *pair)
        trainer.step_accumulated()
        assert grad_norm(pair) == pytest.approx(4 * np.sqrt(width))
        with pytest.raises(ValueError, match="must be finite"):
            trainer.step(1.0, adapter, bad, pair[1])

    for _ in range(3):
        steps()
    with traced() as cost:
        for _ in range(10):
            steps()
    assert cost.peak <= 16 * KIB
    assert cost.held <= 8 * KIB


@pytest.mark.parametrize("call", [_step, _refused, _accumulated])
@pytest.mark.parametrize("width", [64, 65536])
def test_a_step_allocates_nothing_that_grows_with_the_model(call: Callable, width: int) -> None:
    adapters, trainer = model(width), make_trainer()
    gradients = Gradients(adapters)
    for _ in range(3):
        call(trainer, adapters, gradients)
    with traced() as cost:
        for _ in range(20):
            call(trainer, adapters, gradients)
    assert cost.peak <= 16 * KIB
    assert cost.held <= 8 * KIB


@pytest.mark.parametrize("steps", [1 << 12, 1 << 15])
def test_history_takes_25_bytes_a_step(steps: int) -> None:
    """Three doubles and a flag. While it doubles, old and new rows exist side by side."""
    with traced() as cost:
        history = TrainingHistory()
        for _ in range(steps):
            history.append(loss=1.0, learning_rate=0.1, grad_norm=2.0)
    assert 25 * steps <= cost.held <= 25 * steps + 8 * KIB
    assert cost.peak <= 1.6 * 25 * steps + 64 * KIB


def test_a_trainers_history_is_its_only_growth() -> None:
    adapters, trainer = model(64), make_trainer()
    gradients = Gradients(adapters)
    for _ in range(1 << 14):
        trainer.step(1.0, adapters, gradients)
    with traced() as cost:
        for _ in range(1 << 14):
            trainer.step(1.0, adapters, gradients)
    assert cost.held <= 2 * 25 * (1 << 14) + 8 * KIB


def test_a_ring_is_flat() -> None:
    adapters, trainer = model(64), make_trainer(history_limit=100)
    gradients = Gradients(adapters)
    for _ in range(200):
        trainer.step(1.0, adapters, gradients)
    with traced() as cost:
        for _ in range(20_000):
            trainer.step(1.0, adapters, gradients)
    assert cost.held <= 4 * KIB
    assert cost.peak <= 8 * KIB


def test_reading_a_history_without_limit_copies_no_column() -> None:
    columns = {name: np.zeros(100_000) for name in ("loss", "learning_rate", "grad_norm")}
    totals = {"limit": None, "total_steps": 100_000, "loss_sum": 0.0, "skipped_steps": 0, "first_loss": 0.0}
    history = TrainingHistory.from_state_dict(totals | columns | {"skipped": np.zeros(100_000, np.bool_)})
    with traced() as cost:
        columns = [history.column(name) for name in ("loss", "learning_rate", "grad_norm")]
    assert cost.held <= 4 * KIB
    assert all(len(column) == 100_000 for column in columns)


STEPS_AND_RSS = """
    import resource, sys
    from training import make_adapter, make_pair, make_trainer

    warm_up, steps = int(sys.argv[1]), int(sys.argv[2])
    adapter, trainer = make_adapter(), make_trainer(history_limit=1000, nonfinite="skip")
    pair, bad = make_pair(), make_pair(1)
    bad[0][0, 0] = float("nan")

    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def train(steps):
        for step in range(steps):
            trainer.step(1.0 + step % 7, adapter, *(pair if step % 100 else bad))
            if step % 1000 == 500:
                assert trainer.average_loss() > 0 and trainer.last_step().step == trainer.total_steps() - 1

    train(warm_up)
    before = resident()
    train(steps)
    print(resident() - before, trainer.total_steps(), len(trainer.training_history))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("steps", [100_000, pytest.param(1_000_000, marks=pytest.mark.nightly)])
def test_the_process_does_not_grow_with_the_number_of_steps(steps: int, figures: Callable[..., None]) -> None:
    """As the system counts it, which includes what no Python object owns; at most 512 KiB after a warm-up."""
    grown, total, kept = map(int, in_a_process(STEPS_AND_RSS, 20_000, steps).split())
    figures(steps=steps, resident_bytes_more=grown)
    assert (total, kept) == (20_000 + steps, 1000)
    assert grown <= 512 * KIB
