"""Against real PEFT: what we write it computes with, what it writes we train on, and what differs is refused.

The oracle is the base model in float64 with scaling * B @ A added to its weights.
"""

import copy
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from training import make_trainer, same_bits

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig
from cylora.errors import FormatError
from cylora.formats.peft import PREFIX, TENSORS_NAME, load_peft, save_peft
from cylora.formats.weights import narrowed

# What the peers' next versions will change is between them.
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HIDDEN, N_LAYERS = 64, 3
LIMIT = 1e-6  # of logits of size 1, in float64: what float32 adapters that were folded may differ by
ROUNDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "float32": lambda matrix: matrix,
    "float16": lambda matrix: matrix.astype(np.float16).astype(np.float32),
    "bfloat16": lambda matrix: matrix.astype(ml_dtypes.bfloat16).astype(np.float32),
}


@pytest.fixture(scope="module")
def lib() -> Iterator[SimpleNamespace]:
    """Import what these tests are about: without it they fail, and only when they are selected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import safetensors.torch
        import torch
        import transformers
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(peft=peft, torch=torch, transformers=transformers, load=safetensors.torch.load_file)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(lib: SimpleNamespace) -> Any:
    """Return a Llama with random weights, large enough that attention is not uniform."""
    lib.torch.manual_seed(0)
    config = lib.transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
        max_position_embeddings=64,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    return lib.transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ids(lib: SimpleNamespace) -> Any:
    return lib.torch.randint(0, 200, (2, 24), generator=lib.torch.Generator().manual_seed(1))


def shapes_of(base: Any, ends: list[str]) -> dict[str, tuple[int, int]]:
    return {
        name: (module.in_features, module.out_features)
        for name, module in base.named_modules()
        if name.rpartition(".")[2] in ends
    }


def mixed_set(base: Any, ends: list[str], *, rslora: tuple[bool, ...]) -> AdapterSet:
    """Ranks, alphas and rsLoRA that change from module to module."""
    made = {}
    for n, (name, (d_in, d_out)) in enumerate(shapes_of(base, ends).items()):
        rank, alpha = [(2, 5.0), (8, 16.0), (4, 8.0), (3, 0.7)][n % 4]
        config = LoraConfig(rank=rank, alpha=alpha, use_rslora=rslora[n % len(rslora)])
        made[name] = LoraAdapter(d_in, d_out, config, seed=n)
    return AdapterSet.from_adapters(made)


def train(lib: SimpleNamespace, base: Any, ids: Any, adapters: AdapterSet, steps: int = 4) -> None:
    """Let cylora train on gradients that torch computes, through tensors that are the adapters' own memory."""
    leaves, handles = [], []
    for name, one in adapters.items():
        a, b = (lib.torch.from_numpy(matrix).requires_grad_() for matrix in (one.a_matrix, one.b_matrix))

        def hook(_: Any, args: Any, output: Any, a: Any = a, b: Any = b, scaling: float = one.scaling) -> Any:
            return output + scaling * (args[0] @ a.T) @ b.T

        handles.append(base.get_submodule(name).register_forward_hook(hook))
        leaves += [a, b]
    gradients, trainer, losses = Gradients(adapters), make_trainer(learning_rate=0.02), []
    buffers = [gradient for pair in gradients.values() for gradient in pair]
    try:
        for _ in range(steps):
            loss = base(ids, labels=ids).loss
            for buffer, gradient in zip(buffers, lib.torch.autograd.grad(loss, leaves), strict=True):
                buffer[...] = gradient.numpy()
            losses.append(loss.item())
            trainer.step(losses[-1], adapters, gradients)
    finally:
        for handle in handles:
            handle.remove()
    assert losses[-1] < losses[0]


def logits(lib: SimpleNamespace, model: Any, ids: Any) -> np.ndarray:
    with lib.torch.no_grad():
        return model(ids).logits.numpy()


def merged_logits(
    lib: SimpleNamespace, base: Any, ids: Any, adapters: AdapterSet, dtype: str = "float32"
) -> np.ndarray:
    """Return what a float64 model computes whose weights are W + scaling * B @ A."""
    merged = copy.deepcopy(base).double()
    for name, one in adapters.items():
        a, b = (ROUNDED[dtype](matrix).astype(np.float64) for matrix in (one.a_matrix, one.b_matrix))
        merged.get_submodule(name).weight += lib.torch.from_numpy(one.scaling * b @ a)
    plain = logits(lib, copy.deepcopy(base).double(), ids)
    result = logits(lib, merged, ids)
    assert np.abs(result - plain).max() > 0.05, "the adapters must matter"
    return result


