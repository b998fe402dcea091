"""Adam over one vector, grad_norm and clip_grad_norm_ as Python calls: results by the oracle, and every refusal."""

import copy
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
import reference
from training import fill, fingerprint, make_adapter, make_set, same_bits

from cylora import (
    Adam,
    AdapterSet,
    ConfigError,
    FlatBuffer,
    Gradients,
    InputError,
    LoraTrainingConfig,
    NonFiniteGradientError,
    StateError,
    clip_grad_norm_,
    grad_norm,
    optimizer,
)  # fmt: skip
from cylora.kernels import PreparedAdam
from cylora.optimizer import joined

NAN, INF = math.nan, math.inf


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, n]).normal(size=n).astype(np.float32)


@pytest.mark.parametrize("mode", ["decoupled", "l2"])
@pytest.mark.parametrize("max_norm", [INF, 1.0])
def test_adam_follows_the_papers(mode: str, max_norm: float) -> None:
    p = normal(57)
    exact, m, v = p.astype(np.float64), np.zeros(57), np.zeros(57)
    settings = {"weight_decay": 0.1, "weight_decay_mode": mode, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6}
    adam = Adam(p, learning_rate=0.01, max_grad_norm=max_norm, **settings)
    rule = reference.Rule(0.01, 0.8, 0.95, 1e-6, 0.1, mode, max_norm)
    for t in range(1, 30):
        g = normal(57, t)
        step = reference.adam_step(exact, g, m, v, t, rule)
        exact, m, v = step.p, step.m, step.v
        assert adam.step(g) == pytest.approx(step.norm, rel=4e-16)
        assert adam.t == t
        np.testing.assert_allclose(p, exact, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(adam.m, m, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(adam.v, v, rtol=1e-5, atol=1e-9)


def test_adam_defaults_neither_decay_nor_clip() -> None:
    p, twin = normal(9), normal(9)
    Adam(p).step(1000 * normal(9, 1))
    Adam(twin, learning_rate=3e-4, weight_decay=0.0, max_grad_norm=INF, beta1=0.9, beta2=0.999).step(
        1000 * normal(9, 1)
    )
    assert same_bits(p, twin)
    assert abs(abs(p - normal(9)) - 3e-4).max() < 1e-7, "the first step of Adam is the rate in each element"


def test_a_rate_given_to_step_overrides_the_first() -> None:
    p, twin = normal(5), normal(5)
    Adam(p, learning_rate=1.0).step(normal(5, 1), 0.25)
    Adam(twin, learning_rate=0.25).step(normal(5, 1))
    assert same_bits(p, twin)


def test_a_rate_of_zero_moves_the_moments_only() -> None:
    p = normal(5)
    adam = Adam(p, learning_rate=0.0, weight_decay=1.0)
    adam.step(np.ones(5, np.float32))
    assert same_bits(p, normal(5))
    assert adam.m.all()


def test_adam_takes_flat_buffers_arrays_and_gradients() -> None:
    adapter = make_adapter()
    start = adapter.flat.vector.copy()
    gradients = fill(Gradients(adapter))
    Adam(adapter.flat).step(gradients)
    Adam(start).step(gradients.vector)
    assert same_bits(start, adapter.flat.vector)


def test_moments_are_read_only_views_that_follow() -> None:
    adam = Adam(normal(4))
    m = adam.m
    adam.step(np.ones(4, np.float32))
    assert m.tolist() == [np.float32(0.1)] * 4
    for moments in (adam.m, adam.v):
        with pytest.raises(ValueError, match="read-only"):
            moments[0] = 1
    with pytest.raises(AttributeError):
        adam.t = 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ([1.0], "parameters must be a FlatBuffer or a float32 array, got list"),
        (normal(4).astype("f8"), "parameters must be a writable float32 array of shape .*, got float64"),
        (normal(4).reshape(2, 2), r"got float32 of shape \(2, 2\)"),
        (normal(8)[::2], "parameters must be C-contiguous and aligned, got aligned memory"),
        (normal(8)[::-1], "parameters must be C-contiguous and aligned"),
        (
            np.zeros(9, np.uint8)[1:].view(np.float32),
            "parameters must be C-contiguous and aligned, got misaligned memory",
        ),
        (np.broadcast_to(np.float32(1), 4), "got read-only float32"),
        (np.zeros(0, np.float32), "parameters must not be empty, got 0 elements"),
        (FlatBuffer([]), "parameters must not be empty"),
        (make_adapter(), "got LoraAdapter"),
    ],
)
def test_adam_refuses_parameters(parameters: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Adam(parameters)


def test_adam_refuses_settings_like_the_config() -> None:
    for name, bad in [("learning_rate", -1), ("beta1", 1), ("beta2", NAN), ("eps", 0), ("weight_decay", -1),
                      ("weight_decay_mode", "none"), ("max_grad_norm", 0), ("state_dtype", "float16"),
                      (r"threads \(if not None\)", 65)]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"{name} must be"):
            Adam(normal(3), **{name.split()[0]: bad})


