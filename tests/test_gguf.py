"""save_gguf: what the gguf package reads back, the order of rows, and what is refused before anything is written.

That llama.cpp computes the right numbers from such files is test_interop_gguf.py's to show.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from training import same_bits

from cylora import AdapterSet, ConfigError, FormatError, InputError, LoraAdapter, LoraConfig
from cylora.formats.gguf import FAMILIES, gguf_bytes, save_gguf

SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 50,
}
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **SIZES}
Q, K, V, OUT = (f"model.layers.1.self_attn.{side}_proj" for side in "qkvo")
GATE, UP, DOWN = (f"model.layers.0.mlp.{side}_proj" for side in ("gate", "up", "down"))
SHAPES = {Q: (24, 32), K: (24, 16), V: (24, 16), OUT: (32, 24), GATE: (24, 40), UP: (24, 40), DOWN: (40, 24)}
TENSORS = {
    Q: "blk.1.attn_q.weight",
    K: "blk.1.attn_k.weight",
    V: "blk.1.attn_v.weight",
    OUT: "blk.1.attn_output.weight",
    GATE: "blk.0.ffn_gate.weight",
    UP: "blk.0.ffn_up.weight",
    DOWN: "blk.0.ffn_down.weight",
}
CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("llama", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
}


def make(shapes: Mapping[str, tuple[int, int]] = SHAPES, **config: Any) -> AdapterSet:
    adapters = AdapterSet(shapes, LoraConfig(**{"rank": 3, "alpha": 6.0} | config), seed=0)
    adapters.flat.vector[...] = np.random.default_rng(1).normal(size=adapters.param_count())
    return adapters


def without(config: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def read_back(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys and tensors as the gguf package reads them."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {}
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            array = tensor.data.view(ml_dtypes.bfloat16)
        else:
            array = tensor.data
        assert list(array.shape) == [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = np.array(array)
    return keys, tensors


def place_of(row: int, head_dim: int) -> int:
    """Where llama.cpp keeps a row of q_proj or k_proj: halves of a head, one after the other, become neighbours."""
    head, within = divmod(row, head_dim)
    half, pair = divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + half


def reordered(b_matrix: np.ndarray, head_dim: int) -> np.ndarray:
    out = np.full_like(b_matrix, np.nan)
    for row, values in enumerate(b_matrix):
        out[place_of(row, head_dim)] = values
    return out


# ------------------------------------------------------------------ what is written


@pytest.mark.parametrize("family", CLASSES)
def test_a_file_holds_the_weights_under_the_bases_names(family: str, tmp_path: Path) -> None:
    architecture, model_class = CLASSES[family]
    adapters = make()
    config = {"model_type": family, "architectures": [model_class], **SIZES}
    save_gguf(adapters, tmp_path / "adapter.gguf", config)
    keys, tensors = read_back(tmp_path / "adapter.gguf")
    assert {key: value for key, value in keys.items() if not key.startswith("GGUF.")} == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
        "general.file_type": 0,
    }
    assert set(tensors) == {f"{name}.{side}" for name in TENSORS.values() for side in ("lora_a", "lora_b")}
    for name, adapter in adapters.items():
        assert same_bits(tensors[f"{TENSORS[name]}.lora_a"], adapter.a_matrix)
        b_matrix = adapter.b_matrix
        if architecture == "llama" and name in (Q, K):
            b_matrix = reordered(b_matrix, 8)
            assert not same_bits(b_matrix, adapter.b_matrix)
        assert same_bits(tensors[f"{TENSORS[name]}.lora_b"], b_matrix)


def test_every_family_is_tested() -> None:
    assert {name: rules[:2] for name, rules in FAMILIES.items()} == CLASSES


@pytest.mark.parametrize(
    ("dtype", "kind", "file_type"), [("float16", np.float16, 1), ("bfloat16", ml_dtypes.bfloat16, 32)]
)
def test_16_bit_types_are_rounded_to_nearest(dtype: str, kind: Any, file_type: int, tmp_path: Path) -> None:
    adapters = make()
    save_gguf(adapters, tmp_path / "adapter.gguf", LLAMA, dtype=dtype)
    keys, tensors = read_back(tmp_path / "adapter.gguf")
    assert keys["general.file_type"] == file_type
    for name, adapter in adapters.items():
        b_matrix = reordered(adapter.b_matrix, 8) if name in (Q, K) else adapter.b_matrix
        assert same_bits(tensors[f"{TENSORS[name]}.lora_a"], adapter.a_matrix.astype(kind))
        assert same_bits(tensors[f"{TENSORS[name]}.lora_b"], b_matrix.astype(kind))


def test_mixed_ranks_and_scales_become_one(tmp_path: Path) -> None:
    configs = {
        Q: LoraConfig(rank=2, alpha=5.0),
        K: LoraConfig(rank=4, alpha=3.0, use_rslora=True),
        UP: LoraConfig(rank=3, alpha=8.0),
    }
    adapters = AdapterSet.from_adapters({n: LoraAdapter(*SHAPES[n], config, seed=2) for n, config in configs.items()})
    adapters.flat.vector[...] = np.random.default_rng(4).normal(size=adapters.param_count())
    save_gguf(adapters, tmp_path / "adapter.gguf", LLAMA)
    keys, tensors = read_back(tmp_path / "adapter.gguf")
    for name, adapter in adapters.items():
        a_matrix, b_matrix = (tensors[f"{TENSORS[name]}.lora_{side}"].astype(np.float64) for side in "ab")
        assert len(a_matrix) == 4
        expected = adapter.b_matrix.astype(np.float64) @ adapter.a_matrix * adapter.scaling
        if name in (Q, K):
            expected = reordered(expected, 8)
        assert np.allclose(keys["adapter.lora.alpha"] / 4 * (b_matrix @ a_matrix), expected, rtol=1e-6, atol=1e-6)


def test_rslora_is_written_as_a_larger_alpha(tmp_path: Path) -> None:
    save_gguf(make(rank=4, alpha=6.0, use_rslora=True), tmp_path / "adapter.gguf", LLAMA)
    assert read_back(tmp_path / "adapter.gguf")[0]["adapter.lora.alpha"] == 12.0


def test_equal_adapters_make_equal_bytes(tmp_path: Path) -> None:
    """Whatever their order in the set, and the file is what `gguf_bytes` returns."""
    adapters = make()
    backwards = AdapterSet.from_adapters({name: adapters[name] for name in reversed(list(adapters))})
    one, other = gguf_bytes(adapters, LLAMA), gguf_bytes(backwards, LLAMA)
    assert one == other
    save_gguf(adapters, tmp_path / "adapter.gguf", LLAMA)
    assert (tmp_path / "adapter.gguf").read_bytes() == one
    assert os.listdir(tmp_path) == ["adapter.gguf"]


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gguf_bytes(make(), LLAMA)
    assert not os.listdir(tmp_path)


def test_the_adapters_are_not_written_to() -> None:
    adapters = make()
    before = hashlib.sha256(adapters.flat.vector.tobytes()).digest()
    gguf_bytes(adapters, LLAMA, dtype="bfloat16")
    assert hashlib.sha256(adapters.flat.vector.tobytes()).digest() == before


def test_an_adapter_of_the_output_layer_has_its_tensor(tmp_path: Path) -> None:
    adapters = make({"lm_head": (24, 50)})
    save_gguf(adapters, tmp_path / "adapter.gguf", LLAMA)
    assert set(read_back(tmp_path / "adapter.gguf")[1]) == {"output.weight.lora_a", "output.weight.lora_b"}


# ------------------------------------------------------------------ the base's config


def test_the_config_may_be_a_file_a_directory_or_a_link(tmp_path: Path) -> None:
    """Hugging Face's cache is made of links."""
    adapters = make()
    expected = gguf_bytes(adapters, LLAMA)
    (tmp_path / "blob").write_text("\n" + json.dumps(LLAMA))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").symlink_to(tmp_path / "blob")
    for place in (tmp_path / "blob", str(tmp_path / "blob"), model, str(model), model / "config.json"):
        assert gguf_bytes(adapters, place) == expected