def loaded_by_peft(lib: SimpleNamespace, base: Any, path: Path) -> Any:
    """Load a directory with PEFT, which must take every tensor to the bit, add none, and have nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = lib.peft.PeftModel.from_pretrained(copy.deepcopy(base), path, autocast_adapter_dtype=False).eval()
    taken = lib.peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    written = lib.load(path / TENSORS_NAME)
    assert set(taken) == set(written)
    for name, tensor in written.items():
        assert same_bits(taken[name].numpy(), tensor.float().numpy())  # PEFT widens to the base model's type
    return model


def assert_peft_agrees(
    lib: SimpleNamespace, base: Any, ids: Any, path: Path, adapters: AdapterSet, dtype: str = "float32"
) -> None:
    expected = merged_logits(lib, base, ids, adapters, dtype)
    model = loaded_by_peft(lib, base, path)
    assert np.abs(logits(lib, model.double(), ids) - expected).max() < LIMIT


# ------------------------------------------------------------------ what we write


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("ends", [["q_proj"], ["q_proj", "v_proj"], PROJECTIONS, [*PROJECTIONS, "lm_head"]], ids=len)
def test_peft_computes_with_what_cylora_trained(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, ends: list[str], dtype: str
) -> None:
    adapters = AdapterSet(shapes_of(base, ends), LoraConfig(rank=4, alpha=8.0), seed=0)
    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "adapter", dtype=dtype, task_type="CAUSAL_LM", base_model="some/model")
    assert_peft_agrees(lib, base, ids, tmp_path / "adapter", adapters, dtype)


def test_in_float32_the_logits_are_those_of_merged_weights(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path
) -> None:
    """As it is used, without float64: no further apart than two ways to round may be."""
    adapters = AdapterSet(shapes_of(base, PROJECTIONS), LoraConfig(rank=4, alpha=8.0), seed=0)
    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "adapter")
    merged = copy.deepcopy(base)
    for name, one in adapters.items():
        one.merge_into(merged.get_submodule(name).weight.numpy())
    got = logits(lib, loaded_by_peft(lib, base, tmp_path / "adapter"), ids)
    scale = np.abs(got).max()
    assert np.abs(got - logits(lib, merged, ids)).max() < 3e-6 * scale


@pytest.mark.parametrize("rslora", [(False,), (True,), (False, True, True)], ids=["no", "all", "some"])
@pytest.mark.parametrize("ends", [["q_proj", "v_proj"], PROJECTIONS], ids=len)
def test_mixed_ranks_and_scales_are_folded_rightly(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, ends: list[str], rslora: tuple[bool, ...]
) -> None:
    adapters = mixed_set(base, ends, rslora=rslora)
    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "adapter")
    assert_peft_agrees(lib, base, ids, tmp_path / "adapter", adapters)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("ends", [["q_proj", "v_proj"], PROJECTIONS], ids=len)
def test_patterns_mean_to_peft_what_they_mean_to_us(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, ends: list[str], rslora: bool, dtype: str
) -> None:
    adapters = mixed_set(base, ends, rslora=(rslora,))
    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "adapter", portable=False, dtype=dtype)
    assert_peft_agrees(lib, base, ids, tmp_path / "adapter", adapters, dtype)


@pytest.mark.parametrize("portable", [True, False])
def test_some_modules_of_some_layers(lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, portable: bool) -> None:
    """One end of a name in some layers only, and more than 20 names in full, which PEFT shortens by itself."""
    names = list(shapes_of(base, PROJECTIONS))
    for number, chosen in enumerate((names[1:], names[::2], names[7:], [names[-1], names[3], names[12]])):
        shapes = {name: shapes_of(base, PROJECTIONS)[name] for name in chosen}
        adapters = AdapterSet(shapes, LoraConfig(rank=3, alpha=6.0), seed=0)
        train(lib, base, ids, adapters)
        save_peft(adapters, tmp_path / str(number), portable=portable)
        assert_peft_agrees(lib, base, ids, tmp_path / str(number), adapters)


def test_the_loss_of_one_tensor_would_be_noticed(lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path) -> None:
    """PEFT drops a module that target_modules does not name, in silence: the checks of this file must see it."""
    adapters = AdapterSet(shapes_of(base, ["q_proj", "v_proj"]), LoraConfig(rank=2), seed=0)
    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"v_proj"', '"o_proj"'))
    with pytest.raises((AssertionError, UserWarning)):
        loaded_by_peft(lib, base, tmp_path / "adapter")


# ------------------------------------------------------------------ what PEFT writes


def written_by_peft(lib: SimpleNamespace, base: Any, path: Path, dtype: str = "float32", **options: Any) -> Any:
    """Save random adapters with PEFT; return its model, in float64."""
    lib.torch.manual_seed(3)
    config = lib.peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PEFT config's `base_model_name_or_path` was renamed")
        model = lib.peft.get_peft_model(copy.deepcopy(base), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = (0.1 * lib.torch.randn(parameter.shape)).to(getattr(lib.torch, dtype))
    model.save_pretrained(path, save_embedding_layers=False)
    return model.double()


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"task_type": "CAUSAL_LM", "lora_dropout": 0.25, "base_model_name_or_path": "some/model"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": PROJECTIONS,
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6, r"^model\.layers\.2\.mlp\.up_proj$": 1},
        "alpha_pattern": {"v_proj": 32, "0.self_attn.q_proj": 0.5},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 9}, "alpha_pattern": {"q_proj": 3}},
    "regular expression": {"target_modules": r".*layers\.[02]\..*\.(q_proj|down_proj)$"},
    "all-linear": {"target_modules": "all-linear"},
    "one name in full": {"target_modules": ["model.layers.1.mlp.up_proj"]},
    "first layers": {"layers_to_transform": [0, 1]},
    "last layers": {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "one layer": {"layers_to_transform": 2},
    "exclusion": {"target_modules": "all-linear", "exclude_modules": ["up_proj", "model.layers.0.self_attn.k_proj"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random B": {"init_lora_weights": False, "target_modules": r".*layers\.[01]\..*v_proj"},
}


@pytest.mark.parametrize("portable", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_adapters_of_peft_train_on_and_go_back(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, options: dict[str, Any], portable: bool
) -> None:
    theirs = written_by_peft(lib, base, tmp_path / "theirs", **options)
    adapters = load_peft(tmp_path / "theirs")
    layers = {name: module for name, module in theirs.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert set(adapters) == set(layers)
    for name, one in adapters.items():
        assert (one.scaling, one.rank) == (layers[name].scaling["default"], layers[name].r["default"])
        assert np.abs(one.delta_weight() - layers[name].get_delta_weight("default").detach().numpy()).max() < 1e-6
    assert np.abs(merged_logits(lib, base, ids, adapters) - logits(lib, theirs, ids)).max() < 1e-9

    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "ours", portable=portable)
    if options is OPTIONS["random B"]:  # a name's end means the third layer too, for which PEFT then misses tensors
        with pytest.warns(UserWarning, match="Found missing adapter keys"):
            model = lib.peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval().double()
        assert np.abs(logits(lib, model, ids) - merged_logits(lib, base, ids, adapters)).max() < LIMIT
    else:
        assert_peft_agrees(lib, base, ids, tmp_path / "ours", adapters)
    before, after = (lib.peft.PeftConfig.from_pretrained(tmp_path / which) for which in ("theirs", "ours"))
    for key in ("base_model_name_or_path", "task_type", "lora_dropout", "layers_pattern", "exclude_modules"):
        assert getattr(after, key) == getattr(before, key)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_adapters_of_peft_are_read_to_the_bit(
    lib: SimpleNamespace, base: Any, ids: Any, tmp_path: Path, dtype: str
) -> None:
    written_by_peft(lib, base, tmp_path / "theirs", dtype)
    adapters, tensors = load_peft(tmp_path / "theirs"), lib.load(tmp_path / "theirs" / TENSORS_NAME)
    for name, one in adapters.items():
        for part, matrix in (("A", one.a_matrix), ("B", one.b_matrix)):
            tensor = tensors[f"{PREFIX}{name}.lora_{part}.weight"]
            assert tensor.dtype == getattr(lib.torch, dtype)
            assert same_bits(matrix, tensor.float().numpy())
    save_peft(adapters, tmp_path / "same", dtype=dtype)
    same = lib.load(tmp_path / "same" / TENSORS_NAME)
    assert set(same) == set(tensors)
    assert all(lib.torch.equal(same[name], tensor) for name, tensor in tensors.items())
    train(lib, base, ids, adapters)
    save_peft(adapters, tmp_path / "ours", dtype=dtype)
    assert_peft_agrees(lib, base, ids, tmp_path / "ours", adapters, dtype)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora must not be set"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save must not be set"),
    "bias all": ({"bias": "all"}, "bias must not be set"),
    "bias lora_only": ({"bias": "lora_only"}, "bias must not be set"),
    "lora_bias": ({"lora_bias": True}, "lora_bias must not be set"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights must not be set"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights must not be set"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices must not be set"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens must not be"),
    "replication": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication must not be set"),
    "pattern": ({"rank_pattern": {"(q|v)_proj": 2}}, "rank_pattern must have names as keys, no regular expressions"),
    "embedding": ({"target_modules": ["embed_tokens"]}, r"a tensor's name must be .*lora_embedding_A"),
    "method": ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_what_peft_writes_and_we_do_not_compute_is_refused_by_name(
    lib: SimpleNamespace, base: Any, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if "peft_type" in options:
        config = lib.peft.LoHaConfig(r=2, target_modules=["q_proj"])
    else:
        config = lib.peft.LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]} | options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = lib.peft.get_peft_model(copy.deepcopy(base), config)
        model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    with pytest.raises(FormatError, match=re.escape(str(tmp_path / "theirs")) + f".*{message}"):
        load_peft(tmp_path / "theirs")


def test_an_output_layer_that_peft_saved_with_its_base_weight_is_refused_by_name(
    lib: SimpleNamespace, base: Any, tmp_path: Path
) -> None:
    """PEFT does so by default (save_embedding_layers="auto"): a whole weight, which no adapter of ours could hold."""
    model = lib.peft.get_peft_model(copy.deepcopy(base), lib.peft.LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        FormatError, match=r"a tensor's name must be .*, got 'base_model\.model\.lm_head\.base_layer\.weight'"
    ):
        load_peft(tmp_path / "theirs")


def test_every_variant_that_peft_knows_is_refused_or_known_to_be_harmless(lib: SimpleNamespace) -> None:
    """A key that a later PEFT adds must be looked at: this fails until it is."""
    from cylora.formats import peft_config

    harmless = {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out", "layers_pattern",
        "layers_to_transform", "megatron_core", "peft_version", "qalora_group_size", "revision", "task_type",
        "velora_config",
    }  # fmt: skip
    keys = lib.peft.LoraConfig().to_dict()
    unknown = [
        key
        for key in keys
        if key not in peft_config.OWN and key not in peft_config.NEUTRAL and not peft_config.VARIANT_KEY.fullmatch(key)
    ]
    assert set(unknown) <= harmless


# ------------------------------------------------------------------ D3: random exports there and back

TREE = {
    f"model.layers.{n}.{block}.{end}": shape
    for n in range(2)
    for block, end, shape in (
        ("self_attn", "q_proj", (5, 4)),
        ("self_attn", "v_proj", (5, 3)),
        ("mlp", "up-proj", (5, 7)),
        ("mlp", "down_proj", (7, 1)),
    )
} | {"head": (5, 9), "model.head": (4, 2)}
SPECIAL = np.array([0.0, -0.0, 1e-45, -1e-39, 6e-8, 1 / 3, 65504 / 4096, -1e-30], np.float32)


def tree(lib: SimpleNamespace) -> Any:
    root = lib.torch.nn.Module()
    for name, (d_in, d_out) in TREE.items():
        parent = root
        *parts, last = name.split(".")
        for part in parts:
            if part not in dict(parent.named_children()):
                parent.add_module(part, lib.torch.nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, lib.torch.nn.Linear(d_in, d_out, bias=False))
    return root


def random_export(rng: np.random.Generator) -> tuple[AdapterSet, dict[str, Any]]:
    names = list(rng.permutation(list(TREE))[: rng.integers(1, len(TREE) + 1)])
    portable = bool(rng.random() < 0.5)
    uniform, rslora = rng.random() < 0.4, bool(rng.random() < 0.3)

    def config() -> LoraConfig:
        rank, alpha = int(rng.integers(1, 7)), float(rng.choice([0.5, 1.0, 3.0, 8.0, 16.0]))
        return LoraConfig(rank=rank, alpha=alpha, use_rslora=bool(rng.random() < 0.3) if portable else rslora)

    common = config()
    adapters = AdapterSet.zeros({str(name): (*TREE[name], common if uniform else config()) for name in names})
    vector = adapters.flat.vector
    vector[...] = rng.normal(size=vector.size)
    places = rng.random(vector.size) < 0.1
    vector[places] = rng.choice(SPECIAL, int(places.sum()))
    return adapters, {"portable": portable, "dtype": str(rng.choice(list(ROUNDED)))}


@pytest.fixture
def no_model_card(lib: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep PEFT from writing its README.md, which takes longer than all the rest."""
    monkeypatch.setattr(lib.peft.PeftModel, "create_or_update_model_card", lambda *_: None)