@pytest.mark.parametrize("rate", [-1e-9, 1.1e6, NAN, INF, "1", True, [1], 1j])
def test_adam_refuses_a_rate(rate: object) -> None:
    p = normal(3)
    adam = Adam(p)
    with pytest.raises(InputError, match=r"learning rate must be a number in \[0, 1e6\], got"):
        adam.step(normal(3, 1), rate)
    assert same_bits(p, normal(3))
    assert adam.t == 0


def test_adam_refuses_gradients_and_stays_as_it_was() -> None:
    p = normal(4)
    adam = Adam(p, max_grad_norm=INF)
    adam.step(normal(4, 1))
    before = [x.tobytes() for x in (p, adam.m, adam.v)] + [adam.t]
    infinite, nan, huge = (normal(4, 2) for _ in range(3))
    infinite[2], nan[3], huge[0] = -INF, NAN, 1e19
    for bad, kind, message in [
        (
            normal(5),
            InputError,
            r"gradient must be a C-contiguous, aligned array of float32, float16, bfloat16 or \(bfloat16's bits\) "
            r"uint16 of shape \(4,\), got numpy.ndarray with format 'f', shape \(5,\)",
        ),
        (None, InputError, "got NoneType, which offers no buffer"),
        (p, InputError, "gradient must not overlap the parameters or the optimizer's state in memory"),
        (adam.m, InputError, "gradient must not overlap the parameters or the optimizer's state"),
        (adam.v, InputError, "gradient must not overlap the parameters or the optimizer's state"),
        (infinite, NonFiniteGradientError, r"gradient of parameters must be finite, got -inf at \[2\]"),
        (nan, NonFiniteGradientError, r"gradient of parameters must be finite, got nan at \[3\]"),
        (
            huge,
            NonFiniteGradientError,
            r"the gradient's norm must be at most 2\^63 so that its square fits float32, got 9.9999",
        ),
    ]:
        with pytest.raises(kind, match=message):
            adam.step(bad)
        assert [x.tobytes() for x in (p, adam.m, adam.v)] + [adam.t] == before


def test_a_huge_gradient_is_fine_where_it_is_clipped() -> None:
    p = normal(4)
    adam = Adam(p, max_grad_norm=1.0)
    assert adam.step(np.full(4, 3e38, np.float32)) == 2 * float(np.float32(3e38))
    assert np.isfinite(p).all()
    assert np.isfinite(adam.v).all()


def test_adam_is_neither_copied_nor_pickled() -> None:
    """A copy would share the pointers, or lose them."""
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot pickle"):
            call(Adam(normal(3)))


