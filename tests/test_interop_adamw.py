"""CyloraAdamW against torch.optim.AdamW and the oracle in float64: numbers, state, and what it refuses."""

import copy
import hashlib
import importlib
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
from test_integrations import test_an_old_torch_is_refused, test_torch_missing_says_what_to_install, without_ours

from cylora.errors import ConfigError, InputError, NonFiniteGradientError, StateError, TrainerBusyError

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("ignore:.*sparse.*:UserWarning")]

# Collected here too: with these markers they count for the coverage of the integrations.
__all__ = ["test_an_old_torch_is_refused", "test_torch_missing_says_what_to_install", "without_ours"]

SHAPES = ((4, 6), (6,), (300, 31), (1,), (), (0, 3), (2, 3, 4))
ULPS = 4  # of max(|old|, |new|), and of an update of a rate's size: what five steps in float32 may be off


@pytest.fixture(scope="module")
def torch() -> Iterator[Any]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def adamw() -> Any:
    from cylora.integrations.torch import CyloraAdamW

    return CyloraAdamW


@pytest.fixture
def make(torch: Any) -> Callable[..., list[Any]]:
    """Return a function that makes the same parameters at each call."""

    def make(shapes: Any = SHAPES, seed: int = 0) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    return make


def lend(torch: Any, params: list[Any], seed: int, scale: float = 1.0) -> None:
    """Give all parameters new gradients."""
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * scale


def train(torch: Any, optimizer: Any, params: list[Any], steps: range) -> None:
    for step in steps:
        lend(torch, params, step)
        optimizer.step()


def digest(optimizer: Any) -> str:
    """Return a hash of all that a step may change: parameters, gradients, state and options."""
    sha = hashlib.sha256()
    for group in optimizer.param_groups:
        sha.update(repr({key: value for key, value in group.items() if key != "params"}).encode())
        for param in group["params"]:
            sha.update(param.detach().numpy().tobytes() if param.layout.__str__() == "torch.strided" else b"")
            entry = optimizer.state.get(param, {})
            sha.update(repr(sorted(entry)).encode() + b"".join(entry[key].numpy().tobytes() for key in sorted(entry)))
    sha.update(repr(len(optimizer.state)).encode())
    return sha.hexdigest()


def bits(params: list[Any]) -> list[bytes]:
    return [param.detach().numpy().tobytes() for param in params]


def assert_close(params: list[Any], others: list[Any], rtol: float = 2e-6, atol: float = 1e-7) -> None:
    for param, other in zip(params, others, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), other.detach().numpy(), rtol=rtol, atol=atol)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("max_norm", [math.inf, 0.5, 1e4])
def test_steps_agree_with_the_oracle(torch: Any, adamw: Any, make: Any, max_norm: float) -> None:
    """Two groups with rules of their own, one norm over both."""
    params = make()
    rules = [
        reference.Rule(rate=1e-2, weight_decay=0.1, max_norm=max_norm),
        reference.Rule(rate=3e-3, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.0, max_norm=max_norm),
    ]
    groups = [
        {"params": params[start::2], "lr": rule.rate, "betas": (rule.beta1, rule.beta2), "eps": rule.eps,
         "weight_decay": rule.weight_decay}
        for start, rule in enumerate(rules)
    ]  # fmt: skip
    optimizer = adamw(groups, max_grad_norm=max_norm)
    m, v = ([np.zeros(param.shape) for param in params] for _ in range(2))
    for t in range(1, 6):
        lend(torch, params, t)
        old = [param.detach().numpy().astype(np.float64) for param in params]
        grads = [param.grad.numpy().astype(np.float64) for param in params]
        optimizer.step()
        norm = reference.norm(*grads)
        assert optimizer.grad_norm == pytest.approx(norm, rel=1e-15)
        for i, param in enumerate(params):
            rule = rules[i % 2]
            g = reference.effective_gradient(old[i], grads[i], rule, reference.clip_scale(norm, max_norm))
            m[i], v[i] = reference.moments(m[i], v[i], g, rule)
            wanted = old[i] * (1 - reference.decay(rule)) - reference.update(m[i], v[i], t, rule)
            got = param.detach().numpy().astype(np.float64)
            limit = ULPS * (reference.ulp(np.maximum(np.abs(old[i]), np.abs(wanted))) + reference.ulp(rule.rate))
            assert (np.abs(got - wanted) <= limit).all()
            entry = optimizer.state[param]
            assert entry["step"].item() == t
            np.testing.assert_allclose(entry["exp_avg"].numpy(), m[i], rtol=2e-6, atol=1e-7)
            np.testing.assert_allclose(entry["exp_avg_sq"].numpy(), v[i], rtol=2e-6, atol=1e-12)


def test_ours_is_at_least_as_close_to_float64_as_torch(torch: Any, adamw: Any, make: Any) -> None:
    """200 steps of the same gradients; the median over all elements."""
    kinds = {"ours": adamw, "torch": torch.optim.AdamW, "float64": torch.optim.AdamW}
    finals = {}
    for name, kind in kinds.items():
        params = make(((64, 64), (64,)))
        if name == "float64":
            params = [torch.nn.Parameter(param.detach().double()) for param in params]
        optimizer = kind(params, lr=1e-2, weight_decay=0.1, fused=True)
        for step in range(200):
            for param, gradient in zip(params, _gradients(torch, params, step), strict=True):
                param.grad = gradient.to(param.dtype)
            optimizer.step()
        finals[name] = np.concatenate([param.detach().double().numpy().ravel() for param in params])
    error = {name: np.median(np.abs(finals[name] - finals["float64"])) for name in ("ours", "torch")}
    assert error["ours"] <= error["torch"]
    assert error["ours"] < 1e-6


def _gradients(torch: Any, params: list[Any], seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator) for param in params]