@pytest.mark.parametrize("family", CLASSES)
def test_sizes_the_config_leaves_out_are_not_checked(family: str) -> None:
    """But for what the order of rows depends on."""
    needed = {"num_attention_heads", "num_key_value_heads", "head_dim"} if FAMILIES[family].permutes else set()
    config = {"model_type": family, **{k: v for k, v in SIZES.items() if k in needed | {"num_hidden_layers"}}}
    other = {name: (d_in, d_out) for name, (d_in, d_out) in SHAPES.items() if not needed or name in (GATE, UP, DOWN)}
    assert gguf_bytes(make({name: (d_in + 1, d_out + 1) for name, (d_in, d_out) in other.items()}), config)


@pytest.mark.parametrize(
    ("config", "d_out"),
    [
        (LLAMA, 32),
        (without(LLAMA, "head_dim"), 24),  # hidden_size / heads
        (LLAMA | {"head_dim": None}, 24),
        ({"model_type": "qwen2", **without(SIZES, "head_dim")}, 24),
        ({"model_type": "qwen3", **without(SIZES, "head_dim")}, 4 * 128),
        ({"model_type": "gemma", **without(SIZES, "head_dim")}, 4 * 256),
        ({"model_type": "gemma2", **without(SIZES, "head_dim")}, 4 * 256),
        ({"model_type": "gemma3_text", **without(SIZES, "head_dim")}, 4 * 256),
    ],
)
def test_the_width_of_a_head_has_each_familys_default(config: dict[str, Any], d_out: int) -> None:
    assert gguf_bytes(make({Q: (24, d_out)}), config)
    message = rf"{Q}: d_out must be the base's num_attention_heads \* head_dim, {d_out}, got {d_out + 4}"
    with pytest.raises(InputError, match=message):
        gguf_bytes(make({Q: (24, d_out + 4)}), config)


