"""state_dict and load_state_dict: continuation to the same bits from every cut, and refusals that change nothing."""

import json
import math

import numpy as np
import pytest
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import (
    Gradients,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    StateError,
    TrainerBusyError,
)

VARIETIES = {
    "plain": {},
    "ring": {"history_limit": 4},
    "ring of one": {"history_limit": 1},
    "l2, cosine, warm-up": {"weight_decay_mode": "l2", "schedule": "cosine", "warmup_steps": 3, "max_steps": 15},
    "no clipping, no decay": {"max_grad_norm": math.inf, "weight_decay": 0.0},
    "skip": {"nonfinite": "skip"},
    "callable": {"schedule": lambda step: 1e-3 / (1 + step)},
    "bfloat16": {"state_dtype": "bfloat16"},
    "8 bits, l2, skip": {"state_dtype": "8bit", "weight_decay_mode": "l2", "nonfinite": "skip", "history_limit": 4},
}
STEPS = 20


def do_one(trainer: LoraTrainer, adapter, index: int) -> None:
    """Do action ``index`` of a fixed programme of steps, micro-batches and, where allowed, bad gradients."""
    pair = make_pair(index)
    if index % 5 in (2, 3):
        trainer.accumulate(1.0 + index, adapter, *pair, weight=1.0 + index)
    elif index % 5 == 4:
        trainer.step_accumulated(adapter)
    else:
        if trainer.config.nonfinite == "skip" and index % 2:
            pair[0][1, 1] = np.nan
        trainer.step(3.0 / (1 + index), adapter, *pair)


@pytest.mark.parametrize("variety", VARIETIES)
@pytest.mark.parametrize("bound", ["fresh", "bound", "far ahead"])
def test_continuation_from_every_cut_is_exact_to_the_bit(variety: str, bound: str) -> None:
    """Cut after every action, micro-batches pending or not; load into a new trainer or one that has already stepped."""
    config = VARIETIES[variety]
    whole, trainer = make_adapter(), make_trainer(**config)
    parameters, states = [whole.flat.vector.copy()], [trainer.state_dict()]
    for index in range(STEPS):
        do_one(trainer, whole, index)
        parameters.append(whole.flat.vector.copy())
        states.append(trainer.state_dict())
    final = fingerprint(trainer, whole)
    for cut in range(STEPS + 1):
        adapter, resumed = make_adapter(9), make_trainer(**config)
        for index in range({"fresh": 0, "bound": 1, "far ahead": 9}[bound]):
            do_one(resumed, adapter, index)
        adapter.flat.vector[...] = parameters[cut]
        resumed.load_state_dict(states[cut])
        assert fingerprint(resumed.state_dict()) == fingerprint(states[cut])
        for index in range(cut, STEPS):
            do_one(resumed, adapter, index)
        assert fingerprint(resumed.state_dict(), adapter) == fingerprint(trainer.state_dict(), whole)
        assert list(map(str, resumed.training_history)) == list(map(str, trainer.training_history))
        if cut < STEPS:
            assert fingerprint(resumed, adapter) == final


def test_a_set_continues_too() -> None:
    whole, trainer = make_set(), make_trainer()
    gradients = Gradients(whole)
    for seed in range(3):
        trainer.step(1.0, whole, fill(gradients, seed))
    again, resumed = make_set(), make_trainer()
    again.flat.vector[...] = whole.flat.vector
    resumed.load_state_dict(trainer.state_dict())
    for one, adapters in ((trainer, whole), (resumed, again)):
        one.step(1.0, adapters, fill(gradients, 7))
    assert fingerprint(resumed, again) == fingerprint(trainer, whole)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_many_chunks_continue_from_every_cut(state_dtype: str) -> None:
    """Chunks that rest for a while, gradients in halves, a last chunk that is short."""
    rng = np.random.default_rng(2)
    gradients = [rng.normal(size=2600).astype(np.float16) for _ in range(8)]
    for t, gradient in enumerate(gradients):
        gradient[256 * t : 256 * t + 1100] = 0
    config = {"state_dtype": state_dtype, "schedule": "cosine", "max_steps": 8, "threads": 2}
    whole, trainer = LoraAdapter(200, 60, LoraConfig(rank=10), seed=3), make_trainer(**config)
    cuts = []
    for gradient in gradients:
        cuts.append((whole.flat.vector.copy(), trainer.state_dict()))
        trainer.step(1.0, whole, gradient)
    for t, (parameters, state) in enumerate(cuts):
        adapter, resumed = LoraAdapter(200, 60, LoraConfig(rank=10), seed=4), make_trainer(**config | {"threads": 1})
        adapter.flat.vector[...] = parameters
        resumed.load_state_dict(state)
        for gradient in gradients[t:]:
            resumed.step(1.0, adapter, gradient)
        assert fingerprint(resumed, adapter) == fingerprint(trainer, whole)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