def test_maximize_climbs_as_torch_does(torch: Any, adamw: Any, make: Any) -> None:
    """In one group of two; and what is clipped is climbed too."""
    ours, theirs = make(), make()
    for params, kind, options in ((ours, adamw, {"max_grad_norm": 1.0}), (theirs, torch.optim.AdamW, {})):
        optimizer = kind([{"params": params[:3], "maximize": True}, {"params": params[3:]}], lr=1e-2, **options)
        for step in range(4):
            lend(torch, params, step)
            if kind is not adamw:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        first = optimizer.state[params[0]]["exp_avg"]
        assert (first * params[0].grad < 0).double().mean() > 0.5
    assert_close(ours, theirs)


def test_parameters_stay_where_they_are_and_gradients_are_not_written(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params, lr=0.1, max_grad_norm=0.1)
    lend(torch, params, 0)
    places, gradients = [param.data_ptr() for param in params], [param.grad for param in params]
    before, old = [gradient.numpy().tobytes() for gradient in gradients], bits(params)
    optimizer.step()
    assert [param.data_ptr() for param in params] == places
    assert all(param.grad is gradient for param, gradient in zip(params, gradients, strict=True))
    assert [gradient.numpy().tobytes() for gradient in gradients] == before
    assert all(a != b for a, b in zip(bits(params), old, strict=True) if a)


def test_clipping_is_over_all_groups_and_equality_does_not_clip(torch: Any, adamw: Any) -> None:
    a, b = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    a.grad, b.grad = torch.tensor([3.0]), torch.tensor([4.0])
    optimizer = adamw([{"params": [a]}, {"params": [b]}], max_grad_norm=5.0)
    optimizer.step()
    assert optimizer.grad_norm == 5.0
    assert optimizer.state[a]["exp_avg"].item() == np.float32(np.float32(1 - 0.9) * np.float32(3.0))
    optimizer.max_grad_norm = 2.5
    before = optimizer.state[b]["exp_avg"].item()
    optimizer.step()
    assert optimizer.state[b]["exp_avg"].item() == pytest.approx(before + 0.1 * (2.0 - before), rel=1e-6)


def test_threads_do_not_change_a_bit(torch: Any, adamw: Any, make: Any) -> None:
    results = []
    for threads in (1, 2, 4):
        params = make(((512, 300), (7,), (300, 512), (4096,)))
        optimizer = adamw(params, lr=1e-2, max_grad_norm=1.0, threads=threads)
        train(torch, optimizer, params, range(3))
        results.append((bits(params), optimizer.grad_norm))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gradients_count_as_what_they_are(torch: Any, adamw: Any, make: Any, dtype: str) -> None:
    half, full = make(), make()
    for params in (half, full):
        optimizer = adamw(params, lr=1e-2, max_grad_norm=1.0)
        for step in range(2):
            for param, gradient in zip(params, _gradients(torch, params, step), strict=True):
                rounded = gradient.to(getattr(torch, dtype))
                if params is half:
                    param.grad_dtype = getattr(torch, dtype)
                param.grad = rounded if params is half else rounded.float()
            optimizer.step()
    assert bits(half) == bits(full)


def test_gradients_without_a_simple_place_in_memory_are_copied(torch: Any, adamw: Any, make: Any) -> None:
    """Transposed, expanded, with gaps, requiring a gradient, of a subclass, and those that torch holds negated."""

    class Tagged(torch.Tensor):
        pass

    shape = (3, 4)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    complexes = torch.complex(torch.zeros(shape), -numbers).conj()
    odd = [
        numbers.t().contiguous().t(),
        numbers[:1].expand(shape),
        torch.stack([numbers, numbers], -1)[..., 0],
        numbers.clone().requires_grad_(),
        numbers.as_subclass(Tagged),
        complexes.imag,
        complexes.imag[:1, :1],
        numbers[0, 0].clone(),
    ]
    assert complexes.imag.is_neg()
    params = [torch.nn.Parameter(torch.ones(gradient.shape)) for gradient in odd]
    plain = [torch.nn.Parameter(torch.ones(gradient.shape)) for gradient in odd]
    for param, other, gradient in zip(params, plain, odd, strict=True):
        param.grad, other.grad = gradient, gradient.detach().resolve_neg().contiguous().clone()
    for some in (params, plain):
        adamw(some, max_grad_norm=1.0).step()
    assert bits(params) == bits(plain)


# ------------------------------------------------------------------ the optimizer's habits


def test_parameters_without_a_gradient_are_left_out(torch: Any, adamw: Any, make: Any) -> None:
    params, others = make(), make()
    ours, theirs = adamw(params, lr=1e-2), torch.optim.AdamW(others, lr=1e-2)
    for step in range(6):
        for some, optimizer in ((params, ours), (others, theirs)):
            lend(torch, some, step)
            for place in range(len(some)):
                if (step + place) % 3 == 0:
                    some[place].grad = None
            if step == 0:
                some[2].grad = some[3].grad = None
            optimizer.step()
        assert [len(ours.state.get(p, {})) for p in params] == [len(theirs.state.get(q, {})) for q in others]
    for param, other in zip(params, others, strict=True):
        assert ours.state[param]["step"] == theirs.state[other]["step"]
    assert_close(params, others)


def test_a_step_without_any_gradient_does_nothing(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    before = digest(optimizer)
    assert optimizer.step() is None
    assert digest(optimizer) == before
    assert optimizer.grad_norm == 0.0


def test_closure_comes_first_with_gradients_enabled(torch: Any, adamw: Any, make: Any) -> None:
    (param,) = make(((3,),))
    optimizer = adamw([param], lr=0.1)

    def closure() -> Any:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    with torch.no_grad():
        first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "enable_grad"])
def test_a_step_is_possible_in_any_mode(torch: Any, adamw: Any, make: Any, mode: str) -> None:
    params, others = make(), make()
    for some, context in ((params, getattr(torch, mode)), (others, torch.no_grad)):
        optimizer = adamw(some, lr=0.1)
        lend(torch, some, 1)
        with context():
            optimizer.step()
            optimizer.step()
    assert bits(params) == bits(others)