def test_llama_without_grouped_heads_has_as_many_for_keys() -> None:
    adapters = make({K: (24, 32)})
    expected = gguf_bytes(adapters, LLAMA | {"num_key_value_heads": 4})
    assert gguf_bytes(adapters, without(LLAMA, "num_key_value_heads")) == expected
    assert gguf_bytes(adapters, LLAMA | {"num_key_value_heads": None}) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "base_config: model_type must be one of llama, mistral, qwen2, .*, got None"),
        ({"model_type": "mixtral"}, "model_type must be one of .*, got 'mixtral'"),
        ({"model_type": ["llama"]}, r"model_type must be one of .*, got \['llama'\]"),
        (
            LLAMA | {"architectures": ["LlamaModel"]},
            r"architectures must be \['LlamaForCausalLM'\], got \['LlamaModel'\]",
        ),
        (LLAMA | {"architectures": []}, r"architectures must be \['LlamaForCausalLM'\], got \[\]"),
        (  # EmbeddingGemma: an architecture of its own
            {"model_type": "gemma3_text", "architectures": ["Gemma3TextModel"], **SIZES},
            r"architectures must be \['Gemma3ForCausalLM'\], got \['Gemma3TextModel'\]",
        ),
        (LLAMA | {"num_local_experts": 8}, "num_local_experts must be absent, null or 0 for model_type llama, got 8"),
        (LLAMA | {"num_experts": 4}, "num_experts must be absent, null or 0"),
        (LLAMA | {"draft_vocab_size": 99}, "draft_vocab_size must be absent, null or 0"),
        (without(LLAMA, "num_hidden_layers"), "base_config: num_hidden_layers must be given, got none"),
        (LLAMA | {"num_hidden_layers": 0}, r"num_hidden_layers must be an integer in \[1, 1000\], got 0"),
        (LLAMA | {"num_hidden_layers": 1001}, r"num_hidden_layers must be an integer in \[1, 1000\], got 1001"),
        (LLAMA | {"head_dim": 2**31 + 1}, r"head_dim must be an integer in \[1, 2147483648\], got 2147483649"),
        (LLAMA | {"hidden_size": 24.0}, "base_config: hidden_size must be an integer, got 24.0"),
        (LLAMA | {"vocab_size": True}, "base_config: vocab_size must be an integer, got True"),
        (without(LLAMA, "num_attention_heads"), "must be given for model_type llama, got None, 2 and 8"),
        (without(LLAMA, "hidden_size", "head_dim"), "must be given for model_type llama, got 4, 2 and None"),
        (LLAMA | {"head_dim": 7}, "an even head_dim must be given for model_type llama, got 4, 2 and 7"),
        (
            without(LLAMA, "num_key_value_heads") | {"model_type": "mistral", "architectures": None},
            "num_key_value_heads and an even head_dim must be given for model_type mistral, got 4, None and 8",
        ),
    ],
)
def test_a_base_that_is_not_understood_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter.gguf").write_bytes(b"old")
    with pytest.raises(InputError, match=message):
        save_gguf(make(), tmp_path / "adapter.gguf", config)
    assert (tmp_path / "adapter.gguf").read_bytes() == b"old"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=message.replace("base_config", "config.json")):
        gguf_bytes(make(), path)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('{"model_type": "llama", "model_type": "qwen2"}', FormatError, "config.json: a key must not be repeated"),
        ("{", FormatError, "config.json: the text must be JSON"),
        (" " * (8 * 2**20 + 1), FormatError, "config.json: must have at most 8388608 bytes, got more"),
        ("[]", InputError, "config.json: the config must be an object, got list"),
    ],
)
def test_a_config_that_is_no_strict_json_is_refused(
    text: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(error, match=message):
        gguf_bytes(make(), tmp_path)


def test_a_config_that_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(FormatError, match=r"config.json: must be a regular file, got a directory, pipe or device"):
        gguf_bytes(make(), tmp_path)
    with pytest.raises(FileNotFoundError):
        gguf_bytes(make(), tmp_path / "absent.json")
    with pytest.raises(InputError, match="base_config must be a mapping or a path, got int"):
        gguf_bytes(make(), 3)  # type: ignore[arg-type]


# ------------------------------------------------------------------ adapters that do not fit


@pytest.mark.parametrize(
    "name",
    [
        "q_proj",
        "layers.0.self_attn.q_proj",
        "base_model.model.model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.0.self_attn",
        "model.layers.00.self_attn.q_proj",
        "model.layers.-1.self_attn.q_proj",
        "model.layers.0.input_layernorm",
        "model.layers.0.self_attn.q_proj\n",
        "model.embed_tokens",
        "model.lm_head",
    ],
)
def test_an_unknown_module_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"an adapter must be named model.layers.<n>.<one of .*> or lm_head") as caught:
        gguf_bytes(make({name: (24, 32)}), LLAMA)
    assert str(caught.value).endswith(f", got {name!r}")


