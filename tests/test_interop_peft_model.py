"""A PEFT model's LoRA matrices as an AdapterSet: one memory, and what cannot be wrapped is refused by name."""

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from training import make_trainer

from cylora import AdapterSet
from cylora.errors import InputError
from cylora.formats.peft import TENSORS_NAME, load_peft, save_peft

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def lib() -> Iterator[SimpleNamespace]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import safetensors.torch
        import torch
        import transformers

    from cylora.integrations import torch as ours

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(
        peft=peft, torch=torch, transformers=transformers, load=safetensors.torch.load_file,
        wrap=ours.wrap_peft_model, gradients=ours.wrap_peft_gradients, adamw=ours.CyloraAdamW,
    )  # fmt: skip
    torch.set_num_threads(threads)


@pytest.fixture
def llama(lib: SimpleNamespace) -> Callable[..., Any]:
    """Return a function that makes the same small Llama with LoRA at each call; B is not zero."""

    def llama(**config: Any) -> Any:
        lib.torch.manual_seed(0)
        base = lib.transformers.LlamaForCausalLM(
            lib.transformers.LlamaConfig(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                vocab_size=64, max_position_embeddings=32,
            )
        )  # fmt: skip
        options = {"r": 4, "lora_alpha": 8, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | config
        model = lib.peft.get_peft_model(base, lib.peft.LoraConfig(**options))
        with lib.torch.no_grad():
            for name, param in model.named_parameters():
                if "lora_B" in name:
                    param.normal_(0, 0.1)
        return model

    return llama


@pytest.fixture
def ids(lib: SimpleNamespace) -> Any:
    return lib.torch.randint(0, 64, (2, 16), generator=lib.torch.Generator().manual_seed(1))


def lora(model: Any) -> dict[str, Any]:
    return {name: param for name, param in model.named_parameters() if "lora_" in name}


def digest(model: Any) -> str:
    """Return a hash of all parameters, and of where they are."""
    sha = hashlib.sha256()
    for name, param in model.named_parameters(remove_duplicate=False):
        place = param.data_ptr() if param.device.type == "cpu" else 0
        sha.update(f"{name} {id(param)} {place} {param.dtype} {param.device} {param.grad}".encode())
        if param.device.type == "cpu":
            sha.update(param.detach().float().numpy().tobytes())
    return sha.hexdigest()


def test_both_see_each_others_writes(lib: SimpleNamespace, llama: Any, ids: Any) -> None:
    model = llama()
    before = {name: param.detach().clone() for name, param in lora(model).items()}
    objects = {name: id(param) for name, param in lora(model).items()}
    logits = model(ids).logits.detach()
    adapters = lib.wrap(model)
    assert {name: id(param) for name, param in lora(model).items()} == objects
    assert all(lib.torch.equal(param, before[name]) for name, param in lora(model).items())
    assert lib.torch.equal(model(ids).logits, logits)
    assert len(adapters) == 14
    assert adapters.param_count() == sum(param.numel() for param in lora(model).values())
    one = model.base_model.model.get_submodule(Q)
    adapters[Q].a_matrix[1, 2] = 7.0
    assert one.lora_A["default"].weight[1, 2] == 7.0
    with lib.torch.no_grad():
        one.lora_B["default"].weight[3, 1] = -5.0
    assert adapters[Q].b_matrix[3, 1] == -5.0
    adapters.flat.vector.fill(0.0)
    assert not any(param.any() for param in lora(model).values())
    assert all(param.requires_grad for param in lora(model).values())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"v_proj": 3}},
        {"rank_pattern": {r".*\.1\..*": 3}, "init_lora_weights": "gaussian", "target_modules": ["q_proj", "v_proj"]},
    ],
)
def test_saved_it_is_what_peft_saves(lib: SimpleNamespace, llama: Any, tmp_path: Path, config: dict[str, Any]) -> None:
    model = llama(**config)
    adapters = lib.wrap(model)
    model.save_pretrained(tmp_path / "peft")
    save_peft(adapters, tmp_path / "ours", portable=False)
    theirs, ours = (lib.load(tmp_path / name / TENSORS_NAME) for name in ("peft", "ours"))
    assert set(theirs) == set(ours)
    assert all(lib.torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    for key in ("use_rslora", "lora_dropout", "task_type", "base_model_name_or_path", "bias"):
        assert configs[0][key] == configs[1][key]
    loaded = load_peft(tmp_path / "ours")
    for name, one in adapters.items():
        module = model.base_model.model.get_submodule(name)
        assert (one.rank, one.alpha, one.scaling) == (
            module.r["default"], module.lora_alpha["default"], pytest.approx(module.scaling["default"]),
        )  # fmt: skip
        assert one.config.dropout == config.get("lora_dropout", 0.0)
        assert (loaded[name].rank, loaded[name].scaling) == (one.rank, one.scaling)


def test_a_trainer_trains_the_model(lib: SimpleNamespace, llama: Any, ids: Any) -> None:
    """backward() adds to the flat gradient, the trainer steps; against PEFT with torch's AdamW in float64."""
    model, twin = llama(), llama().double()
    adapters = lib.wrap(model)
    gradients = lib.gradients(model, adapters)
    trainer = make_trainer(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5)
    optimizer = lib.torch.optim.AdamW(lora(twin).values(), lr=1e-2, weight_decay=0.1)
    losses: tuple[list[float], list[float]] = ([], [])
    for _ in range(8):
        loss, other = model(ids, labels=ids).loss, twin(ids, labels=ids).loss
        for one in (loss, other):
            (one / 2).backward(retain_graph=True)  # twice, as with micro-batches
            (one / 2).backward()
        trainer.step(loss.item(), adapters, gradients)
        gradients.zero_()
        lib.torch.nn.utils.clip_grad_norm_(lora(twin).values(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses[0].append(loss.item())
        losses[1].append(other.item())
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert all(param.grad is not None for param in lora(model).values())


def test_the_optimizer_takes_a_wrapped_model(lib: SimpleNamespace, llama: Any, ids: Any) -> None:
    model, plain = llama(), llama()
    lib.wrap(model)
    for one in (model, plain):
        optimizer = lib.adamw(lora(one).items(), lr=1e-2, max_grad_norm=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            one(ids, labels=ids).loss.backward()
            optimizer.step()
    assert all(lib.torch.equal(a, b) for a, b in zip(lora(model).values(), lora(plain).values(), strict=True))


def test_another_adapter_of_the_model_is_left_alone(lib: SimpleNamespace, llama: Any) -> None:
    model = llama()
    model.add_adapter("other", lib.peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"]))
    places = {name: param.data_ptr() for name, param in lora(model).items() if ".default." in name}
    adapters = lib.wrap(model, "other")
    assert list(adapters) == [Q, Q.replace("0", "1", 1)]
    assert {name: param.data_ptr() for name, param in lora(model).items() if ".default." in name} == places


def test_a_transformers_model_with_an_adapter_is_wrapped_too(lib: SimpleNamespace, llama: Any) -> None:
    """What its add_adapter does: it injects the layers, which have no prefix then, and notes the config."""
    base, config = llama().unload(), lib.peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"])
    base = lib.peft.inject_adapter_in_model(config, base)
    base.peft_config = {"default": config}
    assert list(lib.wrap(base)) == [Q, Q.replace("0", "1", 1)]


# ------------------------------------------------------------------ refusals


def _half(lib: Any, model: Any) -> None:
    model.base_model.model.get_submodule(Q).lora_A["default"].half()


def _meta(lib: Any, model: Any) -> None:
    model.base_model.model.get_submodule(Q).lora_B["default"].to("meta")


def _tied(lib: Any, model: Any) -> None:
    first, second = (model.base_model.model.get_submodule(Q.replace("0", n, 1)) for n in "01")
    second.lora_A["default"].weight = first.lora_A["default"].weight


def _same_module(lib: Any, model: Any) -> None:
    layers = model.base_model.model.model.layers
    layers[1].self_attn.q_proj = layers[0].self_attn.q_proj


def _merged(lib: Any, model: Any) -> None:
    model.merge_adapter()


def _rescaled(lib: Any, model: Any) -> None:
    model.base_model.model.get_submodule(Q).set_scale("default", 3.0)


def _alpha(lib: Any, model: Any) -> None:
    model.base_model.model.get_submodule(Q).lora_alpha["default"] = -1


def _bias(lib: Any, model: Any) -> None:
    linear = model.base_model.model.get_submodule(Q).lora_B["default"]
    linear.bias = lib.torch.nn.Parameter(lib.torch.zeros(32))


def _variant(lib: Any, model: Any) -> None:
    model.base_model.model.get_submodule(Q).lora_variant["default"] = object()


def _nothing(lib: Any, model: Any) -> None:
    pass


full = f"base_model.model.{Q}"
REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any, Any], None], str]] = {
    "dora": ({"use_dora": True}, _nothing, "config of 'default': use_dora must not be set, since it changes what"),
    "bias": ({"bias": "lora_only"}, _nothing, "config of 'default': bias must not be set"),
    "lora_bias": ({"lora_bias": True}, _nothing, "config of 'default': lora_bias must not be set"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, _nothing, "'default': modules_to_save must not be set"),
    "pissa": ({"init_lora_weights": "pissa"}, _nothing, "config of 'default': init_lora_weights must not be set"),
    "embedding": (
        {"target_modules": ["embed_tokens"]}, _nothing,
        "base_model.model.model.embed_tokens must have lora_A and lora_B, got an adapter of a Embedding",
    ),
    "half": ({}, _half, f"parameter '{full}.lora_A.default.weight' must be float32, got torch.float16"),
    "meta": ({}, _meta, f"parameter '{full}.lora_B.default.weight' must be on the CPU, got meta"),
    "tied": (
        {}, _tied,
        f"'{full.replace('0', '1', 1)}.lora_A.default.weight' must not share memory with parameter '{full}.lora_A",
    ),
    "one module twice": ({}, _same_module, f"{full.replace('0', '1', 1)} must not be the same module as {full}"),
    "merged": ({}, _merged, f"{full} must not be merged"),
    "rescaled": ({}, _rescaled, f"{full} must be scaled by its alpha and rank, 2, got 6"),
    "alpha": ({}, _alpha, rf"{full}: alpha must be in \(0, 1e6\], got -1"),
    "a bias": ({}, _bias, f"{full} must have no bias in lora_A and lora_B, got one"),
    "variant": ({}, _variant, f"{full} must have plain LoRA, got object"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_set_cannot_hold_is_refused(lib: SimpleNamespace, llama: Any, case: str) -> None:
    config, change, message = REFUSED[case]
    model = llama(**config)
    change(lib, model)
    before = digest(model)
    with pytest.raises(InputError, match=message):
        lib.wrap(model)
    assert digest(model) == before


def test_a_convolution_is_refused(lib: SimpleNamespace) -> None:
    net = lib.torch.nn.Sequential(lib.torch.nn.Conv2d(3, 4, 3))
    model = lib.peft.get_peft_model(net, lib.peft.LoraConfig(r=2, target_modules=["0"]))
    before = digest(model)
    with pytest.raises(InputError, match=r"base_model\.model\.0 must be a linear layer, got an adapter of a Conv2d"):
        lib.wrap(model)
    assert digest(model) == before


def test_what_is_no_peft_model_is_refused(lib: SimpleNamespace, llama: Any) -> None:
    with pytest.raises(InputError, match="model must be a PEFT model, got Linear"):
        lib.wrap(lib.torch.nn.Linear(2, 3))
    with pytest.raises(InputError, match="adapter_name must be one of 'default', got 'mine'"):
        lib.wrap(llama(), "mine")
    model = llama()
    model.peft_config["empty"] = copy.deepcopy(model.peft_config["default"])
    with pytest.raises(InputError, match="model must have modules with the adapter 'empty', got none"):
        lib.wrap(model, "empty")
    ia3 = lib.peft.get_peft_model(
        llama().unload(), lib.peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    with pytest.raises(InputError, match="config of 'default': peft_type must be 'LORA', got 'IA3'"):
        lib.wrap(ia3)


def test_gradients_are_of_the_wrapped_model_only(lib: SimpleNamespace, llama: Any) -> None:
    model = llama()
    adapters = lib.wrap(model)
    others = AdapterSet({"model.layers.0.self_attn.q_proj": (32, 32)}, seed=0)
    before = digest(model)
    with pytest.raises(InputError, match="what wrap_peft_model made of the model's 14 modules, got 1 others"):
        lib.gradients(model, others)
    with pytest.raises(InputError, match="what wrap_peft_model made of the model's 14 modules, got dict"):
        lib.gradients(model, {})
    assert digest(model) == before
    name = f"{full}.lora_B.default.weight"
    lora(model)[name].requires_grad_(False)
    with pytest.raises(InputError, match=f"{name} must require a gradient, got a frozen one"):
        lib.gradients(model, adapters)
    lora(model)[name].data = lora(model)[name].data.clone()
    with pytest.raises(InputError, match=f"{name} must lie in the memory of the adapters, got other memory: wrap"):
        lib.gradients(model, adapters)
    assert all(param.grad is None for param in lora(model).values())