def test_hooks_are_called(torch: Any, adamw: Any, make: Any) -> None:
    params, seen = make(), []
    optimizer = adamw(params)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(torch, optimizer, params, range(1))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("which", ["pre", "post"])
@pytest.mark.parametrize("whose", ["own", "everybody's"])
def test_each_hook_alone_is_called_while_it_is_there(torch: Any, adamw: Any, make: Any, whose: str, which: str) -> None:
    params, twins, seen = make(), make(), []
    optimizer, plain = adamw(params), adamw(twins)
    everybodys = importlib.import_module("torch.optim.optimizer")
    owner, name = (optimizer, "step") if whose == "own" else (everybodys, "optimizer_step")
    handle = getattr(owner, f"register_{name}_{which}_hook")(lambda who, *_: seen.append(who))
    train(torch, optimizer, params, range(2))
    handle.remove()
    train(torch, optimizer, params, range(2, 4))
    assert seen == [optimizer, optimizer]
    train(torch, plain, twins, range(4))
    assert bits(params) == bits(twins)


def test_a_profiler_sees_the_step(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(torch, optimizer, params, range(1, 3))
    train(torch, optimizer, params, range(3, 4))
    (found,) = (event for event in profile.key_averages() if event.key.startswith("Optimizer.step#"))
    assert (found.key, found.count) == ("Optimizer.step#CyloraAdamW.step", 2)


def test_parameters_of_a_group_may_be_a_tuple(torch: Any, adamw: Any, make: Any) -> None:
    params, others = make(), make()
    optimizer, plain = adamw(params), adamw(others)
    train(torch, optimizer, params, range(1))
    optimizer.param_groups[0]["params"] = tuple(optimizer.param_groups[0]["params"])
    train(torch, optimizer, params, range(1, 3))
    train(torch, plain, others, range(3))
    assert bits(params) == bits(others)


def test_autograd_notices_that_parameters_changed(torch: Any, adamw: Any, make: Any) -> None:
    """As after a step of torch's: what a graph saved is no longer what it computed with."""
    param, other = make(((3,), (3,)))
    optimizer = adamw([param, other])
    loss = (param * param).sum()
    loss.backward(retain_graph=True)
    versions = param._version, other._version
    optimizer.step()
    assert (param._version, other._version) == (versions[0] + 1, versions[1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    param.grad, other.grad = None, torch.ones(3)
    optimizer.step()
    assert (param._version, other._version) == (versions[0] + 1, versions[1] + 1)


def test_schedulers_set_rates_and_betas(torch: Any, adamw: Any, make: Any) -> None:
    params, others = make(), make()
    for some, kind in ((params, adamw), (others, torch.optim.AdamW)):
        optimizer = kind([{"params": some[:2]}, {"params": some[2:], "lr": 1e-3}], lr=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [1e-2, 2e-2], total_steps=12)
        for step in range(10):
            lend(torch, some, step)
            optimizer.step()
            schedule.step()
    assert_close(params, others, rtol=1e-5, atol=1e-6)


def test_rate_may_be_a_tensor_that_changes_in_place(torch: Any, adamw: Any, make: Any) -> None:
    params, others = make(), make()
    rate = torch.tensor(1e-2)
    ours, theirs = adamw(params, lr=rate), adamw(others, lr=float(rate))
    train(torch, ours, params, range(2))
    train(torch, theirs, others, range(2))
    rate.mul_(0.5)
    theirs.param_groups[0]["lr"] = float(rate)
    train(torch, ours, params, range(2, 4))
    train(torch, theirs, others, range(2, 4))
    assert bits(params) == bits(others)


@pytest.mark.parametrize("as_tensors", [False, True])
def test_constants_may_change_in_place(torch: Any, adamw: Any, make: Any, as_tensors: bool) -> None:
    """A list of betas does, and so do tensors, which stay the same objects."""
    box = torch.tensor if as_tensors else lambda number: number
    params, others = make(), make()
    ours, theirs = adamw(params, lr=1e-2), adamw(others, lr=1e-2)
    group = ours.param_groups[0]
    group |= {"betas": [box(0.5), box(0.75)], "eps": box(0.25), "weight_decay": box(0.125)}
    theirs.param_groups[0] |= {"betas": (0.5, 0.75), "eps": 0.25, "weight_decay": 0.125}
    train(torch, ours, params, range(2))
    train(torch, theirs, others, range(2))
    if as_tensors:
        for value in (*group["betas"], group["eps"], group["weight_decay"]):
            value.mul_(1.25)
        theirs.param_groups[0] |= {"eps": 0.3125, "weight_decay": 0.15625}
    else:
        group["betas"][:] = 0.625, 0.9375
    theirs.param_groups[0]["betas"] = (0.625, 0.9375)
    train(torch, ours, params, range(2, 4))
    train(torch, theirs, others, range(2, 4))
    assert bits(params) == bits(others)


def test_a_new_group_leaves_the_old_ones_state(torch: Any, adamw: Any, make: Any) -> None:
    params, others = make(), make()
    for some, kind in ((params, adamw), (others, torch.optim.AdamW)):
        optimizer = kind(some[:3], lr=1e-2)
        train(torch, optimizer, some[:3], range(3))
        optimizer.add_param_group({"params": iter(some[3:6]), "lr": 1e-3})
        optimizer.add_param_group({"params": some[6]})
        optimizer.add_param_group({"params": []})
        train(torch, optimizer, some, range(3, 6))
    assert_close(params, others)
    assert repr(optimizer).count("Parameter Group") == 4


def test_grad_scaler_works_with_it(torch: Any, adamw: Any, make: Any) -> None:
    """It unscales the gradients itself, and leaves out a step that has an infinite one."""
    params, others = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    ours = adamw(params, lr=1e-2, fused=True)
    for scale in (4.0, math.inf):
        lend(torch, params, 0, scale)
        scaler.scale(torch.zeros(()))
        scaler.step(ours)
        scaler.update()
    plain = adamw(others, lr=1e-2)
    lend(torch, others, 0)
    plain.step()
    assert bits(params) == bits(others)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(torch: Any, adamw: Any, make: Any, how: str) -> None:
    params = make()
    optimizer = adamw(params, lr=1e-2, max_grad_norm=1.0, nonfinite="skip", threads=2)
    train(torch, optimizer, params, range(3))
    twin = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    theirs = twin.param_groups[0]["params"]
    assert (twin.max_grad_norm, twin.nonfinite, twin.threads) == (1.0, "skip", 2)
    assert twin.grad_norm == optimizer.grad_norm
    before = digest(optimizer)
    train(torch, twin, theirs, range(3, 6))
    assert digest(optimizer) == before
    train(torch, optimizer, params, range(3, 6))
    assert bits(theirs) == bits(params)


def test_state_is_flat(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    for key in ("step", "exp_avg", "exp_avg_sq"):
        assert len({optimizer.state[p][key].untyped_storage().data_ptr() for p in params if p.numel()}) == 1
    assert all(optimizer.state[p]["exp_avg"].data_ptr() % 64 == 0 for p in params if p.numel())


# ------------------------------------------------------------------ state dicts


def test_state_dict_has_the_layout_of_torch(torch: Any, adamw: Any, make: Any) -> None:
    found = []
    for kind in (adamw, torch.optim.AdamW):
        params = make()
        optimizer = kind([{"params": params[:2]}, {"params": params[2:]}])
        assert optimizer.state_dict()["state"] == {}
        lend(torch, params, 0)
        params[1].grad = None
        optimizer.step()
        state = optimizer.state_dict()
        described = {
            index: {key: (value.dtype, tuple(value.shape), value.device.type) for key, value in entry.items()}
            for index, entry in state["state"].items()
        }
        found.append((described, state["param_groups"]))
    assert found[0] == found[1]
    assert [list(entry) for entry in found[0][0].values()] == [list(entry) for entry in found[1][0].values()]


@pytest.mark.parametrize("form", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("to_ours", [True, False])
def test_training_goes_on_after_a_move_between_torch_and_us(
    torch: Any, adamw: Any, make: Any, form: dict[str, bool], to_ours: bool
) -> None:
    """Through a file, as people do it; the oracle is torch alone."""
    kinds = (torch.optim.AdamW, adamw) if to_ours else (adamw, torch.optim.AdamW)
    params, others = make(), make()
    first, alone = (kind(some, lr=1e-2, **form) for kind, some in ((kinds[0], params), (torch.optim.AdamW, others)))
    train(torch, first, params, range(5))
    train(torch, alone, others, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = kinds[1](params, lr=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.param_groups[0]["lr"] == 1e-2
    train(torch, second, params, range(5, 10))
    train(torch, alone, others, range(5, 10))
    assert_close(params, others)
    assert second.state[params[0]]["step"] == 10


def test_own_state_dict_continues_to_the_same_bits(torch: Any, adamw: Any, make: Any) -> None:
    params, others = make(), make()
    optimizer = adamw(params, lr=1e-2)
    train(torch, optimizer, params, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), [param.detach().clone() for param in params]
    train(torch, optimizer, params, range(3, 6))
    resumed = adamw(others)
    for other, weight in zip(others, weights, strict=True):
        other.data.copy_(weight)
    resumed.load_state_dict(saved)
    train(torch, resumed, others, range(3, 6))
    assert bits(params) == bits(others)
    assert digest(resumed) == digest(optimizer)


def test_loading_copies(torch: Any, adamw: Any, make: Any) -> None:
    """What is loaded stays what it was, whatever happens to where it came from, and the other way round."""
    params, others = make(), make()
    theirs, ours = torch.optim.AdamW(others), adamw(params)
    train(torch, theirs, others, range(2))
    ours.load_state_dict(theirs.state_dict())
    before = [theirs.state[other]["exp_avg"].clone() for other in others]
    train(torch, ours, params, range(2))
    assert all(torch.equal(theirs.state[other]["exp_avg"], kept) for other, kept in zip(others, before, strict=True))


def test_old_forms_of_state_are_understood(torch: Any, adamw: Any, make: Any) -> None:
    """Steps were plain numbers once, and moments may have been kept in half precision."""
    params = make(((4,), (3,)))
    optimizer = adamw(params)
    train(torch, optimizer, params, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["step"] = 2
    state["state"][1]["exp_avg"] = state["state"][1]["exp_avg"].bfloat16()
    for group in state["param_groups"]:
        for key in (
            "amsgrad",
            "maximize",
            "foreach",
            "capturable",
            "differentiable",
            "fused",
            "decoupled_weight_decay",
        ):
            del group[key]
    optimizer.load_state_dict(state)
    train(torch, optimizer, params, range(2, 3))
    assert [optimizer.state[param]["step"].item() for param in params] == [3.0, 3.0]
    assert optimizer.state_dict()["param_groups"][0]["decoupled_weight_decay"] is True


def _drop_group(state: Any) -> None:
    state["param_groups"].pop()


def _drop_parameter(state: Any) -> None:
    state["param_groups"][0]["params"].pop()


def _entry(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    return lambda state: change(state["state"][0])


def _option(**options: Any) -> Callable[[Any], None]:
    return lambda state: state["param_groups"][1].update(options)


FOREIGN = {
    "groups": (_drop_group, ValueError, "different number of parameter groups"),
    "parameters": (_drop_parameter, ValueError, "doesn't match the size of optimizer's group"),
    "shape": (
        _entry(lambda e: e.update(exp_avg=e["exp_avg"].t())),
        StateError, r"exp_avg of parameter 0 .* must be real numbers of shape \(4, 6\) on the CPU, got .*\(6, 4\)",
    ),
    "no number": (
        _entry(lambda e: e.update(exp_avg_sq="big")),
        StateError, "exp_avg_sq of parameter 0 of group 0 must be a dense tensor, got str",
    ),
    "missing": (
        _entry(lambda e: e.pop("exp_avg")),
        StateError, "state of parameter 0 .* must be a mapping with the keys step, exp_avg, exp_avg_sq, got the keys",
    ),
    "another's": (
        lambda state: state["state"].update({"model.weight": {}}),
        StateError, "state must be of the optimizer's parameters alone, got that of another, 'model.weight'",
    ),
    "amsgrad": (
        _entry(lambda e: e.update(max_exp_avg_sq=e["exp_avg_sq"])),
        StateError, "state of parameter 0 of group 0 must be without max_exp_avg_sq, since amsgrad is not supported",
    ),
    "nan": (
        _entry(lambda e: e["exp_avg"].fill_(math.nan)),
        StateError, "exp_avg of parameter 0 of group 0 must be finite, got values from nan to nan",
    ),
    "negative": (
        _entry(lambda e: e["exp_avg_sq"].fill_(-1.0)),
        StateError, "exp_avg_sq of parameter 0 of group 0 must be finite and >= 0, got values from -1 to -1",
    ),
    "half a step": (
        _entry(lambda e: e["step"].fill_(0.5)),
        StateError, r"step of parameter 0 of group 0 must be an integer in \[0, 2\^24\], got tensor\(0.5000\)",
    ),
    "option": (_option(amsgrad=True), ConfigError, "amsgrad of group 1 must be False, since CyloraAdamW does not"),
    "rate": (_option(lr=-1.0), ConfigError, "options of group 1: learning rate must be a number in"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_state_dict_of_another_model_is_refused(torch: Any, adamw: Any, make: Any, case: str) -> None:
    change, error, message = FOREIGN[case]
    params, others = make(), make(seed=3)
    ours = adamw([{"params": params[:3]}, {"params": params[3:]}], lr=1e-2)
    other = torch.optim.AdamW([{"params": others[:3]}, {"params": others[3:]}])
    train(torch, ours, params, range(2))
    train(torch, other, others, range(3))
    state = copy.deepcopy(other.state_dict())
    change(state)
    before, known = digest(ours), bits(params)
    with pytest.raises(error, match=message):
        ours.load_state_dict(state)
    assert (digest(ours), bits(params)) == (before, known)
    twin = copy.deepcopy(ours)
    train(torch, ours, params, range(2, 4))
    train(torch, twin, [p for group in twin.param_groups for p in group["params"]], range(2, 4))
    assert digest(ours) == digest(twin)


# ------------------------------------------------------------------ whoever changes things behind its back


def _replace(torch: Any, optimizer: Any, param: Any) -> None:
    entry = optimizer.state[param]
    entry["exp_avg"] = entry["exp_avg"] * 0.0


def _replace_at_the_same_address(torch: Any, optimizer: Any, param: Any) -> None:
    entry = optimizer.state[param]
    for key in ("step", "exp_avg_sq"):
        old = entry[key]
        value = old.detach().numpy().copy()
        entry[key] = None
        del old
        entry[key] = torch.from_numpy(np.multiply(value, key == "step", out=value))


def _new_entry(torch: Any, optimizer: Any, param: Any) -> None:
    optimizer.state[param] = {key: value.clone() * (key == "step") for key, value in optimizer.state[param].items()}


def _forget(torch: Any, optimizer: Any, param: Any) -> None:
    del optimizer.state[param]


def _forget_all(torch: Any, optimizer: Any, param: Any) -> None:
    optimizer.state.clear()


def _zero(torch: Any, optimizer: Any, param: Any) -> None:
    for value in optimizer.state[param].values():
        value.zero_()


def _move(torch: Any, optimizer: Any, param: Any) -> None:
    for key, value in optimizer.state[param].items():
        value.data = value.data * (key == "step")


def _move_count(torch: Any, optimizer: Any, param: Any) -> None:
    value = optimizer.state[param]["step"]
    value.data = torch.ones_like(value)


def _move_squares(torch: Any, optimizer: Any, param: Any) -> None:
    value = optimizer.state[param]["exp_avg_sq"]
    value.data = torch.ones_like(value)


def _rehome(torch: Any, optimizer: Any, param: Any) -> None:
    param.data = param.data.clone() * 0.5


def _reshape(torch: Any, optimizer: Any, param: Any) -> None:
    param.grad = None
    with torch.no_grad():
        param.mul_(0.5)


CHANGES = [
    _replace,
    _replace_at_the_same_address,
    _new_entry,
    _forget,
    _forget_all,
    _zero,
    _move,
    _move_count,
    _move_squares,
    _rehome,
    _reshape,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_others_do_to_state_and_parameters_counts(torch: Any, adamw: Any, make: Any, change: Any) -> None:
    """As it does with torch's own, which looks everything up at each step."""
    params, others = make(), make()
    for some, kind in ((params, adamw), (others, torch.optim.AdamW)):
        optimizer = kind(some, lr=1e-2)
        train(torch, optimizer, some, range(3))
        change(torch, optimizer, some[2])
        train(torch, optimizer, some, range(3, 6))
        assert len(optimizer.state) == len(some)
    assert_close(params, others, rtol=1e-5, atol=1e-6)


def test_looking_at_state_that_is_not_there_does_no_harm(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    assert optimizer.state[params[0]] == {}
    train(torch, optimizer, params, range(2))
    assert optimizer.state[params[0]]["step"] == 2


def test_another_list_of_parameters_counts(torch: Any, adamw: Any, make: Any) -> None:
    params = make(((2,), (3,), (4,)))
    optimizer = adamw(params[:2], lr=1e-2)
    train(torch, optimizer, params, range(2))
    optimizer.param_groups[0]["params"] = params[:3]
    train(torch, optimizer, params, range(2, 3))
    assert [optimizer.state[param]["step"].item() for param in params] == [3.0, 3.0, 1.0]
    optimizer.param_groups[0]["params"] = [params[0]]
    before = digest(optimizer)
    with pytest.raises(
        StateError, match=r"state must be of the optimizer's parameters alone, got that of another, shape \(3,\)"
    ):
        optimizer.step()
    assert digest(optimizer) == before


def test_a_count_that_is_none_is_refused(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    train(torch, optimizer, params, range(2))
    for wrong in (math.nan, -1.0, 0.5, 2.0**25):
        optimizer.state[params[1]]["step"].fill_(wrong)
        before = digest(optimizer)
        with pytest.raises(StateError, match=r"step of parameter 1 of group 0 must be an integer in \[0, 2\^24\], got"):
            optimizer.step()
        assert digest(optimizer) == before


def test_parameters_tied_later_are_refused(torch: Any, adamw: Any, make: Any) -> None:
    params = make(((4,), (4,)))
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    params[1].data = params[0].data
    before = digest(optimizer)
    with pytest.raises(InputError, match="parameter 1 of group 0 must not share memory with parameter 0 of group 0"):
        optimizer.step()
    assert digest(optimizer) == before


def test_a_second_step_meanwhile_is_refused(torch: Any, adamw: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from cylora.integrations.tensors import Tensors

    params = make(((1,), (3,)))
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    packed, met = Tensors.packed, []

    def nosy(self: Any, index: int, gradient: Any) -> Any:
        with pytest.raises(TrainerBusyError, match="this optimizer is busy: a step is under way") as info:
            optimizer.step()
        met.append(info.value)
        return packed(self, index, gradient)

    monkeypatch.setattr(Tensors, "packed", nosy)
    optimizer.step()
    assert len(met) == 1
    assert optimizer.state[params[1]]["step"] == 2


def test_memory_that_will_not_stay_is_an_error(
    torch: Any, adamw: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cylora.integrations.tensors import Tensors

    params = make()
    optimizer = adamw(params)
    lend(torch, params, 0)
    monkeypatch.setattr(Tensors, "apply", lambda *_: None)
    with pytest.raises(StateError, match="parameters and state must stay where they are during a step"):
        optimizer.step()


def test_interrupted_linking_leaves_no_state(
    torch: Any, adamw: Any, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State is added before the step, since that runs Python code; an interrupt there undoes it."""
    params = make()
    optimizer = adamw(params)
    lend(torch, params, 0)
    calls = []

    class Interrupted(dict):
        def __setitem__(self, key: Any, value: Any) -> None:
            calls.append(key)
            if len(calls) == 4:
                raise KeyboardInterrupt
            super().__setitem__(key, value)

    before = bits(params)
    optimizer.step = optimizer.step  # the class's, with its hooks
    monkeypatch.setattr("cylora.integrations.adamw.defaultdict", lambda _, state: Interrupted(state))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert (bits(params), len(optimizer.state)) == (before, 0)
    optimizer.step()
    assert len(optimizer.state) == len(params)


# ------------------------------------------------------------------ refusals


def _wrapper(torch: Any) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


def _misaligned(torch: Any) -> Any:
    return torch.frombuffer(bytearray(17), dtype=torch.float32, offset=1, count=4)


def _inference(torch: Any) -> Any:
    with torch.inference_mode():
        return torch.ones(3)


PARAMETERS = {
    "float16": (lambda torch: torch.ones(3).half(), "must be float32, got torch.float16"),
    "bfloat16": (lambda torch: torch.ones(3).bfloat16(), "must be float32, got torch.bfloat16"),
    "float64": (lambda torch: torch.ones(3).double(), "must be float32, got torch.float64"),
    "complex": (lambda torch: torch.ones(3, dtype=torch.complex64), "must be float32, got torch.complex64"),
    "meta": (lambda torch: torch.ones(3, device="meta"), "must be on the CPU, got meta"),
    "sparse": (lambda torch: torch.eye(3).to_sparse(), "must be dense, got layout torch.sparse_coo"),
    "fake": (_wrapper, "must be a plain tensor, got FakeTensor"),
    "transposed": (lambda torch: torch.ones(3, 2).t(), r"must be contiguous and .*, got strides \(1, 2\) at"),
    "expanded": (lambda torch: torch.ones(1).expand(3), r"must be contiguous and .*, got strides \(0,\) at"),
    "misaligned": (_misaligned, r"must be contiguous and .*, got strides \(1,\) at address 0x.*[13579bdf]$"),
    "negated": (lambda torch: torch._neg_view(torch.ones(3)), "must be contiguous and .*, got a negated view"),
    "inference": (_inference, "must not be made in inference mode"),
}  # fmt: skip


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_that_cannot_be_updated_in_place_are_refused(
    torch: Any, adamw: Any, make: Any, case: str, named: bool
) -> None:
    build, message = PARAMETERS[case]
    wrong, params = build(torch), make(((2,), (3,)))
    groups = [[("good", params[0])], [("also", params[1]), ("layer.weight", wrong)]]
    if not named:
        groups = [[param for _, param in group] for group in groups]
    name = r"^parameter 'layer.weight' " if named else r"^parameter 1 of group 1 "
    with pytest.raises(InputError, match=name + message):
        adamw([{"params": group} for group in groups])
    optimizer = adamw(groups[0])
    before = digest(optimizer)
    with pytest.raises(InputError, match=message):
        optimizer.add_param_group({"params": groups[1]})
    assert digest(optimizer) == before
    assert len(optimizer.param_groups) == 1


def test_memory_taken_away_is_noticed(torch: Any, adamw: Any, make: Any) -> None:
    """As those do who shard parameters: the tensor keeps its shape, its storage has no bytes."""
    params = make()
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    before = [param.detach().clone() for param in params]  # not `bits`: NumPy would hold on to the memory
    gradient, taken = params[2].grad, params[2].grad.clone()
    params[2].grad = taken
    taken.untyped_storage().resize_(0)
    rule = r"parameter 2 of group 0 must have memory for its 9300 elements, got 0 bytes of it$"
    with pytest.raises(InputError, match=f"^gradient of {rule}"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    params[2].grad = gradient
    params[2].untyped_storage().resize_(0)
    with pytest.raises(InputError, match=f"^{rule}"):
        optimizer.step()
    assert all(map(torch.equal, params[:2] + params[3:], before[:2] + before[3:]))


def test_parameters_that_share_memory_are_refused(torch: Any, adamw: Any) -> None:
    flat = torch.zeros(10)
    for a, b in ((flat[:5], flat[4:]), (flat, flat[3:4]), (flat[2:8], flat[2:8].view(2, 3))):
        params = [torch.nn.Parameter(part) for part in (a, b)]
        with pytest.raises(
            InputError, match=r"parameter 0 of group \d must not share memory with parameter 0 of group \d"
        ):
            adamw([{"params": params[:1]}, {"params": params[1:]}])
    adamw([torch.nn.Parameter(flat[:5]), torch.nn.Parameter(flat[5:])])


def test_what_is_there_already_is_refused(torch: Any, adamw: Any, make: Any) -> None:
    params = make(((2,), (3,)))
    with pytest.raises(InputError, match="parameter 2 of group 0 must not be parameter 0 of it too"):
        adamw([params[0], params[1], params[0]])
    with pytest.raises(InputError, match="parameter 1 of group 0 must not be parameter 0 of it too"):
        adamw([("a", params[0]), ("b", params[0])])
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    before = digest(optimizer)
    for group in (optimizer.param_groups[0], {"params": params[1:]}):
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            optimizer.add_param_group(group)
    assert digest(optimizer) == before
    with pytest.raises(TypeError, match="param_group must be a dict"):
        optimizer.add_param_group(params)
    with pytest.raises(TypeError, match="ordered collections"):
        optimizer.add_param_group({"params": set(make(((2,),)))})
    assert digest(optimizer) == before


def _sparse_gradient(torch: Any, param: Any) -> None:
    param.grad = torch.eye(4).to_sparse()


def _foreign_gradient(torch: Any, param: Any) -> None:
    param.grad = torch.ones(4, 4)
    param.grad.data = torch.ones(2, 8)


def _double_gradient(torch: Any, param: Any) -> None:
    param.grad = None
    param.grad_dtype = torch.float64
    param.grad = torch.ones(4, 4).double()


def _fake_gradient(torch: Any, param: Any) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        param.grad = torch.ones(4, 4)
    param._mode = mode


def _own_memory(torch: Any, param: Any) -> None:
    param.grad = param.detach()


def _half_own_memory(torch: Any, param: Any) -> None:
    param.grad = None
    param.grad_dtype = torch.bfloat16
    param.grad = param.detach().flatten().view(torch.bfloat16)[:16].view(4, 4)


GRADIENTS = {
    "sparse": (_sparse_gradient, "must be dense, got layout torch.sparse_coo"),
    "shape": (_foreign_gradient, r"must have shape \(4, 4\), got \(2, 8\)"),
    "float64": (_double_gradient, "must be float32, float16 or bfloat16, got torch.float64"),
    "fake": (_fake_gradient, "must be a plain tensor, got FakeTensor"),
    "overlap": (_own_memory, "must not overlap a parameter or the optimizer's state"),
    "half overlap": (_half_own_memory, "must not overlap a parameter or the optimizer's state"),
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_that_cannot_be_read_are_refused(
    torch: Any, adamw: Any, make: Any, case: str, is_first: bool
) -> None:
    """In the second group, after the first was all right: neither is changed, and the step after is as ever."""
    spoil, message = GRADIENTS[case]
    params, others = make(((3,), (5,), (4, 4))), make(((3,), (5,), (4, 4)))
    optimizer, twin = (adamw([{"params": s[:2]}, {"params": s[2:]}], max_grad_norm=1.0) for s in (params, others))
    if not is_first:
        train(torch, optimizer, params, range(2))
        train(torch, twin, others, range(2))
    lend(torch, params, 2)
    params[0].grad = None
    spoil(torch, params[2])
    before = digest(optimizer)
    with pytest.raises(InputError, match=f"^gradient of parameter 0 of group 1 {message}"):
        optimizer.step()
    assert digest(optimizer) == before
    params[2].grad = None
    params[2].grad_dtype = torch.float32
    for some, one in ((params, optimizer), (others, twin)):
        lend(torch, some, 3)
        some[0].grad = None  # as in the refused step
        one.step()
        train(torch, one, some, range(4, 6))
    assert bits(params) == bits(others)
    assert digest(optimizer) == digest(twin)


def test_a_gradient_elsewhere_is_refused(torch: Any, make: Any) -> None:
    """Torch itself does not let a parameter on the CPU have one."""
    from cylora.integrations.tensors import Tensors

    tensors = Tensors([{"params": make(((3,),))}], {}, threads=1, skips=False)
    with pytest.raises(InputError, match="gradient of parameter 0 of group 0 must be on the CPU, got meta"):
        tensors.packed(0, torch.ones(3, device="meta"))


def test_a_gradient_that_grew_into_a_parameter_is_refused(torch: Any, adamw: Any) -> None:
    """In half precision it ends where the parameter begins; at the same place, in full precision it does not."""
    memory = torch.zeros(24)
    param = torch.nn.Parameter(memory[8:])
    param.grad_dtype = None
    optimizer = adamw([param])
    param.grad = memory[:8].view(torch.bfloat16)
    optimizer.step()
    param.grad = memory[:16]
    with pytest.raises(InputError, match="gradient of parameter 0 of group 0 must not overlap"):
        optimizer.step()


def test_a_gradient_that_moved_into_a_parameter_is_refused(torch: Any, adamw: Any) -> None:
    """By one element, from between two parameters, where it was fine before."""
    memory = torch.arange(12.0)
    first, second = (torch.nn.Parameter(memory[start : start + 4]) for start in (0, 8))
    optimizer = adamw([first, second], lr=0.1)
    for _ in range(2):
        first.grad = memory[4:8]
        optimizer.step()
    before = memory.clone()
    for start in (3, 5, 0, 8):
        first.grad = memory[start : start + 4]
        with pytest.raises(InputError, match="gradient of parameter 0 of group 0 must not overlap a parameter"):
            optimizer.step()
        assert torch.equal(memory, before)
    first.grad = memory[4:8]
    optimizer.step()
    assert not torch.equal(memory, before)


def test_a_gradient_in_the_state_is_refused(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    for key in ("exp_avg", "exp_avg_sq"):
        params[2].grad = optimizer.state[params[2]][key]
        with pytest.raises(InputError, match="gradient of parameter 2 of group 0 must not overlap"):
            optimizer.step()


@pytest.mark.parametrize("policy", ["raise", "skip"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(
    torch: Any, adamw: Any, make: Any, value: float, policy: str, is_first: bool
) -> None:
    params = make()
    names = [(f"layer.{place}", param) for place, param in enumerate(params)]
    optimizer = adamw([{"params": names[:2]}, {"params": names[2:]}], nonfinite=policy)
    if not is_first:
        train(torch, optimizer, params, range(1))
    lend(torch, params, 1)
    params[2].grad[7, 30] = value
    before = digest(optimizer)
    if policy == "raise":
        where = rf"gradient of parameter 'layer.2' must be finite, got {value} at \[7, 30\]"
        what = where if abs(value) > 1e39 or value != value else r"the gradients' norm must be at most 2\^63"
        with pytest.raises(NonFiniteGradientError, match=what):
            optimizer.step()
    else:
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert not abs(optimizer.grad_norm) < 1e38
    assert digest(optimizer) == before
    train(torch, optimizer, params, range(2, 3))
    assert digest(optimizer) != before


def test_a_norm_too_large_for_the_clip_is_refused(torch: Any, adamw: Any, make: Any) -> None:
    params = make(((3,),))
    optimizer = adamw(params, max_grad_norm=1e-30)
    params[0].grad = torch.full((3,), 1e10)
    with pytest.raises(NonFiniteGradientError, match=r"must be at most 2\^130 times max_grad_norm, got 1.73"):
        optimizer.step()


OPTIONS = {
    "amsgrad": ({"amsgrad": True}, ConfigError, "amsgrad must be False, since .* does not support it, got True"),
    "capturable": ({"capturable": True}, ConfigError, "capturable must be False"),
    "differentiable": ({"differentiable": True}, ConfigError, "differentiable must be False"),
    "beta2": ({"betas": (0.9, 0.4)}, ConfigError, r"options of group 0: beta2 must be in \[0.5, 1\), got 0.4"),
    "eps": ({"eps": 0.0}, ConfigError, "options of group 0: eps must be finite and >= 1e-30, got 0.0"),
    "rate": ({"lr": 1e7}, ConfigError, r"of group 0: learning rate must be a number in \[0, 200\] \(2 / "),
    "torch's": ({"lr": -1.0}, ValueError, "Invalid learning rate: -1.0"),
    "max_grad_norm": ({"max_grad_norm": 0.0}, ConfigError, r"max_grad_norm must be > 0 \(inf turns .*\), got 0.0"),
    "nonfinite": ({"nonfinite": "ignore"}, ConfigError, "nonfinite must be one of 'raise', 'skip', got 'ignore'"),
    "threads": ({"threads": 0}, ConfigError, r"threads \(if not None\) must be an integer in \[1, 64\], got 0"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_checked_at_once(adamw: Any, make: Any, case: str) -> None:
    options, error, message = OPTIONS[case]
    with pytest.raises(error, match=message):
        adamw(make(), **options)


LATER = {
    "amsgrad": (True, "amsgrad of group 1 must be False"),
    "lr": (math.nan, "options of group 1: learning rate must be a number in"),
    "betas": ((0.9, "x"), "options of group 1: could not convert"),
    "weight_decay": (-1, r"options of group 1: weight_decay must be in \[0, 1e6\], got -1"),
    "eps": (None, "options of group 1: eps must be finite"),
}


@pytest.mark.parametrize("option", LATER)
def test_options_set_later_are_checked_at_the_step(torch: Any, adamw: Any, make: Any, option: str) -> None:
    value, message = LATER[option]
    params = make()
    optimizer = adamw([{"params": params[:2]}, {"params": params[2:]}])
    train(torch, optimizer, params, range(1))
    good, optimizer.param_groups[1][option] = optimizer.param_groups[1][option], value
    before = digest(optimizer)
    with pytest.raises(ConfigError, match=message):
        optimizer.step()
    assert digest(optimizer) == before
    optimizer.param_groups[1][option] = good
    optimizer.step()
    assert digest(optimizer) != before


@pytest.mark.parametrize(
    ("option", "name"), [("lr", "learning rate"), ("eps", "eps"), ("weight_decay", "weight_decay")]
)
def test_an_option_of_several_numbers_is_refused(torch: Any, adamw: Any, make: Any, option: str, name: str) -> None:
    optimizer = adamw(make())
    optimizer.param_groups[0][option] = torch.ones(2)
    with pytest.raises(ConfigError, match=f"options of group 0: {name} must be "):
        optimizer.step()


def test_options_of_another_optimizer_are_refused(torch: Any, adamw: Any, make: Any) -> None:
    params = make()
    optimizer = adamw(params)
    train(torch, optimizer, params, range(1))
    before = digest(optimizer)
    with pytest.raises(ConfigError, match=r"^options of group 0 must have 'betas', got none: another optimizer's"):
        optimizer.load_state_dict(torch.optim.SGD(params, lr=0.5).state_dict())
    assert digest(optimizer) == before
