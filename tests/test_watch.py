"""The divergence guard and early stopping: what they see, what a step comes to, and that nothing else changes."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
from training import fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

from cylora import (
    DivergenceError,
    EarlyStopping,
    Gradients,
    InputError,
    LoraAdapter,
    LoraTrainer,
    NonFiniteGradientError,
    StateError,
    step_many,
)  # fmt: skip

WINDOW, FACTOR = 5, 4.0
GUARD: dict[str, Any] = {
    "divergence_window": WINDOW, "divergence_factor": FACTOR, "rollback_every": 4, "ema_decay": 0.9,
    "max_grad_norm": 1e9,
}  # fmt: skip
POLICIES = ("raise", "skip", "rollback")


def guarded(policy: str, **config: Any) -> tuple[LoraTrainer, LoraAdapter]:
    return make_trainer(**GUARD | {"divergence": policy} | config), make_adapter()


def good(trainer: LoraTrainer, adapter: LoraAdapter, seed: int) -> Any:
    """Do a step of a usual loss and norm."""
    return trainer.step(1.0 + seed / 100, adapter, *make_pair(seed))


def parts_of(trainer: LoraTrainer, adapter: LoraAdapter) -> list[Any]:
    """Return copies of what a rollback brings back."""
    state = trainer.state_dict()
    adam = state["adam"] or {}
    return [adapter.flat.vector.copy(), adam.get("m"), adam.get("v"), adam.get("t"), state["ema"]]


def same(one: list[Any], other: list[Any]) -> bool:
    return all(a == b if isinstance(a, int) else same_bits(a, b) for a, b in zip(one, other, strict=True))


BAD = {
    "a norm": (1.0, 100.0), "a loss": (40.0, 1.0), "both": (40.0, 100.0), "a loss of NaN": (math.nan, 1.0),
    "an infinite loss": (math.inf, 1.0), "a loss of -inf": (-math.inf, 1.0),
}  # fmt: skip


def bad(trainer: LoraTrainer, adapter: LoraAdapter, what: str) -> Any:
    loss, factor = BAD[what]
    grad_a, grad_b = make_pair(77)
    return trainer.step(loss, adapter, grad_a * np.float32(factor), grad_b * np.float32(factor))


# ------------------------------------------------------------------ raise


@pytest.mark.parametrize("what", BAD)
def test_a_refused_step_leaves_every_byte_and_the_next_is_as_ever(what: str) -> None:
    (trainer, adapter), (twin, other) = guarded("raise"), guarded("raise")
    for seed in range(8):
        good(trainer, adapter, seed)
        good(twin, other, seed)
    before = fingerprint(trainer, adapter)
    for _ in range(3):
        with pytest.raises(DivergenceError):
            bad(trainer, adapter, what)
        assert fingerprint(trainer, adapter) == before
    for seed in range(8, 12):
        assert good(trainer, adapter, seed) == good(twin, other, seed)
    assert fingerprint(trainer, adapter) == fingerprint(twin, other)


def test_a_message_says_what_was_usual() -> None:
    trainer, adapter = guarded("raise")
    for seed in range(8):
        good(trainer, adapter, seed)
    kept = list(trainer.training_history)[-WINDOW:]
    loss, norm = (
        FACTOR * statistics.median(values) for values in zip(*((x.loss, x.grad_norm) for x in kept), strict=True)
    )
    with pytest.raises(DivergenceError) as caught:
        bad(trainer, adapter, "a loss")
    assert str(caught.value) == f"the loss must be at most {loss:.6g}, 4 times its median over the last 5 steps, got 40"
    with pytest.raises(DivergenceError, match=rf"the gradient's norm must be at most {norm:.6g}, 4 times its median"):
        bad(trainer, adapter, "a norm")
    with pytest.raises(DivergenceError, match=r"the loss must be at most .*, got nan"):
        bad(trainer, adapter, "a loss of NaN")
    assert issubclass(DivergenceError, InputError)


def test_before_the_window_is_full_only_a_loss_that_is_not_finite_is_refused() -> None:
    trainer, adapter = guarded("raise")
    for seed in range(WINDOW - 1):
        good(trainer, adapter, seed)
    with pytest.raises(DivergenceError, match="the loss must be finite with divergence='raise', got inf"):
        bad(trainer, adapter, "an infinite loss")
    assert not bad(trainer, adapter, "both").skipped
    assert trainer.total_steps() == WINDOW


def test_the_limit_itself_is_allowed() -> None:
    trainer, adapter = guarded("raise")
    gradient = np.ones(adapter.param_count(), np.float32)
    for _ in range(WINDOW):
        trainer.step(1.0, adapter, gradient)
    assert not trainer.step(FACTOR, adapter, np.float32(FACTOR) * gradient).skipped
    with pytest.raises(DivergenceError):
        trainer.step(np.nextafter(FACTOR, 9), adapter, gradient)
    with pytest.raises(DivergenceError):
        trainer.step(1.0, adapter, np.nextafter(np.float32(FACTOR), np.float32(9)) * gradient)


def test_losses_around_zero_and_silent_gradients_have_no_multiple() -> None:
    trainer, adapter = guarded("raise")
    silent = np.zeros(adapter.param_count(), np.float32)
    for _ in range(WINDOW):
        trainer.step(-2.0, adapter, silent)
    assert not trainer.step(1e6, adapter, silent + 3).skipped


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
def test_a_gradient_that_is_not_finite_is_none_of_the_guards_business(policy: str, nonfinite: str) -> None:
    trainer, adapter = guarded(policy, nonfinite=nonfinite, max_grad_norm=math.inf)
    for seed in range(9):
        good(trainer, adapter, seed)
    before, kept = fingerprint(trainer, adapter), parts_of(trainer, adapter)
    spoilt = np.ones(adapter.param_count(), np.float32)
    spoilt[3] = math.nan
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match="gradient of A must be finite, got nan"):
            trainer.step(1.0, adapter, spoilt)
        assert fingerprint(trainer, adapter) == before
    else:
        assert trainer.step(1.0, adapter, spoilt).skipped
        assert same(parts_of(trainer, adapter), kept)  # not rolled back: it is where it was
    spoilt.fill(3e38)  # finite, but no square of it is
    if nonfinite == "raise":
        with pytest.raises(NonFiniteGradientError, match=r"norm must be at most 2\^63 so that its square fits"):
            trainer.step(1.0, adapter, spoilt)
    else:
        assert trainer.step(1.0, adapter, spoilt).skipped
        assert same(parts_of(trainer, adapter), kept)


# ------------------------------------------------------------------ skip


@pytest.mark.parametrize("what", BAD)
def test_a_skipped_step_is_recorded_and_changes_no_state(what: str) -> None:
    (trainer, adapter), (twin, other) = guarded("skip"), guarded("skip")
    for seed in range(8):
        good(trainer, adapter, seed)
        good(twin, other, seed)
    before = parts_of(trainer, adapter)
    for count in range(1, 2 * WINDOW):  # it never gives in
        record = bad(trainer, adapter, what)
        assert (record.skipped, record.step) == (True, 7 + count)
        assert record.grad_norm == pytest.approx(
            BAD[what][1] * np.linalg.norm(np.concatenate([x.ravel() for x in make_pair(77)]))
        )
        assert trainer.skipped_steps() == count
        assert same(parts_of(trainer, adapter), before)
    watched = [trainer.state_dict()["watch"], twin.state_dict()["watch"]]
    assert fingerprint(watched[0]) == fingerprint(watched[1])  # what was skipped is not in the medians
    for seed in range(8, 12):
        good(trainer, adapter, seed)
        good(twin, other, seed)
    assert same(parts_of(trainer, adapter), parts_of(twin, other))


def test_a_step_beyond_the_limit_is_not_clipped_into_it() -> None:
    """The guard judges the norm before clipping."""
    trainer, adapter = guarded("skip", max_grad_norm=0.1)
    for seed in range(8):
        good(trainer, adapter, seed)
    assert bad(trainer, adapter, "a norm").skipped


# ------------------------------------------------------------------ rollback


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "8bit"])
@pytest.mark.parametrize("what", BAD)
def test_a_rollback_brings_the_last_good_state_back(what: str, state_dtype: str) -> None:
    trainer, adapter = guarded("rollback", state_dtype=state_dtype)
    states = [parts_of(trainer, adapter)]
    for seed in range(10):
        good(trainer, adapter, seed)
        states.append(parts_of(trainer, adapter))
    for count in (1, 2):  # the second time there is nothing newer to go back to
        assert bad(trainer, adapter, what).skipped
        assert same(parts_of(trainer, adapter), states[8])
        assert (trainer.total_steps(), trainer.skipped_steps()) == (10 + count, count)
    twin, other = guarded("rollback", state_dtype=state_dtype)
    for seed in range(8):
        good(twin, other, seed)
    for seed in range(20, 23):
        good(trainer, adapter, seed)
        good(twin, other, seed)
    assert same(parts_of(trainer, adapter), parts_of(twin, other))
    assert len(trainer.training_history) == 15


def test_the_beginning_is_where_the_first_applied_step_begins() -> None:
    """Weights written after a first step was refused stay when the next one is rolled back."""
    trainer, adapter = guarded("rollback")
    with pytest.raises(NonFiniteGradientError):
        trainer.step(1.0, adapter, np.full(adapter.param_count(), np.nan, np.float32))
    adapter.flat.vector[:] += 1.0
    written = adapter.flat.vector.copy()
    assert trainer.step(math.inf, adapter, *make_pair()).skipped
    assert np.array_equal(adapter.flat.vector, written)


def test_a_rollback_goes_to_the_beginning_while_there_is_nothing_else() -> None:
    trainer, adapter = guarded("rollback", divergence_window=2)
    start = adapter.flat.vector.copy()
    for seed in range(3):
        good(trainer, adapter, seed)
    assert bad(trainer, adapter, "a norm").skipped
    assert same_bits(adapter.flat.vector, start)
    assert trainer.state_dict()["adam"] is None
    twin, other = guarded("rollback", divergence_window=2)
    good(trainer, adapter, 5)
    good(twin, other, 5)
    assert same(parts_of(trainer, adapter), parts_of(twin, other))


def test_a_good_state_costs_what_it_is_said_to_and_only_when_asked_for() -> None:
    for fields, bytes_each in (({}, 12), ({"ema_decay": 0.9}, 16), ({"state_dtype": "bfloat16"}, 8)):
        trainer, adapter = make_trainer(divergence="rollback", rollback_every=1, **fields), make_adapter()
        good(trainer, adapter, 0)
        assert trainer._adam is not None
        assert trainer._adam.good is not None
        kept = trainer._adam.good.arrays().values()
        assert sum(array.nbytes for array in kept) == bytes_each * adapter.param_count()
    for policy in ("ignore", "raise", "skip"):
        trainer, adapter = make_trainer(divergence=policy), make_adapter()
        good(trainer, adapter, 0)
        assert trainer._adam is not None
        assert trainer._adam.good is None
        assert trainer.state_dict()["good"] is None


# ------------------------------------------------------------------ together with the rest


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mean_of_micro_batches_is_what_the_guard_judges(policy: str) -> None:
    trainer, adapter = guarded(policy)
    for seed in range(8):
        good(trainer, adapter, seed)
    for factor in (1.0, 100.0):
        pair = [np.float32(factor) * x for x in make_pair(3)]
        trainer.accumulate(1.0, adapter, *pair)
    before = fingerprint(trainer, adapter)
    if policy == "raise":
        with pytest.raises(DivergenceError):
            trainer.step_accumulated()
        assert fingerprint(trainer, adapter) == before
        assert trainer.accumulated == 2
    else:
        assert trainer.step_accumulated().skipped
        assert trainer.accumulated == 0


@pytest.mark.parametrize("policy", POLICIES)
def test_step_many_minds_each_trainers_guard(policy: str) -> None:
    jobs, twins = [[guarded(policy) for _ in range(3)] for _ in range(2)]
    for seed in range(12):
        pairs = [make_pair(seed + place) for place in range(3)]
        if seed in (7, 10):
            pairs[1] = tuple(np.float32(50) * x for x in pairs[1])
        results = step_many([(t, 1.0, a, *pair) for (t, a), pair in zip(jobs, pairs, strict=True)])
        for (trainer, adapter), pair, result in zip(twins, pairs, results, strict=True):
            try:
                expected: Any = trainer.step(1.0, adapter, *pair)
            except DivergenceError as error:
                expected = error
            assert str(result) == str(expected)
    for job, twin in zip(jobs, twins, strict=True):
        assert fingerprint(*job) == fingerprint(*twin)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("limit", [None, 3])
def test_a_guarded_run_continues_from_every_cut(policy: str, limit: int | None) -> None:
    """Also where the history has long dropped what the medians are of."""
    config = {"history_limit": limit, "early_stopping_patience": 6, "early_stopping_min_delta": 0.05}

    def act(trainer: LoraTrainer, adapter: LoraAdapter, index: int) -> None:
        pair = [np.float32(60.0 if index % 6 == 5 else 1.0) * x for x in make_pair(index)]
        try:
            trainer.step(40.0 if index == 13 else 2.0 / (1 + index % 4), adapter, *pair)
        except DivergenceError:
            assert policy == "raise"

    (trainer, whole), cuts = guarded(policy, **config), []
    for index in range(24):
        cuts.append((whole.flat.vector.copy(), trainer.state_dict()))
        act(trainer, whole, index)
    assert policy == "raise" or trainer.skipped_steps() > 2
    for cut, (parameters, state) in enumerate(cuts):
        resumed, adapter = guarded(policy, **config)
        adapter.flat.vector[...] = parameters
        resumed.load_state_dict(state)
        assert fingerprint(resumed.state_dict()) == fingerprint(state)
        for index in range(cut, 24):
            act(resumed, adapter, index)
        assert fingerprint(resumed, adapter) == fingerprint(trainer, whole), cut


def test_a_guard_may_be_switched_on_and_off_between_runs() -> None:
    trainer, adapter = guarded("skip")
    for seed in range(8):
        good(trainer, adapter, seed)
    state = trainer.state_dict()
    off = make_trainer(**GUARD)
    off.load_state_dict(state)
    assert off.state_dict()["watch"] is None
    assert not bad(off, adapter, "both").skipped
    on = make_trainer(**GUARD | {"divergence": "skip"})
    on.load_state_dict(off.state_dict())
    assert not bad(on, adapter, "both").skipped  # it has yet to see what is usual
    for seed in range(WINDOW):
        good(on, adapter, seed)
    assert bad(on, adapter, "both").skipped
    smaller = make_trainer(**GUARD | {"divergence": "skip", "divergence_window": 2})
    smaller.load_state_dict(state)
    assert smaller.state_dict()["watch"]["losses"].tolist() == state["watch"]["losses"][-2:].tolist()


# ------------------------------------------------------------------ early stopping


def test_a_run_is_complete_when_its_loss_has_run_out_of_patience() -> None:
    adapter, trainer = (
        make_adapter(),
        make_trainer(early_stopping_patience=3, early_stopping_min_delta=0.1, max_steps=50),
    )
    assert not trainer.is_complete()
    ends = []
    for loss in (3.0, 2.0, 1.95, 2.5, math.nan, 1.0):
        trainer.step(loss, adapter, *make_pair())
        ends.append(trainer.is_complete())
    assert ends == [False, False, False, False, True, False]
    stopping = trainer.early_stopping()
    assert stopping is not None
    assert (stopping.best, stopping.best_step, stopping.is_over) == (1.0, 5, False)
    stopping.update(5.0)  # a copy
    again = trainer.early_stopping()
    assert again is not None
    assert again.count == 6


def test_patience_does_not_depend_on_who_asks() -> None:
    """Nor on a history that has dropped what nobody asked about."""
    asked, silent = (make_trainer(early_stopping_patience=6, history_limit=2) for _ in range(2))
    for seed, loss in enumerate((3.0, 2.0, 2.5, 2.5, 2.5, 2.5, 2.5)):
        for trainer in (asked, silent):
            trainer.step(loss, make_adapter() if trainer._adapters is None else trainer._adapters, *make_pair(seed))
        assert not asked.is_complete()
        asked.state_dict()
    for trainer in (asked, silent):
        trainer.step(2.5, trainer._adapters, *make_pair())
        assert trainer.is_complete()
    assert fingerprint(asked.state_dict()) == fingerprint(silent.state_dict())


def test_max_steps_still_ends_a_run_and_without_patience_nothing_else_does() -> None:
    adapter, trainer = make_adapter(), make_trainer(early_stopping_patience=100, max_steps=2)
    plain, other = make_adapter(), make_trainer(max_steps=100)
    for _ in range(2):
        assert not trainer.is_complete()
        trainer.step(1.0, adapter, *make_pair())
        other.step(1.0, plain, *make_pair())
    assert trainer.is_complete()
    assert not other.is_complete()
    assert other.early_stopping() is None
    assert make_trainer(divergence="skip").early_stopping() is None


def test_a_skipped_step_counts_for_patience() -> None:
    trainer, adapter = guarded("skip", early_stopping_patience=3, max_steps=100)
    for seed in range(WINDOW):
        trainer.step(1.0 - seed / 10, adapter, *make_pair(seed))
    for _ in range(3):
        assert not trainer.is_complete()
        bad(trainer, adapter, "a norm")
    assert trainer.is_complete()


# ------------------------------------------------------------------ interrupts, and states that do not hold together


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_watch_that_was_interrupted_reads_the_same_steps_again(monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Before the early stopping took a loss, and after it, when the step does not count as read yet."""
    (trainer, adapter), (twin, other) = (guarded("skip", early_stopping_patience=50) for _ in range(2))
    for seed in range(12):
        good(twin, other, seed)
    update = EarlyStopping.update

    def interrupted(self: Any, value: float, step: int | None = None) -> bool:
        if moment == "after":
            update(self, value, step)
        raise KeyboardInterrupt

    for seed in range(12):
        if seed % 3 == 2:
            with monkeypatch.context() as patch:
                patch.setattr(EarlyStopping, "update", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    good(trainer, adapter, seed)
        good(trainer, adapter, seed)
    assert fingerprint(trainer, adapter) == fingerprint(twin, other)


BAD_STATES = [
    ("watch", "losses", np.zeros(3), "watch norms must be float64 of shape"),
    ("watch", "losses", np.full(WINDOW, math.nan), "watch losses must be finite, got nan"),
    ("watch", "norms", np.zeros(WINDOW, np.float32), "watch norms must be float64 of shape"),
    ("watch", "losses", 3.0, "watch losses must be float64 of shape"),
    ("watch", "stopping", {}, "early stopping must be a mapping with the keys best, best_step"),
    ("watch", None, {}, "watch must be a mapping with the keys losses, norms, stopping"),
    ("ema", None, np.zeros(3, np.float32), r"ema must be float32 of shape \(33,\)"),
    ("ema", None, np.full(33, math.inf, np.float32), "ema must be finite, got inf"),
    ("ema", None, np.zeros(33), r"ema must be float32 of shape \(33,\), got float64"),
    ("good", None, {}, "good must be a mapping with the keys t, parameters, ema, sizes, moments"),
    ("good", "t", 99, "good must be an earlier state of adam, got one after 99 steps"),
    ("good", "t", -1, "good t must be an integer >= 0, got -1"),
    ("good", "parameters", np.zeros(3, np.float32), "good ema must be float32 of shape"),
    ("good", "parameters", np.full(33, math.nan, np.float32), "good parameters must be finite, got nan"),
    ("good", "parameters", None, "good parameters must be float32 of shape"),
    ("good", "ema", None, "good ema must be there if and only if ema_decay is, got 0.9"),
    ("good", "sizes", [18, 15], "good must be an earlier state of adam"),
    ("good", "sizes", [], "good sizes must be a list of at least one size"),
    ("adam", None, None, "(good must be an earlier state of adam|ema must be None while adam is)"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "inner", "value", "message"), BAD_STATES, ids=range(len(BAD_STATES)))
@pytest.mark.parametrize("bound", [False, True])
def test_a_state_that_does_not_hold_together_is_refused(
    key: str, inner: str | None, value: Any, message: str, bound: bool
) -> None:
    trainer, adapter = guarded("rollback", early_stopping_patience=9)
    for seed in range(8):
        good(trainer, adapter, seed)
    state = trainer.state_dict()
    if inner is None:
        state[key] = value
    else:
        state[key][inner] = value
    other, its = guarded("rollback", early_stopping_patience=9)
    if bound:
        good(other, its, 0)
    before = fingerprint(other, its)

    def load_and_step() -> None:
        other.load_state_dict(state)
        good(other, its, 1)  # what only the adapters can tell, is told when they come

    with pytest.raises(StateError, match=message):
        load_and_step()
    if bound:
        assert fingerprint(other, its) == before


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        ({"ema_decay": 0.9}, {}, "ema must be None, as ema_decay is, got an average of 33 parameters"),
        ({"divergence": "rollback"}, {"divergence": "skip"}, "good must be None with divergence='skip', got a state"),
        (
            {"divergence": "rollback"}, {"divergence": "rollback", "ema_decay": 0.5},
            "good ema must be there if and only if ema_decay is, got 0.5",
        ),
    ],
)  # fmt: skip
def test_a_state_wants_the_options_it_was_made_with(saved: Any, loaded: Any, message: str) -> None:
    adapter, trainer = make_adapter(), make_trainer(**saved)
    for seed in range(3):
        good(trainer, adapter, seed)
    other = make_trainer(**loaded)
    before = fingerprint(other)
    with pytest.raises(StateError, match=message):
        other.load_state_dict(trainer.state_dict())
    assert fingerprint(other) == before


def test_the_moments_to_go_back_to_have_the_configured_form() -> None:
    trainer, adapter = guarded("rollback")
    for seed in range(5):
        good(trainer, adapter, seed)
    state, other = trainer.state_dict(), guarded("rollback", state_dtype="bfloat16")
    for seed in range(5):
        good(*other, seed)
    state["good"]["moments"] = other[0].state_dict()["good"]["moments"]
    with pytest.raises(StateError, match="good dtype must be 'float32', as configured, got 'bfloat16'"):
        trainer.load_state_dict(state)


def test_a_set_is_guarded_and_rolled_back_as_one() -> None:
    adapters, trainer = make_set(), make_trainer(**GUARD | {"divergence": "rollback", "train_a": False})
    gradients, states = Gradients(adapters), []
    for seed in range(9):
        trainer.step(1.0, adapters, fill(gradients, seed))
        states.append(adapters.flat.vector.copy())
    gradients.vector[...] *= 100
    assert trainer.step(1.0, adapters, gradients).skipped
    assert same_bits(adapters.flat.vector, states[7])