def test_an_adam_that_was_never_initialised_refuses_to_work() -> None:
    for use in (lambda a: a.apply(normal(3), 0.1), lambda a: a.run_step(1.0, normal(3), None)):
        with pytest.raises(ValueError, match="was not initialised"):
            use(Adam.__new__(Adam))
    for adam in (Adam.__new__(Adam), PreparedAdam.__new__(PreparedAdam)):
        assert (adam.t, adam.nonfinite_index, adam.nonfinite_value, adam.busy) == (0, -1, 0.0, False)
    with pytest.raises(ValueError, match="attach comes before run_step"):
        Adam(normal(3)).run_step(1.0, normal(3), None)
    with pytest.raises(ValueError, match="attach comes before run_step, and attach_pending before"):
        Adam(normal(3)).run_step(1.0, normal(3), None, True)
    with pytest.raises(TypeError, match="initialised once"):
        Adam(normal(3)).__init__(normal(3))


# ---------------------------------------------------------------- norm and clipping


def test_norm_is_over_all_arrays_together_however_they_are_cut() -> None:
    whole = normal(20_000)
    expected = reference.norm(whole)
    for cut in (1, 16, 8192, 9999):
        assert grad_norm([whole[:cut], whole[cut:]]) == grad_norm([whole]) == pytest.approx(expected, rel=1e-15)
    assert grad_norm((whole[:9999].reshape(99, 101), whole[9999:])) == grad_norm([whole])
    assert grad_norm([]) == 0.0
    assert grad_norm([np.zeros((0, 3), np.float32)]) == 0.0


def test_norm_and_clip_take_gradients_buffers() -> None:
    gradients = fill(Gradients(make_set()))
    before = gradients.vector.copy()
    norm = grad_norm(gradients)
    assert norm == grad_norm([before])
    assert clip_grad_norm_(gradients, norm / 4) == norm
    assert same_bits(gradients.vector, before * np.float32(0.25))


@pytest.mark.parametrize("max_norm", [5.0, 5, 6.0, INF, np.float32(7)])
def test_clipping_leaves_a_norm_up_to_the_limit_alone(max_norm: float) -> None:
    a, b = np.array([3], np.float32), np.array([4], np.float32)
    assert clip_grad_norm_([a, b], max_norm) == 5.0
    assert (a[0], b[0]) == (3, 4)


def test_clipping_scales_to_the_limit() -> None:
    grads = [normal(100), normal(37).reshape(37, 1)]
    expected = [g * np.float32(0.5 / grad_norm(grads)) for g in grads]
    clip_grad_norm_(grads, 0.5)
    assert all(same_bits(g, e) for g, e in zip(grads, expected, strict=True))
    assert grad_norm(grads) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("max_norm", [0, -1, NAN, None, "1", True, 1j, np.ones(1)])
def test_clipping_refuses_a_limit(max_norm: object) -> None:
    grads = [normal(3)]
    with pytest.raises(InputError, match=r"max_norm must be > 0 \(inf turns clipping off\), got"):
        clip_grad_norm_(grads, max_norm)
    assert same_bits(grads[0], normal(3))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("max_norm", [1.0, INF])
def test_clipping_a_norm_that_is_not_finite_writes_nothing(value: float, max_norm: float) -> None:
    grads = [normal(3), normal(4)]
    grads[1][2] = value
    before = [g.tobytes() for g in grads]
    with pytest.raises(NonFiniteGradientError, match="the norm of grads must be finite, got"):
        clip_grad_norm_(grads, max_norm)
    assert [g.tobytes() for g in grads] == before


