"""Write a GGUF LoRA adapter, the file that llama.cpp and what is built on it load beside a base model.

(a) Which tensor an adapter belongs to, and in which order its rows are, depends on the base model. For Llama and
    Mistral the base's converter reorders the rows of q_proj and k_proj, because its rotary embedding pairs neighbours
    where Hugging Face pairs halves; B needs the same, and loads without complaint when it is not done. So the base's
    config.json is asked for, and a family whose rules are not written down here is refused.
(b) The file has one alpha for all and each tensor its rank; `cylora.formats.portable` sees to the rest.
(c) llama.cpp takes an alpha of 0 to mean "do not scale", so an alpha that float32 would round to 0 is refused.

The facts are those of llama.cpp's converters (conversion/*.py, convert_lora_to_gguf.py) and src/llama-adapter.cpp.
"""

import importlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cylora import checks
from cylora.adapter import AdapterSet, LoraAdapter
from cylora.errors import InputError
from cylora.formats import durable, portable, strict_json
from cylora.formats.container import read_regular
from cylora.formats.weights import check_finite, narrowed

__all__ = ["FAMILIES", "BaseConfig", "BaseModel", "Family", "gguf_bytes", "save_gguf"]

MAX_LAYERS = 1000  # the package makes a table of some 270 names for each
MIN_ALPHA = float(np.finfo(np.float32).tiny)
MODULE = re.compile(r"model\.layers\.(?P<layer>0|[1-9][0-9]{0,8})\.(?P<kind>[a-z_]+\.[a-z_]+)")
# Input and output of each linear layer, in the words of BaseModel.sizes.
LAYERS = {
    "self_attn.q_proj": ("hidden_size", "num_attention_heads * head_dim"),
    "self_attn.k_proj": ("hidden_size", "num_key_value_heads * head_dim"),
    "self_attn.v_proj": ("hidden_size", "num_key_value_heads * head_dim"),
    "self_attn.o_proj": ("num_attention_heads * head_dim", "hidden_size"),
    "mlp.gate_proj": ("hidden_size", "intermediate_size"),
    "mlp.up_proj": ("hidden_size", "intermediate_size"),
    "mlp.down_proj": ("intermediate_size", "hidden_size"),
}
HEAD = ("hidden_size", "vocab_size")
OTHER_TENSORS = ("num_local_experts", "num_experts", "draft_vocab_size")  # what makes another architecture of a family


class Family(NamedTuple):
    """How llama.cpp names and stores the models of one ``model_type``."""

    architecture: str  # GGUF's name
    model_class: str  # Hugging Face's; others of the same model_type are stored otherwise
    permutes: bool = False
    head_dim: int | None = None  # where the config has none; None is hidden_size / num_attention_heads
    has_head: bool = True  # whether there can be a tensor for lm_head


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", permutes=True),
    "mistral": Family("llama", "MistralForCausalLM", permutes=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", head_dim=128),
    "gemma": Family("gemma", "GemmaForCausalLM", head_dim=256, has_head=False),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", head_dim=256, has_head=False),
    "gemma3_text": Family("gemma3", "Gemma3ForCausalLM", head_dim=256, has_head=False),
}
BaseConfig = Mapping[str, Any] | str | os.PathLike[str]


def save_gguf(
    adapters: AdapterSet,
    path: str | os.PathLike[str],
    base_config: BaseConfig,
    *,
    dtype: str = "float32",
) -> None:
    """Write ``adapters`` to the GGUF file ``path``, atomically and durably.

    Parameters
    ----------
    adapters : AdapterSet, read only; at least one, finite, named as the base's modules: "model.layers.0.mlp.up_proj".
    path : the file to create or replace.
    base_config : mapping or path
        What the base model's config.json says, or that file, or the directory that holds it.
    dtype : "float32", "float16" or "bfloat16"

    Raises
    ------
    InputError    If an argument breaks its rule, an adapter does not fit the base, or the package gguf is missing.
    FormatError   If the config is no regular file of strict JSON.
    OSError       If a file cannot be read or written. The old file at ``path``, if any, is untouched.

    Notes
    -----
    While another thread steps these adapters, use ``trainer.hold(adapters, lambda _: ...)`` around the call, which
    keeps steps away meanwhile: else half a step would be written.
    """
    durable.replace_file(path, gguf_bytes(adapters, base_config, dtype=dtype))


def gguf_bytes(adapters: AdapterSet, base_config: "BaseConfig | BaseModel", *, dtype: str = "float32") -> bytes:
    """Return the file that `save_gguf` writes; equal arguments give equal bytes."""
    if not isinstance(adapters, AdapterSet):
        raise InputError(f"adapters must be an AdapterSet, which names the modules, got {type(adapters).__name__}")
    check_finite(adapters)
    base = base_config if isinstance(base_config, BaseModel) else BaseModel(base_config)
    for name, adapter in adapters.items():
        base.check(name, adapter)
    folded = portable.fold(adapters)
    if folded.alpha < MIN_ALPHA:
        raise InputError(f"the common alpha must be at least {MIN_ALPHA:g} in a GGUF file, got {folded.alpha:g}")
    tensors = {}
    for name, (a_matrix, b_matrix) in folded.tensors.items():
        b_rows = base.ordered(name, b_matrix)
        tensors[name] = (
            narrowed(f"{name}.a_matrix", a_matrix, dtype),
            narrowed(f"{name}.b_matrix", b_rows, dtype),
        )
    return _file(base, folded.alpha, tensors, dtype)


# ------------------------------------------------------------------ the base model


