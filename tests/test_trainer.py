"""LoraTrainer as a caller sees it: records, counters, callbacks, binding, one call for a whole model."""

import copy
import gc
import logging
import math
import pickle
import weakref

import numpy as np
import pytest
from training import D_IN, RANK, fill, fingerprint, make_adapter, make_pair, make_set, make_trainer, same_bits

import cylora
from cylora import (
    Adam,
    AdapterSet,
    ConfigError,
    Gradients,
    InputError,
    LoraAdapter,
    LoraConfig,
    LoraTrainer,
    LoraTrainingConfig,
    NonFiniteGradientError,
    StateError,
    TrainerBusyError,
    TrainingStep,
    grad_norm,
)  # fmt: skip


def test_a_new_trainer_has_done_nothing() -> None:
    trainer = LoraTrainer()
    assert trainer.config == LoraTrainingConfig()
    assert (trainer.total_steps(), trainer.skipped_steps(), trainer.accumulated) == (0, 0, 0)
    assert (trainer.average_loss(), trainer.last_step(), trainer.convergence_rate()) == (0.0, None, None)
    assert trainer.current_lr() == 0.0
    assert not trainer.is_complete()
    assert len(trainer.training_history) == 0


def test_constructor_refuses_by_name() -> None:
    with pytest.raises(ConfigError, match="config must be a LoraTrainingConfig, got dict"):
        LoraTrainer({})
    with pytest.raises(ConfigError, match="on_step must be callable or None, got int"):
        LoraTrainer(on_step=3)


def test_a_step_is_adam_on_the_flat_vector_to_the_bit() -> None:
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "beta1": 0.8, "weight_decay_mode": "l2"}
    trainer, adapter, flat = make_trainer(**settings), make_adapter(), make_adapter().flat.vector.copy()
    adam = Adam(flat, learning_rate=1e-2, **settings)
    for step in range(20):
        a, b = make_pair(step)
        record = trainer.step(3.0 - step / 10, adapter, a, b)
        assert record.grad_norm == adam.step(np.concatenate([a.ravel(), b.ravel()]))
        assert same_bits(adapter.flat.vector, flat)
        assert record == TrainingStep(step, 3.0 - step / 10, 1e-2, record.grad_norm, math.exp(3.0 - step / 10))
    assert trainer.total_steps() == 20
    assert trainer.last_step() == record
    assert trainer.training_history[-1] == record
    assert trainer.average_loss() == pytest.approx(2.05)
    assert trainer.convergence_rate() == pytest.approx(1.9 / 3)


@pytest.mark.parametrize("form", ["pair", "flat", "gradients", "flat pair", "vector and matrix"])
def test_gradients_come_in_several_forms_to_the_same_bits(form: str) -> None:
    trainer, adapter, twin = make_trainer(), make_adapter(), make_adapter()
    a, b = make_pair()
    gradients = Gradients(adapter)
    gradients["adapter"].grad_a[...], gradients["adapter"].grad_b[...] = a, b
    forms = {
        "pair": (a, b), "flat": (np.concatenate([a.ravel(), b.ravel()]),), "gradients": (gradients,),
        "flat pair": (a.ravel(), b.ravel()), "vector and matrix": (a.ravel(), b),
    }  # fmt: skip
    make_trainer().step(1.0, twin, a, b)
    trainer.step(1.0, adapter, *forms[form])
    assert same_bits(adapter.flat.vector, twin.flat.vector)


