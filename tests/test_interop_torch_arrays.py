"""Tensors of real torch: read to the bit where they lie, written where that is safe, all else refused by name."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from training import make_adapter, make_set, make_trainer

from cylora import InputError, LoraAdapter, LoraConfig, clip_grad_norm_, grad_norm, step_many

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def torch() -> Any:
    import torch

    return torch


@pytest.fixture(params=["by C functions", "by __dlpack__"])
def as_given(request: pytest.FixtureRequest, torch: Any) -> Callable[[Any], Any]:
    """Return a function that turns a tensor into one taken this way. Before 2.10 torch had no C functions."""
    if request.param == "by C functions":
        assert torch.Tensor.__dlpack_c_exchange_api__ is not None
        return lambda tensor: tensor
    slow = type("Slow", (torch.Tensor,), {"__dlpack_c_exchange_api__": None})
    return lambda tensor: tensor.as_subclass(slow)


def wide(tensor: Any) -> np.ndarray:
    """Return the same numbers as a float32 array of NumPy's, in new memory."""
    return np.array(tensor.detach().float().numpy())


def sides() -> Iterator[tuple[LoraAdapter, Any]]:
    """Yield two equal pairs of an adapter and its trainer, of a size that lets go of the GIL."""
    for _ in range(2):
        yield LoraAdapter(1999, 611, LoraConfig(rank=5), seed=1), make_trainer(max_grad_norm=1.0, weight_decay=0.1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_step_reads_the_bits_of_tensors(torch: Any, as_given: Callable[[Any], Any], dtype: str) -> None:
    (ours, trainer), (twin, twins) = sides()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        a, b = (torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for shape in ((5, 1999), (611, 5)))
        before = wide(a).tobytes(), wide(b).tobytes(), a._version
        for call, other in ((trainer.step, twins.step), (trainer.accumulate, twins.accumulate)):
            assert call(1.0, ours, as_given(a), as_given(b)) == other(1.0, twin, wide(a), wide(b))
        assert trainer.step_accumulated() == twins.step_accumulated()
        assert grad_norm([as_given(a), as_given(b)]) == grad_norm([wide(a), wide(b)])
        assert (wide(a).tobytes(), wide(b).tobytes(), a._version) == before
    assert ours.flat.vector.tobytes() == twin.flat.vector.tobytes()
    assert trainer._adam.m.tobytes() == twins._adam.m.tobytes()


def test_what_autograd_leaves_in_grad_is_taken(torch: Any, as_given: Callable[[Any], Any]) -> None:
    (ours, trainer), (twin, twins) = sides()
    a, b = (torch.nn.Parameter(torch.from_numpy(part.copy())) for part in (ours.a_matrix, ours.b_matrix))
    x = torch.randn(4, 1999, generator=torch.Generator().manual_seed(1))
    (x @ a.T @ b.T).square().sum().backward()
    assert trainer.step(1.0, ours, as_given(a.grad), as_given(b.grad)) == twins.step(
        1.0, twin, wide(a.grad), wide(b.grad)
    )
    assert ours.flat.vector.tobytes() == twin.flat.vector.tobytes()


def test_a_tensor_in_a_graph_is_read_and_not_written(torch: Any, as_given: Callable[[Any], Any]) -> None:
    leaf = torch.nn.Parameter(torch.arange(1.0, 7.0))
    for tensor in (leaf, leaf * 2, leaf.double().float()):
        assert tensor.requires_grad
        before = wide(tensor).tobytes()
        assert grad_norm([as_given(tensor)]) == grad_norm([wide(tensor)])
        with pytest.raises(InputError, match=r"grads\[0\] must be .*it requires grad, and would not notice"):
            clip_grad_norm_([as_given(tensor)], 0.5)
        assert wide(tensor).tobytes() == before
    expected = wide(leaf)
    assert clip_grad_norm_([as_given(leaf.detach())], 0.5) == clip_grad_norm_([expected], 0.5)
    assert wide(leaf).tobytes() == expected.tobytes()


def test_clipping_writes_into_tensors(torch: Any, as_given: Callable[[Any], Any]) -> None:
    grads = [torch.randn(3, 6), torch.randn(0, 4), torch.randn(7)]
    expected = [wide(grad) for grad in grads]
    assert clip_grad_norm_([as_given(grad) for grad in grads], 0.5) == clip_grad_norm_(expected, 0.5)
    assert [wide(grad).tobytes() for grad in grads] == [grad.tobytes() for grad in expected]
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(InputError, match=r"grads\[0\] must be a writable, .*, got .* with dtype b?float16"):
            clip_grad_norm_([as_given(grads[0].to(dtype))], 0.5)


def test_views_that_lie_together_are_taken(torch: Any, as_given: Callable[[Any], Any]) -> None:
    whole = torch.randn(4, 6)
    for view in (
        whole[1:3],
        whole.view(-1),
        whole[2],
        whole[:1, 2:4],
        whole[3:3],
        whole.T.contiguous(),
        whole.unsqueeze(1),
    ):
        assert grad_norm([as_given(view)]) == grad_norm([wide(view)])
    assert grad_norm([torch.tensor(3.0)]) == 3.0
    shared = torch.randn(6).share_memory_()
    assert grad_norm([as_given(shared)]) == grad_norm([wide(shared)])


def refusals(torch: Any) -> dict[str, tuple[Any, str]]:
    """Return what cannot be taken, each with what the message says."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Wrapper(torch.Tensor):
        """A tensor without memory of its own, as those of FSDP and torchao."""

        @staticmethod
        def __new__(cls, inner: Any) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    t = torch.ones(3, 6)
    with FakeTensorMode():
        fake = torch.ones(3, 6)
    return {
        "transposed": (torch.ones(6, 3).T, r"strides \(1, 3\)"),
        "every second": (torch.ones(3, 12)[:, ::2], r"strides \(12, 2\)"),
        "expanded": (torch.ones(1, 6).expand(3, 6), r"strides \(0, 1\)"),
        "double": (t.double(), "dtype float64"),
        "int": (t.int(), "dtype int32"),
        "bool": (t.bool(), "dtype bool8"),
        "complex": (torch.complex(t, t), "dtype complex64"),
        "conjugated": (torch.complex(t, t).conj(), "dtype complex64|conjugate bit"),
        "float8": (t.to(torch.float8_e4m3fn), "dtype type 10 of bits 8"),
        "negative": (torch._neg_view(t), r"its elements count with the other sign: pass its \.resolve_neg\(\)"),
        "imaginary part": (torch.complex(t, t).conj().imag, "its elements count with the other sign"),
        "sparse": (t.to_sparse(), "layout other than torch.strided"),
        "sparse rows": (t.to_sparse_csr(), "layout other than torch.strided"),
        "mkldnn": (t.to_mkldnn(), "layout other than torch.strided"),
        "on meta": (t.to("meta"), "Cannot pack tensors on meta"),
        "nested": (torch.nested.nested_tensor([t[0], t[1, :3]], layout=torch.jagged), "NestedTensor"),
        "wrapper": (Wrapper(t), "without memory"),
        "fake": (fake, "FakeTensor with .*without memory"),
        "zero tensor": (torch._efficientzerotensor((3, 6)), "without memory"),
    }


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_what_cannot_be_taken_is_refused_by_name(torch: Any) -> None:
    b = torch.ones(5, 3)
    for case, (tensor, message) in refusals(torch).items():
        adapter, trainer = make_adapter(), make_trainer()
        before = adapter.flat.vector.tobytes()
        for call in (trainer.step, trainer.accumulate):
            with pytest.raises(InputError, match=rf"grad_a must be .*, got .*({message})"):
                call(1.0, adapter, tensor, b)
        for one in (lambda given=tensor: grad_norm([given]), lambda given=tensor: clip_grad_norm_([given], 0.5)):
            with pytest.raises(InputError, match=rf"grads\[0\] must be .*, got .*({message})"):
                one()
        assert (adapter.flat.vector.tobytes(), trainer.total_steps(), trainer.accumulated) == (before, 0, 0), case


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_a_tensor_inside_a_transform_is_refused(torch: Any, transform: str) -> None:
    def function(x: Any) -> Any:
        with pytest.raises(InputError, match=r"grads\[0\] must be .*, got torch"):
            grad_norm([x])
        return x.sum()

    x = torch.ones(3, 6)
    if transform == "jvp":
        torch.func.jvp(function, (x,), (x,))
    else:
        getattr(torch.func, transform)(function)(x)


def test_a_tensor_is_let_go_of(torch: Any, as_given: Callable[[Any], Any]) -> None:
    """Whatever came of the call, nobody but the caller holds its memory then."""
    adapter, trainer = make_adapter(), make_trainer()
    good = torch.ones(5, 3)
    for values in (torch.ones(3, 6), torch.full((3, 6), np.nan), torch.ones(3, 7), torch.ones(6, 3).T):
        given = as_given(values)
        references = sys.getrefcount(given), torch._C._storage_Use_Count(given.untyped_storage()._cdata)
        for call in (
            lambda given=given: trainer.step(1.0, adapter, given, good),
            lambda given=given: trainer.accumulate(1.0, adapter, given, good),
            lambda given=given: trainer.step(1.0, adapter, given, good[:4]),
            lambda given=given: trainer.step("x", adapter, given, good),
            lambda given=given: grad_norm([given, object()]),
            lambda given=given: clip_grad_norm_([given], 1.0),
        ):
            with contextlib.suppress(InputError):
                call()
            trainer.discard_accumulated()
        del call
        gc.collect()
        assert (sys.getrefcount(given), torch._C._storage_Use_Count(given.untyped_storage()._cdata)) == references


def test_a_set_is_stepped_by_one_flat_tensor_and_many_by_theirs(torch: Any) -> None:
    adapters, twin = make_set(), make_set()
    vector = torch.randn(adapters.param_count()).bfloat16()
    assert make_trainer().step(1.0, adapters, vector) == make_trainer().step(1.0, twin, wide(vector))
    assert adapters.flat.vector.tobytes() == twin.flat.vector.tobytes()
    grads = [(torch.randn(3, 6), torch.randn(5, 3)) for _ in range(20)]
    ours = [(make_trainer(), 1.0, make_adapter(i), *pair) for i, pair in enumerate(grads)]
    theirs = [(make_trainer(), 1.0, make_adapter(i), *map(wide, pair)) for i, pair in enumerate(grads)]
    assert step_many(ours) == step_many(theirs)
    assert all(a[2].flat.vector.tobytes() == b[2].flat.vector.tobytes() for a, b in zip(ours, theirs, strict=True))


def test_an_adapter_computes_with_tensors(torch: Any) -> None:
    adapter = make_adapter()
    x, g = torch.randn(2, 6, requires_grad=True), torch.randn(2, 5).half()
    pair, expected = adapter.gradients(x, g), adapter.gradients(wide(x), g.numpy())
    assert [part.tobytes() for part in pair] == [part.tobytes() for part in expected]
    assert adapter.apply(x).tobytes() == adapter.apply(wide(x)).tobytes()
    assert adapter.input_gradient(g).tobytes() == adapter.input_gradient(g.numpy()).tobytes()
    for bad in (x.bfloat16(), x.to("meta"), x.detach().to_sparse(), torch._neg_view(x.detach())):
        with pytest.raises(InputError, match=r"x must be (an array of real numbers|real numbers), got Tensor \("):
            adapter.apply(bad)