@pytest.mark.parametrize("call", [grad_norm, lambda grads: clip_grad_norm_(grads, 1.0)])
@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (normal(3), "grads must be a sequence of arrays or a Gradients, got ndarray"),
        (None, "grads must be a sequence of arrays or a Gradients, got NoneType"),
        (iter([normal(3)]), "grads must be a sequence of arrays or a Gradients, got list_iterator"),
        ({"a": normal(3)}, "grads must be a sequence of arrays or a Gradients, got dict"),
        (AdapterSet({"a": (2, 2)}, seed=0), "grads must be a sequence of arrays or a Gradients, got AdapterSet"),
        ([normal(3), [1.0]], r"grads\[1\] must be a .*aligned .*float32.*, got list, which offers no buffer"),
        ([normal(3).astype("f8")], r"grads\[0\] must be a .*float32.*, got numpy.ndarray with format 'd'"),
        (b"abc", r"grads\[0\] must be .*, got int, which offers no buffer"),
    ],
)
def test_norm_and_clip_refuse_by_name(call, grads: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(grads)


@pytest.mark.parametrize("dtype", [np.float16, np.uint16, ml_dtypes.bfloat16])
def test_clipping_is_for_float32_alone(dtype: type) -> None:
    """It writes: a half would lose what the scale adds. The norm it takes."""
    halves = np.ones(4, np.float32).astype(ml_dtypes.bfloat16 if dtype is np.uint16 else dtype).view(dtype)
    grads = [normal(3), halves]
    with pytest.raises(InputError, match=r"grads\[1\] must be a writable, C-contiguous, aligned float32 array, got"):
        clip_grad_norm_(grads, 1e-3)
    assert same_bits(grads[0], normal(3))
    assert grad_norm([halves]) == 2.0


def test_clipping_refuses_arrays_that_share_elements() -> None:
    memory = normal(10)
    for grads in ([memory, memory], [memory[:6], memory[5:]], [memory[5:], normal(3), memory[:6]]):
        with pytest.raises(InputError, match="grads must not overlap in memory, got two arrays that share elements"):
            clip_grad_norm_(grads, 1e-3)
        assert same_bits(memory, normal(10))
    clip_grad_norm_([memory[5:], memory[:5], memory[3:3]], 1e-3)
    assert grad_norm([memory]) == pytest.approx(1e-3)


# ---------------------------------------------------------------- state


STATE_DTYPES = ("float32", "bfloat16", "8bit")


def adam_state(**changes: object) -> dict:
    adam = Adam(make_adapter().flat)
    adam.step(normal(33))
    return adam.state().to_dict() | changes


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_state_round_trip_is_plain_and_a_copy(state_dtype: str) -> None:
    adam = Adam(make_adapter().flat, state_dtype=state_dtype)
    adam.step(normal(33))
    state = adam.state().to_dict()
    exponents = ["m_exponents", "v_exponents"] if state_dtype == "8bit" else []
    assert list(state) == ["layout", "t", "dtype", "m", "v", *exponents]
    assert state["layout"] == [["A", [3, 6]], ["B", [5, 3]]]
    assert (state["t"], state["dtype"]) == (1, state_dtype)
    restored = optimizer.AdamState.from_dict(state)
    assert fingerprint(restored.to_dict()) == fingerprint(state)
    for name in ("m", "v"):
        state[name][...] = 77
    assert same_bits(restored.moments.m, adam.m)
    assert same_bits(restored.moments.v, adam.v)
    assert adam.m.any()


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_adam_goes_on_from_a_state_to_the_same_bits(state_dtype: str) -> None:
    """From every cut, at sizes with a short last chunk; the rounding noise depends on the step alone."""
    config = LoraTrainingConfig(state_dtype=state_dtype, weight_decay=0.1, max_grad_norm=INF)
    flat = FlatBuffer([("p", (700,))])
    adam = Adam.for_training(flat, config)
    cuts = []
    for t in range(6):
        cuts.append((flat.vector.copy(), adam.state().to_dict()))
        adam.step(normal(700, t), 0.01)
    for t, (parameters, state) in enumerate(cuts[1:], 1):
        again = FlatBuffer([("p", (700,))])
        again.vector[...] = parameters
        resumed = Adam.for_training(again, config, optimizer.AdamState.from_dict(state))
        for later in range(t, 6):
            resumed.step(normal(700, later), 0.01)
        assert same_bits(again.vector, flat.vector)
        assert fingerprint(resumed.state().to_dict()) == fingerprint(adam.state().to_dict())


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("other", STATE_DTYPES)
def test_state_of_another_dtype_than_configured_is_refused(state_dtype: str, other: str) -> None:
    adam = Adam(FlatBuffer([("p", (9,))]), state_dtype=state_dtype)
    adam.step(normal(9))
    config, flat = LoraTrainingConfig(state_dtype=other), FlatBuffer([("p", (9,))])
    if other == state_dtype:
        resumed = Adam.for_training(flat, config, adam.state())
        resumed.step(normal(9, 1))
        assert (resumed.t, adam.t) == (2, 1)
        assert resumed.state().moments is adam.state().moments, "those it was given, not a copy"
        return
    with pytest.raises(StateError, match=f"adam dtype must be '{other}', as configured, got '{state_dtype}'"):
        Adam.for_training(flat, config, adam.state())


@pytest.mark.parametrize("state_dtype", ["bfloat16", "8bit"])
def test_compact_moments_are_decoded_copies_near_those_of_float32(state_dtype: str) -> None:
    """One step from zero: a number is one of the two stored ones around it, at most an eighth of it or of c away."""
    adam, twin = (Adam(normal(600), state_dtype=form) for form in (state_dtype, "float32"))
    gradient = normal(600, 1)
    adam.step(gradient)
    twin.step(gradient)
    for mine, theirs in ((adam.m, twin.m), (adam.v, twin.v)):
        assert mine.dtype == np.float32
        assert not mine.flags.writeable
        spacing = 2.0**-7 if state_dtype == "bfloat16" else 2.0**-3
        floor = 0.0 if state_dtype == "bfloat16" else abs(theirs).max() * 2.0**-15
        assert (abs(mine - theirs) <= spacing * (abs(theirs) + floor)).all()
        assert not same_bits(mine, theirs)
    kept = adam.m
    adam.step(gradient)
    assert not same_bits(kept, adam.m)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"m": np.zeros(32, np.float32)}, r"adam m must be float32 of shape \(33,\), got float32 of shape \(32,\)"),
        ({"v": np.zeros(33)}, "adam v must be float32 of shape .*, got float64"),
        ({"m": np.full(33, NAN, np.float32)}, "adam m must be finite, got nan"),
        ({"v": np.full(33, INF, np.float32)}, "adam v must be finite, got inf"),
        ({"v": np.full(33, -1, np.float32)}, "adam v must be >= 0, got -1"),
        ({"t": 0}, "adam t must be an integer >= 1, got 0"),
        ({"t": 1.0}, "adam t must be an integer, got 1.0"),
        ({"layout": 3}, r"adam layout must be a list of \[name, shape\], got 3"),
        ({"layout": [["A", "x"]]}, r"adam layout must be a list of \[name, shape\], got"),
        ({"layout": [["A"]]}, r"adam layout must be a list of \[name, shape\], got"),
        ({"layout": [["A", [2, 2]]]}, r"adam m must be float32 of shape \(4,\)"),
        ({"layout": [["A", [-3, 11]]]}, r"adam m must be float32 of shape \(-33,\)"),
        ({"layout": [["A", [2**40, 2**40]]]}, r"adam m must be float32 of shape \(1208925819614629174706176,\)"),
        ({"steps": 1}, "adam moments must be a mapping with the keys dtype, m, v, got the keys dtype, m, v, steps"),
        ({"m_exponents": np.zeros(1, np.uint8)}, "adam moments must be a mapping with the keys dtype, m, v, got"),
        ({"dtype": "8bit"}, "adam moments must be a mapping with the keys dtype, m, v, m_exponents, v_exponents, got"),
        ({"dtype": "bfloat16"}, r"adam m must be uint16 of shape \(33,\), got float32"),
        ({"dtype": "float64"}, "adam dtype must be one of 'float32', 'bfloat16', '8bit', got 'float64'"),
        ({"dtype": None}, "adam dtype must be one of 'float32', 'bfloat16', '8bit', got None"),
    ],
)
def test_state_is_checked(change: dict, message: str) -> None:
    with pytest.raises(StateError, match=message):
        optimizer.AdamState.from_dict(adam_state(**change))