def check_random_exports(lib: SimpleNamespace, folder: Path, seeds: range) -> None:
    """Each export through safetensors and PEFT's whole loader and writer, and back: equal to the bit."""
    root = tree(lib)
    n_unchanged = 0
    for seed in seeds:
        adapters, options = random_export(np.random.default_rng([seed, 3]))
        ours, theirs = folder / f"{seed}", folder / f"{seed}-theirs"
        save_peft(adapters, ours, **options)
        loaded = load_peft(ours)
        assert list(loaded) == list(adapters)
        # Through the reference library's torch side: the file holds what we read, and if unchanged what we had.
        tensors = lib.load(ours / TENSORS_NAME)
        dtype = getattr(lib.torch, options["dtype"])
        is_unchanged = not options["portable"] or len({one.config for one in adapters.values()}) == 1
        n_unchanged += is_unchanged
        assert len(tensors) == 2 * len(adapters)
        for name, one in adapters.items():
            for part, own, read in (
                ("A", one.a_matrix, loaded[name].a_matrix),
                ("B", one.b_matrix, loaded[name].b_matrix),
            ):
                tensor = tensors[f"{PREFIX}{name}.lora_{part}.weight"]
                assert tensor.dtype == dtype
                assert same_bits(tensor.float().numpy(), read)
                if is_unchanged:
                    assert same_bits(read, ROUNDED[options["dtype"]](own))
                    assert same_bits(tensor.view(lib.torch.uint8).numpy(), bits(own, options["dtype"]))
            if not is_unchanged and options["dtype"] == "float32":
                size = one.scaling * np.abs(one.b_matrix).astype(np.float64) @ np.abs(one.a_matrix)
                error = np.abs(exact_delta(loaded[name]) - exact_delta(one))
                assert np.all(error <= 2.0**-22 * size + 1e-37)
        # Into PEFT and out of it.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")
            model = lib.peft.PeftModel.from_pretrained(copy.deepcopy(root), ours, autocast_adapter_dtype=False)
        state = lib.peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        for name, tensor in tensors.items():
            assert same_bits(state[name].numpy(), tensor.float().numpy())  # PEFT widens to the base model's type
        for name, one in loaded.items():
            assert model.base_model.model.get_submodule(name).scaling["default"] == one.scaling
        if set(state) == set(tensors):
            model.save_pretrained(theirs, save_embedding_layers=False)
            back = load_peft(theirs)
            assert set(back) == set(loaded)
            for name, one in loaded.items():
                assert same_bits(back[name].flat.vector, one.flat.vector)
                assert back[name].scaling == one.scaling
        else:
            # target_modules is a list of ends: it may mean more modules than these, on which PEFT then has no effect.
            for name in set(state) - set(tensors):
                assert ".layers.1." in name or ".model.head." in name
                assert name.endswith(".lora_A.weight") or not state[name].any()
        for path in (ours, theirs):
            shutil.rmtree(path, ignore_errors=True)
    assert n_unchanged > len(seeds) // 3