def test_state_is_plain_and_survives_json_and_arrays(state_dtype: str) -> None:
    adapter, trainer = make_adapter(), make_trainer(state_dtype=state_dtype)
    for seed in range(3):
        trainer.step(1.0, adapter, *make_pair(seed))
    trainer.accumulate(1.0, adapter, *make_pair())
    state = trainer.state_dict()

    def to_json(value: object) -> object:
        return {"array": value.tolist(), "dtype": str(value.dtype)} if isinstance(value, np.ndarray) else value

    def from_json(value: dict) -> object:
        return np.array(value["array"], value["dtype"]) if "array" in value else value

    text = json.dumps(state, default=to_json)
    resumed = make_trainer(state_dtype=state_dtype)
    resumed.load_state_dict(json.loads(text, object_hook=from_json))
    assert fingerprint(resumed.state_dict()) == fingerprint(state)


def test_state_before_anything_happened_loads() -> None:
    state = LoraTrainer().state_dict()
    assert state["version"] == 2
    assert state["adam"] is None
    assert state["accumulated"] is None
    adapter, trainer = make_adapter(), make_trainer()
    for seed in range(3):
        trainer.step(1.0, adapter, *make_pair(seed))
    trainer.load_state_dict(state)
    assert (trainer.total_steps(), trainer._adam.t) == (0, 0)
    assert not trainer._adam.m.any()


def test_state_is_a_copy_in_both_directions() -> None:
    """Arrays that the trainer kept by reference could be changed, or made infinite, after they were checked."""
    adapter, trainer = make_adapter(), make_trainer()
    trainer.step(1.0, adapter, *make_pair())
    trainer.accumulate(1.0, adapter, *make_pair())
    state = trainer.state_dict()
    before = fingerprint(state)
    trainer.step_accumulated()
    assert fingerprint(state) == before
    resumed = make_trainer()
    resumed.load_state_dict(state)
    for array in (state["adam"]["m"], state["adam"]["v"], state["accumulated"]["gradient"], state["history"]["loss"]):
        array[...] = np.nan
    assert fingerprint(resumed.state_dict()) == before
    resumed.state_dict()["adam"]["m"][...] = np.nan
    assert fingerprint(resumed.state_dict()) == before


def test_micro_batches_of_a_state_wait_for_their_adapter() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.accumulate(1.0, adapter, *make_pair())
    state, twin = trainer.state_dict(), make_adapter()
    resumed = make_trainer()
    resumed.load_state_dict(state)
    assert resumed.accumulated == 1
    with pytest.raises(
        StateError, match="step_accumulated needs the adapter, since nothing has bound this trainer to one"
    ):
        resumed.step_accumulated()
    with pytest.raises(StateError, match="adapter must have the 33 parameters of the loaded state, got AdapterSet"):
        resumed.step_accumulated(make_set())
    with pytest.raises(StateError, match="1 micro-batches wait"):
        resumed.step(1.0, twin, *make_pair())
    assert resumed.step_accumulated(twin) == trainer.step_accumulated()
    assert same_bits(twin.flat.vector, adapter.flat.vector)


def test_discarding_the_micro_batches_of_a_state_leaves_any_adapter() -> None:
    trainer = make_trainer()
    trainer.accumulate(1.0, make_adapter(), *make_pair())
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    resumed.discard_accumulated()
    adapters = make_set()
    resumed.step(1.0, adapters, Gradients(adapters))
    resumed.accumulate(1.0, adapters, Gradients(adapters))
    resumed.step_accumulated()


def test_a_fresh_trainer_with_a_state_wants_its_layout() -> None:
    trainer = make_trainer()
    trainer.step(1.0, make_adapter(), *make_pair())
    resumed = make_trainer()
    resumed.load_state_dict(trainer.state_dict())
    before = fingerprint(resumed.state_dict())
    with pytest.raises(StateError, match=r"adapter must have the layout of the loaded state, \(\('A', \(3, 6\)\)"):
        resumed.step(1.0, make_set(), np.zeros(54, np.float32))
    assert fingerprint(resumed.state_dict()) == before
    resumed.step(1.0, make_adapter(), *make_pair())
    assert resumed.total_steps() == 2