@pytest.mark.parametrize("key", ["layout", "t", "dtype", "m", "v"])
def test_state_lacks_nothing(key: str) -> None:
    state = adam_state()
    del state[key]
    with pytest.raises(StateError, match=r"adam (dtype )?(moments )?must be (a mapping with the keys|one of)"):
        optimizer.AdamState.from_dict(state)


def test_state_must_be_a_mapping() -> None:
    with pytest.raises(StateError, match=r"adam must be a mapping with .* layout, t and those of the moments, got int"):
        optimizer.AdamState.from_dict(3)
    with pytest.raises(StateError, match=r"and those of the moments, got the keys t, m$"):
        optimizer.AdamState.from_dict({"t": 1, "m": 2})


def test_refusal_without_a_culprit_speaks_of_the_norm() -> None:
    """What a caller sees whose weighted gradient overflows though no element is infinite."""
    assert str(Adam(normal(3)).refusal(INF)) == "the gradient's norm must be finite, got inf"


def test_isa_is_one_of_the_variants(isa: str) -> None:
    assert isa in optimizer.variants
    assert "baseline" in optimizer.variants


def test_the_error_of_a_gradient_that_is_not_finite_says_so_whenever_it_is_read() -> None:
    """Its message is made late: it must not change with later steps, and survive copies."""
    adam = Adam(np.zeros(5, np.float32))
    gradient = np.array([1, 2, np.nan, 4, 5], np.float32)
    with pytest.raises(NonFiniteGradientError) as raised:
        adam.step(gradient)
    with pytest.raises(NonFiniteGradientError, match=r"got -inf at \[4\]"):
        adam.step(np.array([1, 2, 3, 4, -np.inf], np.float32))
    message = "gradient of parameters must be finite, got nan at [2]"
    assert str(raised.value) == str(pickle.loads(pickle.dumps(raised.value))) == message
    assert str(NonFiniteGradientError("plain")) == "plain"
    assert str(NonFiniteGradientError()) == ""