def bits(matrix: np.ndarray, dtype: str) -> np.ndarray:
    kind = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    return matrix.astype(kind).view(np.uint8)


def exact_delta(one: LoraAdapter) -> np.ndarray:
    return one.scaling * one.b_matrix.astype(np.float64) @ one.a_matrix.astype(np.float64)


@pytest.mark.usefixtures("no_model_card")
def test_random_exports_come_back_to_the_bit(lib: SimpleNamespace, tmp_path: Path) -> None:
    check_random_exports(lib, tmp_path, range(50))


@pytest.mark.nightly
@pytest.mark.usefixtures("no_model_card")
def test_ten_thousand_random_exports_come_back_to_the_bit(lib: SimpleNamespace, tmp_path: Path) -> None:
    check_random_exports(lib, tmp_path, range(10_000))


def test_narrowed_rounds_as_torch_does(lib: SimpleNamespace) -> None:
    raw = np.random.default_rng(0).integers(0, 2**32, 400_000, dtype=np.uint32).view(np.float32)
    values = np.ascontiguousarray(raw[np.abs(raw) < 6e4].reshape(1, -1))
    for dtype in ("float16", "bfloat16"):
        rounded = lib.torch.from_numpy(values).to(getattr(lib.torch, dtype)).view(lib.torch.uint8).numpy()
        assert same_bits(narrowed("x", values, dtype).view(np.uint8), rounded)