def test_a_refused_first_step_keeps_the_loaded_state_for_the_next_adapter() -> None:
    adapter, trainer = make_adapter(), make_trainer()
    trainer.step(1.0, adapter, *make_pair())
    resumed, twin = make_trainer(), make_adapter(4)
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match="gradient must be"):
        resumed.step(1.0, make_adapter(5), None, None)
    twin.flat.vector[...] = adapter.flat.vector
    for one, one_adapter in ((trainer, adapter), (resumed, twin)):
        one.step(1.0, one_adapter, *make_pair(1))
    assert fingerprint(resumed, twin) == fingerprint(trainer, adapter)


def good_state() -> dict:
    trainer, adapter = make_trainer(), make_adapter()
    for seed in range(3):
        trainer.step(1.0, adapter, *make_pair(seed))
    trainer.accumulate(1.0, adapter, *make_pair())
    return trainer.state_dict()


def broken(path: str, value: object) -> dict:
    state = good_state()
    *outer, key = path.split(".")
    holder = state
    for name in outer:
        holder = holder[name]
    holder[key] = value
    return state


KEYS = "state must be a mapping with the keys version, adam, history, accumulated, ema, watch, good"
LAYOUT = "adapter must have the layout of the loaded state"
BAD_STATES = [
    (lambda: None, f"{KEYS}, got NoneType"),
    (lambda: {}, f"{KEYS}, got the keys $"),
    (lambda: good_state() | {"extra": 1}, "state must be a mapping with the keys .*extra"),
    (lambda: broken("version", 3), "state version must be 1 or 2, got 3"),
    (lambda: broken("version", None), "state version must be 1 or 2, got None"),
    (lambda: broken("adam", []), "adam must be a mapping with the keys layout, t and those of the moments, got list"),
    (lambda: broken("adam.t", 4), "adam t must be at most the 3 steps of the history, got 4"),
    (lambda: broken("adam.t", -1), "adam t must be an integer >= 1, got -1"),
    (lambda: broken("adam.m", np.full(33, np.nan, "f4")), "adam m must be finite, got nan"),
    (lambda: broken("adam.v", np.full(33, -1, "f4")), "adam v must be >= 0"),
    (lambda: broken("adam.v", np.zeros(3, "f4")), "adam v must be float32 of shape"),
    (lambda: broken("adam.layout", [["A", [33]]]), rf"{LAYOUT}, .*, got LoraAdapter\(6 -> 5"),
    (lambda: broken("history", None), "history must be a mapping with the keys"),
    (lambda: broken("history.limit", 5), "history limit must be None, as configured, got 5"),
    (lambda: broken("history.limit", -5), "history limit must be an integer >= 1, got -5"),
    (lambda: broken("history.total_steps", 7), "history loss must be float64 of shape"),
    (lambda: broken("accumulated.count", 0), "accumulated count must be an integer >= 1"),
    (lambda: broken("accumulated.weight", 0), "accumulated weight must be finite and >= 1e-30, got 0"),
    (
        lambda: broken("accumulated.gradient", np.zeros(32, "f4")),
        r"accumulated gradient must be float32 of shape \(33,\)",
    ),
    (lambda: broken("accumulated", 3), "accumulated must be a mapping with the keys"),
]


@pytest.mark.parametrize(("make", "message"), BAD_STATES, ids=range(len(BAD_STATES)))
def test_a_bad_state_is_refused_and_changes_nothing(make, message: str) -> None:
    trainer, adapter = make_trainer(), make_adapter()
    for seed in range(2):
        trainer.step(1.0, adapter, *make_pair(seed))
    trainer.accumulate(1.0, adapter, *make_pair())
    before, history = fingerprint(trainer, adapter), trainer.training_history
    with pytest.raises(StateError, match=message):
        trainer.load_state_dict(make())
    assert fingerprint(trainer, adapter) == before
    assert trainer.training_history is history
    trainer.step_accumulated()