# ---------------------------------------------------------------- copies


def test_joined_arrays_are_copied_to_the_bit_one_after_the_other() -> None:
    sizes = [0, 1, 15, 16, 17, 1009, 40_000]
    rng = np.random.default_rng(3)
    arrays = [rng.integers(0, 2**32, size, np.uint64).astype(np.uint32).view(np.float32) for size in sizes]
    before = [array.copy() for array in arrays]
    for some in (arrays, arrays[:-1], arrays[:1], []):  # with and without the GIL
        copied, counted = joined(some)
        assert counted == [array.size for array in some]
        assert copied.dtype == np.float32
        assert copied.tobytes() == b"".join(array.tobytes() for array in some)
        assert not any(np.shares_memory(copied, array) for array in some)
    assert [array.tobytes() for array in arrays] == [array.tobytes() for array in before]


def test_joined_takes_any_shape_and_kind_together() -> None:
    halves = np.arange(6, dtype=np.float16)
    copied, counted = joined([np.ones((2, 3), np.float32), halves, memoryview(np.full(2, 7, np.float32))])
    assert counted == [6, 6, 2]
    assert copied.tolist() == [1.0] * 6 + [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] + [7.0] * 2


def test_joined_refuses_what_a_step_would() -> None:
    wrongs = (np.ones(3), "format 'd'"), (np.ones((4, 4), np.float32)[:, ::2], "strides"), ("x", "no buffer")
    for wrong, got in wrongs:
        with pytest.raises(InputError, match=rf"grads\[1\] must be a C-contiguous, aligned array .*, got .*{got}"):
            joined([np.ones(2, np.float32), wrong])
