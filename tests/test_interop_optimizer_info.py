"""What torch tests its own AdamW with on the CPU: each input either gives torch's result or is refused by name.

The inputs come with torch, in torch.testing._internal.common_optimizers.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from cylora.errors import ConfigError, InputError

pytestmark = pytest.mark.interop
STEPS = 7


@pytest.fixture(scope="module")
def lib() -> Iterator[SimpleNamespace]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from torch.testing._internal import common_optimizers

    from cylora.integrations.torch import CyloraAdamW

    (found,) = (one for one in common_optimizers.optim_db if one.optim_cls is torch.optim.AdamW)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(torch=torch, info=found, adamw=CyloraAdamW)
    torch.set_num_threads(threads)


def model(torch: Any, dtype: Any) -> Any:
    """Return the model of torch's own tests (test_optim.py, _test_derived_optimizers)."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sigmoid(), torch.nn.Linear(3, 1), torch.nn.Sigmoid()).to(
        dtype
    )


def trained(torch: Any, kind: Any, options: dict[str, Any], dtype: Any) -> tuple[Any, Any]:
    """Return model and optimizer after some steps, one of which leaves a layer without gradients."""
    one = model(torch, dtype)
    one.register_parameter("unused", torch.nn.Parameter(torch.randn(2, dtype=dtype)))
    optimizer = kind(one.parameters(), **copy.deepcopy(options))
    x = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], dtype=dtype).reshape(3, 2)
    for step in range(STEPS):
        optimizer.zero_grad()
        one(x).sum().backward()
        if step == 3:
            for param in one[2].parameters():
                param.grad = None
        optimizer.step()
    return one, optimizer


def is_refused(options: dict[str, Any]) -> bool:
    return any(options.get(name) for name in ("amsgrad", "capturable", "differentiable"))


def test_every_input_gives_torchs_result_or_is_refused(lib: SimpleNamespace, figures: Any) -> None:
    torch, kinds = lib.torch, {"same": 0, "refused": 0}
    for given in lib.info.optim_inputs_func(device="cpu", dtype=torch.float32):
        forms = [{}, *({form: True} for form in ("foreach", "fused") if form in lib.info.supported_impls)]
        for form in forms:
            options = given.kwargs | form
            if is_refused(options):
                with pytest.raises(ConfigError, match="must be False, since CyloraAdamW does not support it"):
                    trained(torch, lib.adamw, options, torch.float32)
                kinds["refused"] += 1
                continue
            (ours, our_optimizer), (theirs, their_optimizer) = (
                trained(torch, kind, options, torch.float32) for kind in (lib.adamw, torch.optim.AdamW)
            )
            for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(param, other)
                state, other_state = our_optimizer.state[param], their_optimizer.state[other]
                assert set(state) == set(other_state)
                for key in state:
                    torch.testing.assert_close(state[key], other_state[key])
            kinds["same"] += 1
    figures(**kinds)
    assert kinds["same"] >= 12
    assert kinds["refused"] >= 3


def test_what_is_for_gpus_is_refused(lib: SimpleNamespace) -> None:
    """The inputs for CUDA: capturable, and with it rates and betas that are tensors."""
    inputs = lib.info.optim_inputs_func(device="cuda", dtype=lib.torch.float32)
    refused = [given.kwargs for given in inputs if is_refused(given.kwargs)]
    assert len(refused) >= 6
    for options in refused:
        with pytest.raises(ConfigError, match=r"(amsgrad|capturable) must be False"):
            lib.adamw(model(lib.torch, lib.torch.float32).parameters(), **options)


def test_tensor_rates_and_betas_give_torchs_result(lib: SimpleNamespace) -> None:
    torch = lib.torch
    options = {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.9), torch.tensor(0.99))}
    ours, theirs = (trained(torch, kind, options, torch.float32)[0] for kind in (lib.adamw, torch.optim.AdamW))
    for param, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(param, other)


def test_other_dtypes_are_refused(lib: SimpleNamespace) -> None:
    torch = lib.torch
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.complex64):
        for given in lib.info.optim_inputs_func(device="cpu", dtype=dtype):
            options = {key: value for key, value in given.kwargs.items() if key != "amsgrad"}
            with pytest.raises(InputError, match=f"parameter 0 of group 0 must be float32, got {dtype}"):
                lib.adamw([torch.nn.Parameter(torch.ones(2, dtype=dtype))], **options)


def test_every_wrong_input_of_torch_is_an_error_here(lib: SimpleNamespace) -> None:
    """With torch's type and message, but for those that are refused by name before torch's constructor sees them."""
    torch, count = lib.torch, 0
    for wrong in lib.info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = wrong.optimizer_error_input
        params = [torch.nn.Parameter(torch.ones(2))] if given.params is None else given.params
        with pytest.raises((wrong.error_type, InputError)) as error:
            lib.adamw(params, **given.kwargs)
        assert isinstance(error.value, InputError) or error.match(wrong.error_regex)
        count += 1
    assert count >= 8


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("load_named", [True, False])
def test_names_of_parameters_are_kept_as_torch_keeps_them(lib: SimpleNamespace, named: bool, load_named: bool) -> None:
    """After test_optim.py's test_can_load_from_to_named_state_dict."""
    torch = lib.torch
    groups = []
    for kind in (lib.adamw, torch.optim.AdamW):
        source, target = model(torch, torch.float32), model(torch, torch.float32)
        optimizer = kind(source.named_parameters() if named else source.parameters(), lr=0.1)
        source(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        other = kind(target.named_parameters() if load_named else target.parameters(), lr=0.2)
        other.load_state_dict(optimizer.state_dict())
        groups.append([group.get("param_names") for group in other.param_groups])
    assert groups[0] == groups[1]


def test_every_number_of_groups_and_frozen_parameters_gives_torchs_result(lib: SimpleNamespace) -> None:
    """After test_optim.py's test_mixed_device_dtype and test_param_groups_*: groups with options of their own."""
    torch = lib.torch
    options = [{"lr": 0.1}, {"weight_decay": 0.5}, {"maximize": True}, {"betas": (0.5, 0.9)}, {"eps": 1e-3}]
    for first, second in itertools.permutations(options, 2):
        results = []
        for kind in (lib.adamw, torch.optim.AdamW):
            one = model(torch, torch.float32)
            one[0].bias.requires_grad_(False)
            optimizer = kind([{"params": one[0].parameters(), **first}, {"params": one[2].parameters(), **second}])
            for _ in range(3):
                optimizer.zero_grad(set_to_none=False)
                one(torch.ones(1, 2)).sum().backward()
                optimizer.step()
            results.append(list(one.parameters()))
        for param, other in zip(*results, strict=True):
            torch.testing.assert_close(param, other)