COMPACT_BAD_STATES = [
    ("8bit", "float32", None, None, "adam dtype must be 'float32', as configured, got '8bit'"),
    ("bfloat16", "8bit", None, None, "adam dtype must be '8bit', as configured, got 'bfloat16'"),
    ("float32", "bfloat16", None, None, "adam dtype must be 'bfloat16', as configured, got 'float32'"),
    ("8bit", "8bit", "dtype", "4bit", "adam dtype must be one of 'float32', 'bfloat16', '8bit', got '4bit'"),
    ("8bit", "8bit", "m", np.zeros(32, "i1"), r"adam m must be int8 of shape \(33,\), got int8 of shape \(32,\)"),
    ("8bit", "8bit", "v", np.zeros(33, "u2"), "adam v must be uint8 of shape .*, got uint16"),
    ("8bit", "8bit", "m_exponents", np.zeros(2, "u1"), r"adam m_exponents must be uint8 of shape \(1,\)"),
    ("8bit", "8bit", "m_exponents", np.array([238], "u1"), "adam m_exponents must be at most 237, got 238"),
    ("8bit", "8bit", "v_exponents", np.array([222], "u1"), "adam v_exponents must be at most 221, got 222"),
    ("bfloat16", "bfloat16", "m", np.full(33, 0x7F80, "u2"), "adam m must be finite, got inf"),
    ("bfloat16", "bfloat16", "v", np.full(33, 0x7FC0, "u2"), "adam v must be finite, got nan"),
    ("bfloat16", "bfloat16", "v", np.full(33, 0xBF80, "u2"), "adam v must be >= 0, got -1.0"),
    ("bfloat16", "bfloat16", "v", np.zeros(33, "f4"), "adam v must be uint16 of shape .*, got float32"),
]


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(("saved", "configured", "key", "value", "message"), COMPACT_BAD_STATES)
def test_a_bad_compact_state_is_refused_and_changes_nothing(
    saved: str, configured: str, key: str | None, value: object, message: str, bound: bool
) -> None:
    first, trained = make_trainer(state_dtype=saved), make_adapter()
    for seed in range(3):
        first.step(1.0, trained, *make_pair(seed))
    state = first.state_dict()
    if key is not None:
        state["adam"][key] = value
    trainer, adapter = make_trainer(state_dtype=configured), make_adapter()
    if bound:
        trainer.step(1.0, adapter, *make_pair(7))
    before = fingerprint(trainer, adapter)
    with pytest.raises(StateError, match=message):
        trainer.load_state_dict(state)
    assert fingerprint(trainer, adapter) == before
    trainer.step(1.0, adapter, *make_pair(8))


def test_the_largest_legal_compact_state_stays_finite() -> None:
    """Every stored number as large as the checks let through: no step makes it infinite."""
    largest = {
        "bfloat16": {"m": np.full(33, 0x7F7F, "u2"), "v": np.full(33, 0x7F7F, "u2")},
        "8bit": {"m": np.full(33, -0x7F, "i1"), "v": np.full(33, 0xFF, "u1"),
                 "m_exponents": np.array([237], "u1"), "v_exponents": np.array([221], "u1")},
    }  # fmt: skip
    for state_dtype, arrays in largest.items():
        trainer, adapter = make_trainer(state_dtype=state_dtype), make_adapter()
        trainer.step(1.0, adapter, *make_pair())
        state = trainer.state_dict()
        state["adam"] |= arrays
        trainer.load_state_dict(state)
        for seed in range(5):
            trainer.step(1.0, adapter, *make_pair(seed))
            for values in (adapter.flat.vector, trainer._adam.m, trainer._adam.v):
                assert np.isfinite(values).all()
            make_trainer(state_dtype=state_dtype).load_state_dict(trainer.state_dict())


def test_history_limit_of_state_and_config_must_agree() -> None:
    trainer = LoraTrainer(LoraTrainingConfig(history_limit=5))
    with pytest.raises(StateError, match="history limit must be 5, as configured, got None"):
        trainer.load_state_dict(good_state())


def test_state_is_refused_while_a_step_is_under_way() -> None:
    """Taken from inside a step it would hold half of it."""
    adapter, state, heard = make_adapter(), good_state(), []

    def rate(step: int) -> float:
        if step == 1:
            for call in (trainer.state_dict, trainer.discard_accumulated, lambda: trainer.load_state_dict(state)):
                with pytest.raises(
                    TrainerBusyError, match="this trainer is busy: a step is under way in another thread"
                ):
                    call()
                heard.append(call)
        return 0.1

    trainer = make_trainer(schedule=rate)
    for _ in range(3):
        trainer.step(1.0, adapter, *make_pair())
    assert len(heard) == 3
    assert trainer.total_steps() == 3


def test_the_replaced_optimizer_refuses_to_step() -> None:
    """A thread that had looked it up just before the load would update the parameters without any record of it."""
    adapter, trainer = make_adapter(), make_trainer()
    trainer.step(1.0, adapter, *make_pair())
    old, before = trainer._adam, trainer.state_dict()
    trainer.load_state_dict(before)
    parameters = adapter.flat.vector.copy()
    for call in (
        lambda: old.run_step(1.0, *make_pair()),
        lambda: old.accumulate(np.zeros(33, np.float32), 1.0, *make_pair(), 1.0),
    ):
        with pytest.raises(TrainerBusyError, match="another thread has given it another state or adapter meanwhile"):
            call()
    assert same_bits(adapter.flat.vector, parameters)
    assert fingerprint(trainer.state_dict()) == fingerprint(before)