class BaseModel:
    """What the config of a base model says about its tensors: for those who write several adapters of one base."""

    def __init__(self, base_config: BaseConfig) -> None:
        self._config, self._place = _read(base_config)
        kind = self._config.get("model_type")
        if not isinstance(kind, str) or kind not in FAMILIES:
            raise InputError(f"{self._place}: model_type must be one of {', '.join(FAMILIES)}, got {kind!r}")
        self.family = FAMILIES[kind]
        classes = self._config.get("architectures")
        if classes not in (None, [self.family.model_class]):
            raise InputError(f"{self._place}: architectures must be [{self.family.model_class!r}], got {classes!r}")
        for key in OTHER_TENSORS:
            if self._config.get(key):
                got = self._config[key]
                raise InputError(f"{self._place}: {key} must be absent, null or 0 for model_type {kind}, got {got!r}")
        layers = self._size("num_hidden_layers", MAX_LAYERS)
        heads = self._size("num_attention_heads")
        kv_heads = self._size("num_key_value_heads")
        if kv_heads is None and kind == "llama":  # the others' default is a number, which their files state
            kv_heads = heads
        hidden = self._size("hidden_size")
        head_dim = self._size("head_dim") or self.family.head_dim
        if head_dim is None and hidden and heads:
            head_dim = hidden // heads
        if layers is None:
            raise InputError(f"{self._place}: num_hidden_layers must be given, got none")
        if self.family.permutes and (heads is None or kv_heads is None or head_dim is None or head_dim % 2):
            got = f"got {heads}, {kv_heads} and {head_dim}"
            rule = "num_attention_heads, num_key_value_heads and an even head_dim must be given"
            raise InputError(f"{self._place}: {rule} for model_type {kind}, {got}")
        self.n_layers = layers
        self._heads = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads} if self.family.permutes else {}
        self._sizes = {
            "hidden_size": hidden,
            "intermediate_size": self._size("intermediate_size"),
            "vocab_size": self._size("vocab_size"),
            "num_attention_heads * head_dim": heads and head_dim and heads * head_dim,
            "num_key_value_heads * head_dim": kv_heads and head_dim and kv_heads * head_dim,
        }

    def _size(self, key: str, maximum: int = 2**31) -> int | None:
        value = self._config.get(key)
        return None if value is None else checks.integer(f"{self._place}: {key}", value, 1, maximum, InputError)

    def check(self, name: str, adapter: LoraAdapter) -> None:
        """Raise InputError if the base has no such linear layer, or one of another shape."""
        match = MODULE.fullmatch(name)
        if name == "lm_head":
            if not self.family.has_head or self._config.get("tie_word_embeddings"):
                raise InputError("lm_head must have no adapter: this base's output layer is its embedding, got one")
            sides = HEAD
        elif match and match["kind"] in LAYERS:
            if int(match["layer"]) >= self.n_layers:
                raise InputError(f"{name}: the layer must be below num_hidden_layers, {self.n_layers}, got {match[1]}")
            sides = LAYERS[match["kind"]]
        else:
            rule = f"model.layers.<n>.<one of {', '.join(LAYERS)}> or lm_head"
            raise InputError(f"an adapter must be named {rule}, got {name!r}")
        for field, size, meaning in zip(("d_in", "d_out"), (adapter.d_in, adapter.d_out), sides, strict=True):
            stated = self._sizes[meaning]
            if stated is not None and size != stated:
                raise InputError(f"{name}: {field} must be the base's {meaning}, {stated}, got {size}")

    def ordered(self, name: str, b_matrix: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the rows of B in the order that llama.cpp keeps this layer's rows in."""
        heads = self._heads.get(name.partition(".layers.")[2].partition(".")[2])
        if heads is None:
            return b_matrix
        d_out, rank = b_matrix.shape
        return b_matrix.reshape(heads, 2, d_out // heads // 2, rank).swapaxes(1, 2).reshape(d_out, rank)


def _read(base_config: BaseConfig) -> tuple[Mapping[str, Any], str]:
    """Return the config and how messages about it begin."""
    if isinstance(base_config, Mapping):
        return base_config, "base_config"
    if not isinstance(base_config, (str, os.PathLike)):
        raise InputError(f"base_config must be a mapping or a path, got {type(base_config).__name__}")
    path = Path(base_config)
    if path.is_dir():
        path /= "config.json"
    # Hugging Face's cache holds links to the files, so links are followed here.
    config = strict_json.parse(read_regular(os.path.realpath(path), strict_json.MAX_BYTES), str(path))
    if not isinstance(config, dict):
        raise InputError(f"{path}: the config must be an object, got {type(config).__name__}")
    return config, str(path)


# ------------------------------------------------------------------ the file


def _file(base: BaseModel, alpha: float, tensors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], dtype: str) -> bytes:
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError as error:
        raise InputError(f"a GGUF file needs the package gguf: pip install 'cylora[gguf]', got {error}") from None
    file_type, tensor_type = {
        "float32": (gguf.LlamaFileType.ALL_F32, gguf.GGMLQuantizationType.F32),
        "float16": (gguf.LlamaFileType.MOSTLY_F16, gguf.GGMLQuantizationType.F16),
        "bfloat16": (gguf.LlamaFileType.MOSTLY_BF16, gguf.GGMLQuantizationType.BF16),
    }[dtype]
    architecture = base.family.architecture
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], base.n_layers)
    with tempfile.TemporaryDirectory() as folder:  # the writer takes a path and nothing else
        path = Path(folder) / "adapter.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
            writer.add_file_type(file_type)
            for name in sorted(tensors):
                place = names.get_name(f"{name}.weight", try_suffixes=(".weight",))
                if place is None:
                    raise InputError(f"{name} must have a tensor in GGUF's {architecture}, got none")
                for suffix, matrix in zip(("lora_a", "lora_b"), tensors[name], strict=True):
                    writer.add_tensor(f"{place}.{suffix}", matrix, raw_dtype=tensor_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        return path.read_bytes()