def test_a_layer_the_base_does_not_have_is_refused() -> None:
    name = "model.layers.2.mlp.up_proj"
    with pytest.raises(InputError, match=f"{name}: the layer must be below num_hidden_layers, 2, got 2"):
        gguf_bytes(make({name: (24, 40)}), LLAMA)


@pytest.mark.parametrize("name", [*SHAPES, "lm_head"])
@pytest.mark.parametrize("side", [0, 1])
def test_a_layer_of_another_shape_is_refused(name: str, side: int) -> None:
    meanings = {24: "hidden_size", 32: r"num_attention_heads \* head_dim", 16: r"num_key_value_heads \* head_dim"}
    meanings |= {40: "intermediate_size", 50: "vocab_size"}
    right = (SHAPES | {"lm_head": (24, 50)})[name]
    wrong = tuple(size + 8 * (place == side) for place, size in enumerate(right))
    rule = f"must be the base's {meanings[right[side]]}, {right[side]}, got {wrong[side]}"
    with pytest.raises(InputError, match=f"{name}: {('d_in', 'd_out')[side]} {rule}"):
        gguf_bytes(make({name: wrong}), LLAMA)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA | {"tie_word_embeddings": True},
        {"model_type": "gemma", **SIZES},
        {"model_type": "gemma2", **SIZES},
        {"model_type": "gemma3_text", **SIZES},
    ],
)
def test_an_output_layer_that_is_the_embedding_takes_no_adapter(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="lm_head must have no adapter: this base's output layer is its embedding"):
        gguf_bytes(make({"lm_head": (24, 50)}), config)


def test_non_finite_weights_are_refused() -> None:
    adapters = make()
    adapters[DOWN].a_matrix[1, 2] = np.nan
    with pytest.raises(InputError, match=rf"{DOWN}.A must be finite, got nan at \[1, 2\]"):
        gguf_bytes(adapters, LLAMA)


def test_adapters_without_names_are_refused() -> None:
    with pytest.raises(InputError, match="adapters must be an AdapterSet, which names the modules, got LoraAdapter"):
        gguf_bytes(LoraAdapter(4, 4, seed=0), LLAMA)


@pytest.mark.parametrize("side", ["a_matrix", "b_matrix"])
def test_weights_beyond_float16_are_refused(side: str, tmp_path: Path) -> None:
    adapters = make()
    getattr(adapters[UP], side)[2, 1] = 1e5
    with pytest.raises(InputError, match=rf"{UP}.{side} must fit float16, got 100000.0 at \[2, 1\]"):
        save_gguf(adapters, tmp_path / "adapter.gguf", LLAMA, dtype="float16")
    assert not os.listdir(tmp_path)
    gguf_bytes(adapters, LLAMA, dtype="bfloat16")


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="dtype must be one of 'float32', 'float16', 'bfloat16', got 'q8_0'"):
        gguf_bytes(make(), LLAMA, dtype="q8_0")


def test_an_alpha_that_float32_rounds_to_zero_is_refused(tmp_path: Path) -> None:
    """llama.cpp would not scale at all."""
    with pytest.raises(InputError, match=r"the common alpha must be at least 1.17549e-38 in a GGUF file, got 1e-39"):
        gguf_bytes(make(alpha=1e-39), LLAMA)
    save_gguf(make(alpha=2.0**-126), tmp_path / "adapter.gguf", LLAMA)
    assert read_back(tmp_path / "adapter.gguf")[0]["adapter.lora.alpha"] == 2.0**-126


# ------------------------------------------------------------------ the package gguf


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"needs the package gguf: pip install 'cylora\[gguf\]', got .*gguf"):
        save_gguf(make(), tmp_path / "adapter.gguf", LLAMA)
    assert not os.listdir(tmp_path)


def test_a_tensor_the_package_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor is anything left of the file begun."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *_: gguf.TensorNameMap(gguf.MODEL_ARCH.BERT, 0))
    with pytest.raises(InputError, match=f"{DOWN} must have a tensor in GGUF's llama, got none"):
        gguf_bytes(make(), LLAMA)
    assert not os.listdir(tmp_path)