def test_warm_up_starts_at_zero_and_its_moments_advance() -> None:
    trainer, adapter = make_trainer(warmup_steps=4, learning_rate=1.0), make_adapter()
    before = adapter.flat.vector.copy()
    assert trainer.step(1.0, adapter, *make_pair()).learning_rate == 0.0
    assert same_bits(adapter.flat.vector, before)
    assert trainer._adam.m.all()
    assert [trainer.step(1.0, adapter, *make_pair()).learning_rate for _ in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_completion_forbids_nothing() -> None:
    trainer, adapter = make_trainer(max_steps=2), make_adapter()
    seen = []
    for step in range(4):
        seen.append(trainer.is_complete())
        trainer.step(1.0, adapter, *make_pair(step))
    assert seen == [False, False, True, True]
    assert trainer.total_steps() == 4
    assert LoraTrainer(LoraTrainingConfig(max_steps=0)).is_complete()


@pytest.mark.parametrize(
    "loss", [1, 1.5, np.float32(1.5), np.float64(1.5), np.array(1.5), True.real, math.nan, -math.inf]
)
def test_losses_of_any_real_kind_are_recorded_as_floats(loss: object) -> None:
    record = make_trainer().step(loss, make_adapter(), *make_pair())
    assert type(record.loss) is float
    assert record.loss == float(loss) or math.isnan(record.loss)


# ---------------------------------------------------------------- whole models


def test_a_set_is_clipped_by_one_norm_over_all_its_adapters() -> None:
    """The moments are those of each adapter alone, to the bit. Who shares a division with whom follows from the place
    in the whole vector, so a parameter may be the float32 next to it."""
    adapters, trainer = make_set(), make_trainer(max_grad_norm=1.0)
    gradients = fill(Gradients(adapters))
    norm = grad_norm(gradients)
    assert norm > 1
    twins = {name: copy.deepcopy(one) for name, one in adapters.items()}
    assert trainer.step(1.0, adapters, gradients).grad_norm == norm
    scale = np.float32(1.0 / norm)
    m = cylora.FlatBuffer(adapters.flat.layout, over=trainer.state_dict()["adam"]["m"])
    for name, twin in twins.items():
        clipped = [part * scale for part in gradients[name]]
        alone = make_trainer(max_grad_norm=math.inf)
        alone.step(1.0, twin, *clipped)
        together = np.concatenate([m[f"{name}.{matrix}"].ravel() for matrix in "AB"])
        assert same_bits(alone.state_dict()["adam"]["m"], together)
        np.testing.assert_array_max_ulp(twin.flat.vector, adapters[name].flat.vector, maxulp=1)


def test_448_matrices_are_one_call_and_equal_224_separate_adapters() -> None:
    """Without clipping nothing couples the adapters, so the whole model must equal each adapter alone, bit for bit."""
    shapes = {"q_proj": (32, 32), "k_proj": (32, 8), "v_proj": (32, 8), "o_proj": (32, 32), "gate_proj": (32, 48),
              "up_proj": (32, 48), "down_proj": (48, 32)}  # fmt: skip
    names = {f"layers.{i}.{module}": shape for i in range(32) for module, shape in shapes.items()}
    adapters = AdapterSet(names, LoraConfig(rank=2), seed=0)
    assert len(adapters.flat.layout) == 448
    trainer = make_trainer(max_grad_norm=math.inf, weight_decay=0.1)
    twins = {
        name: (make_trainer(max_grad_norm=math.inf, weight_decay=0.1), copy.deepcopy(one))
        for name, one in adapters.items()
    }
    gradients = Gradients(adapters)
    for step in range(3):
        record = trainer.step(1.0, adapters, fill(gradients, step))
        assert record.grad_norm == grad_norm([gradients.vector])
        for name, (other, twin) in twins.items():
            other.step(1.0, twin, *gradients[name])
    for name, (_, twin) in twins.items():
        assert same_bits(twin.flat.vector, adapters[name].flat.vector)
    bad = fill(gradients)
    bad["layers.31.down_proj"].grad_b[-1, 1] = np.inf
    with pytest.raises(
        NonFiniteGradientError, match=r"gradient of layers.31.down_proj.B must be finite, got inf at \[31, 1\]"
    ):
        trainer.step(1.0, adapters, bad)


def test_a_set_of_one_takes_a_pair_too() -> None:
    adapters = AdapterSet({"only": (D_IN, 5)}, LoraConfig(rank=RANK), seed=0)
    make_trainer().step(1.0, adapters, *make_pair())
    with pytest.raises(InputError, match=r"grad_b must be a .* of shape \(5, 3\)"):
        make_trainer().step(1.0, adapters, make_pair()[0], np.zeros((5, 4), np.float32))


@pytest.mark.parametrize("sizes", [(1, 1), (20, 34), (54, 54), (10**6, 10**6)])
def test_a_pair_for_a_whole_set_is_refused(sizes: tuple[int, int]) -> None:
    """There is no telling which matrices it is for; taken as it comes it would write past the end of the parameters."""
    adapters, trainer = make_set(), make_trainer()
    trainer.step(1.0, adapters, fill(Gradients(adapters)))
    before = fingerprint(trainer, adapters)
    pair = [np.ones(size, np.float32) for size in sizes]
    for call in (trainer.step, trainer.accumulate):
        with pytest.raises(
            InputError, match="gradients of an AdapterSet must be one Gradients or flat vector, got a pair"
        ):
            call(1.0, adapters, *pair)
    assert fingerprint(trainer, adapters) == before


def test_members_of_a_set_can_be_trained_alone() -> None:
    adapters, trainer = make_set(), make_trainer()
    before = adapters.flat.vector.copy()
    trainer.step(1.0, adapters["k"], *make_pair(0, adapters["k"]))
    changed = np.flatnonzero(adapters.flat.vector != before)
    assert changed.min() == 22
    assert changed.max() == 35


# ---------------------------------------------------------------- reports


def test_every_n_steps_are_logged_and_called_back(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[TrainingStep] = []
    trainer = LoraTrainer(LoraTrainingConfig(log_every=3, warmup_steps=0, nonfinite="skip"), on_step=seen.append)
    adapter, bad = make_adapter(), make_pair()
    bad[0][0, 0] = np.nan
    with caplog.at_level(logging.INFO, logger="cylora"):
        records = [trainer.step(2.0, adapter, *(bad if step == 5 else make_pair())) for step in range(7)]
    assert [step.step for step in seen] == [2, 5]
    assert seen == [records[2], records[5]]
    assert [record.getMessage() for record in caplog.records] == [
        f"step 2: loss 2, learning rate 0.0003, gradient norm {seen[0].grad_norm:.4g}",
        "step 5: loss 2, learning rate 0.0003, gradient norm nan, skipped",
    ]
    assert {record.name for record in caplog.records} == {"cylora"}


def test_each_record_keeps_its_own_numbers() -> None:
    """Also where they were made for a step that was refused or skipped; a float of a record belongs to no other."""
    trainer, adapter = make_trainer(nonfinite="skip"), make_adapter()
    pairs = [[np.float32(1 + seed) * part for part in make_pair(seed)] for seed in range(5)]
    pairs[3][0][1, 1] = np.nan
    norms = [grad_norm(pair) for pair in pairs]
    records = [trainer.step(1.0 + step, adapter, *pair) for step, pair in enumerate(pairs)]
    assert len(set(norms)) == 5
    assert str([record.grad_norm for record in records]) == str(norms)
    assert [record.loss for record in records] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [record.skipped for record in records] == [False, False, False, True, False]
    assert str([record.grad_norm for record in trainer.training_history]) == str(norms)


def test_accumulated_steps_are_reported_too() -> None:
    seen: list[TrainingStep] = []
    trainer, adapter = LoraTrainer(LoraTrainingConfig(log_every=1), on_step=seen.append), make_adapter()
    trainer.accumulate(1.0, adapter, *make_pair())
    assert trainer.step_accumulated() is seen[0]


def test_log_every_zero_never_reports() -> None:
    trainer, adapter = LoraTrainer(LoraTrainingConfig(log_every=0), on_step=pytest.fail), make_adapter()
    for _ in range(3):
        trainer.step(1.0, adapter, *make_pair())


def test_what_on_step_raises_reaches_the_caller_of_a_step_that_is_done() -> None:
    def stop(record: TrainingStep) -> None:
        raise KeyboardInterrupt

    trainer, adapter = LoraTrainer(LoraTrainingConfig(log_every=2), on_step=stop), make_adapter()
    trainer.step(1.0, adapter, *make_pair())
    with pytest.raises(KeyboardInterrupt):
        trainer.step(1.0, adapter, *make_pair())
    assert trainer.total_steps() == trainer._adam.t == 2
    trainer.step(1.0, adapter, *make_pair())


def test_on_step_may_read_but_not_step() -> None:
    adapter, heard = make_adapter(), []

    def look(record: TrainingStep) -> None:
        assert trainer.last_step() == record
        assert trainer.total_steps() == record.step + 1
        state = trainer.state_dict()
        for forbidden in (
            lambda: trainer.step(1.0, adapter, *make_pair()),
            lambda: trainer.accumulate(1.0, adapter, *make_pair()),
            trainer.step_accumulated,
            lambda: trainer.load_state_dict(state),
        ):
            with pytest.raises(TrainerBusyError, match="this trainer is busy: on_step may read it, but not"):
                forbidden()
            heard.append(record.step)

    trainer = LoraTrainer(LoraTrainingConfig(log_every=1), on_step=look)
    for _ in range(3):
        trainer.step(1.0, adapter, *make_pair())
    assert heard == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]


# ---------------------------------------------------------------- binding


def test_a_trainer_belongs_to_the_adapters_of_its_first_step() -> None:
    trainer, adapter, other = make_trainer(), make_adapter(), make_adapter(1)
    trainer.step(1.0, adapter, *make_pair())
    before = fingerprint(trainer, adapter, other)
    for stranger in (other, copy.deepcopy(adapter), make_set()):
        with pytest.raises(StateError, match=r"adapter must be the one of the first step, LoraAdapter\(6 -> 5.* got"):
            trainer.step(1.0, stranger, *make_pair())
    assert fingerprint(trainer, adapter, other) == before


@pytest.mark.parametrize("adapter", [None, 3, "adapter", np.zeros(3), LoraAdapter, {}])
def test_what_is_no_adapter_is_refused(adapter: object) -> None:
    trainer = make_trainer()
    for call in (trainer.step, trainer.accumulate):
        with pytest.raises(InputError, match="adapter must be a LoraAdapter or an AdapterSet, got"):
            call(1.0, adapter, *make_pair())
    trainer.step(1.0, make_adapter(), *make_pair())
    with pytest.raises(InputError, match="adapter must be a LoraAdapter or an AdapterSet, got"):
        trainer.step(1.0, adapter, *make_pair())


def test_a_refused_first_step_binds_nothing() -> None:
    """A mistake with the wrong adapter must not make the trainer refuse the right one."""
    trainer, wrong, right, twin = make_trainer(), make_set(), make_adapter(), make_adapter()
    bad = fill(Gradients(wrong))
    bad.vector[3] = np.nan
    with pytest.raises(NonFiniteGradientError):
        trainer.step(1.0, wrong, bad)
    with pytest.raises(InputError):
        trainer.accumulate(1.0, wrong, None)
    assert trainer.step(1.0, right, *make_pair()) == make_trainer().step(1.0, twin, *make_pair())
    assert same_bits(right.flat.vector, twin.flat.vector)
    trainer.accumulate(1.0, right, *make_pair())
    trainer.step_accumulated()
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        trainer.step(1.0, wrong, fill(Gradients(wrong)))


def test_a_refused_first_step_stands_in_no_loaded_states_way() -> None:
    trainer, other, adapter = make_trainer(), make_set(), make_adapter()
    with pytest.raises(InputError):
        trainer.step(1.0, other, np.ones(3, np.float32))
    trainer.load_state_dict(make_trainer().state_dict())
    assert trainer.hold(adapter, lambda state: state.adam) is None
    with pytest.raises(InputError):
        trainer.step(1.0, other, np.ones(3, np.float32))
    stepped, twin = make_trainer(), make_adapter()
    stepped.step(1.0, twin, *make_pair())
    trainer.load_state_dict(stepped.state_dict())
    adapter.flat.vector[...] = twin.flat.vector
    stepped.step(1.0, twin, *make_pair(1))
    with pytest.raises(StateError, match="adapter must have the layout of the loaded state"):
        trainer.step(1.0, other, np.ones(other.param_count(), np.float32))
    trainer.step(1.0, adapter, *make_pair(1))
    assert fingerprint(trainer, adapter) == fingerprint(stepped, twin)


def test_a_skipped_or_accumulated_first_step_binds() -> None:
    bad = make_pair()
    bad[0][0, 0] = np.inf
    trainer = make_trainer(nonfinite="skip")
    trainer.step(1.0, make_adapter(), *bad)
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        trainer.step(1.0, make_adapter(), *make_pair())
    trainer = make_trainer()
    trainer.accumulate(1.0, make_adapter(), *make_pair())
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        trainer.step_accumulated(make_adapter())


def test_discarded_micro_batches_have_bound_the_trainer_too() -> None:
    loaded, trainer, adapter = make_trainer(), make_trainer(), make_adapter()
    loaded.accumulate(1.0, make_adapter(), *make_pair())
    trainer.load_state_dict(loaded.state_dict())
    trainer.accumulate(1.0, adapter, *make_pair())
    trainer.discard_accumulated()
    trainer.accumulate(1.0, adapter, *make_pair())  # as many as when the adapter came
    with pytest.raises(StateError, match="adapter must be the one of the first step"):
        trainer.step_accumulated(make_adapter())
    assert trainer.step_accumulated(adapter).step == 0


def test_discarding_what_was_loaded_binds_nothing() -> None:
    loaded, trainer, adapter = make_trainer(), make_trainer(), make_adapter()
    loaded.accumulate(1.0, adapter, *make_pair())
    trainer.load_state_dict(loaded.state_dict())
    with pytest.raises(InputError):
        trainer.accumulate(1.0, make_adapter(), np.ones(3, np.float32))
    trainer.discard_accumulated()
    assert trainer.step(1.0, adapter, *make_pair()).step == 0


def test_gradients_of_another_layout_are_refused() -> None:
    trainer, adapters = make_trainer(), make_set()
    other = AdapterSet({"q": (6, 5), "k": (4, 3), "v": (2, 7)}, LoraConfig(rank=2), seed=0)
    assert other.param_count() == adapters.param_count()
    with pytest.raises(
        InputError, match=r"grad_a must be a Gradients made for AdapterSet.*, got one of another layout"
    ):
        trainer.step(1.0, adapters, Gradients(other))
    trainer.step(1.0, adapters, Gradients(make_set(3)))


# ---------------------------------------------------------------- skipping


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_skip_counts_a_step_that_changes_nothing(value: float) -> None:
    trainer, adapter, twin, other = make_trainer(nonfinite="skip"), make_adapter(), make_adapter(), make_trainer()
    for step in range(200):
        pair = make_pair(step)
        if step % 4:
            pair[step % 2][0, 0] = value
            before = adapter.flat.vector.tobytes(), trainer._adam and trainer._adam.m.tobytes()
            record = trainer.step(1.0, adapter, *pair)
            assert record.skipped
            assert not math.isfinite(record.grad_norm)
            assert (adapter.flat.vector.tobytes(), trainer._adam.m.tobytes()) == before
        else:
            assert not trainer.step(1.0, adapter, *pair).skipped
            other.step(1.0, twin, *pair)
    assert same_bits(adapter.flat.vector, twin.flat.vector)
    assert (trainer.total_steps(), trainer.skipped_steps(), trainer._adam.t) == (200, 150, 50)
    assert trainer.training_history.column("skipped").sum() == 150


def test_skip_covers_a_norm_too_large_for_float32() -> None:
    trainer, adapter = make_trainer(nonfinite="skip", max_grad_norm=math.inf), make_adapter()
    a, b = make_pair()
    a[0, 0] = 1e30
    before = adapter.flat.vector.copy()
    record = trainer.step(1.0, adapter, a, b)
    assert record.skipped
    assert record.grad_norm == pytest.approx(1e30)
    assert same_bits(adapter.flat.vector, before)


# ---------------------------------------------------------------- lifetime


def test_a_dropped_trainer_frees_its_moments_at_once() -> None:
    """A reference cycle would keep two vectors the size of the model until the cycle collector happens to run."""
    gc.collect()
    gc.disable()
    try:
        trainer, adapter = make_trainer(), make_adapter()
        trainer.step(1.0, adapter, *make_pair())
        trainer.accumulate(1.0, adapter, *make_pair())
        watched = [weakref.ref(trainer), weakref.ref(trainer._adam.m), weakref.ref(trainer.training_history)]
        del trainer
        assert [watch() for watch in watched] == [None] * 3
    finally:
        gc.enable()


def test_a_trainer_is_neither_copied_nor_pickled() -> None:
    """A shallow copy would step the same moments under another count."""
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(
            TypeError, match=r"a LoraTrainer is not copied or pickled: load its state_dict\(\) into a new"
        ):
            call(make_trainer())


def test_a_step_keeps_no_hold_of_the_gradients() -> None:
    trainer, adapter = make_trainer(), make_adapter()
    buffers = [bytearray(part.tobytes()) for part in make_pair()]
    views = [memoryview(buffer).cast("f") for buffer in buffers]
    trainer.step(1.0, adapter, *views)
    for view, buffer in zip(views, buffers, strict=True):
        view.release()
        buffer.clear()  # raises BufferError where something still holds it


def test_the_kernel_checks_what_is_attached() -> None:
    trainer, adapter = make_trainer(), make_adapter()
    trainer.step(1.0, adapter, *make_pair())
    adam = trainer._adam
    with pytest.raises(TypeError, match="record_type must be a tuple type"):
        adam.attach(lambda step: 0.0, None, list, trainer.training_history)

    class Wrong:
        def buffers(self) -> tuple:
            return np.zeros((4, 2)), np.zeros(4, np.uint8), np.zeros(3), np.zeros(1, np.int64)

    with pytest.raises(ValueError, match="a history's buffers must be"):
        adam.attach(lambda step: 0.0, None, TrainingStep, Wrong())
