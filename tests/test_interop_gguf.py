"""Adapters trained by cylora, written as GGUF and run by llama.cpp itself, against the merged weights in transformers.

The base models have random weights and are converted here, with tables of their own: nothing is downloaded, and a
mistake in `cylora.formats.gguf` is not repeated. llama.cpp comes in the wheel xllamacpp. What only these tests need is
imported inside the functions, since every run collects this file.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import pytest

from cylora import AdapterSet, Gradients, LoraAdapter, LoraConfig, LoraTrainer, LoraTrainingConfig
from cylora.formats import gguf as written
from cylora.formats.gguf import save_gguf

pytestmark = pytest.mark.interop

VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 96, 64, 80, 2, 4, 2, 16
PROMPTS = ([5, 17, 33, 60, 8, 90, 41], [3, 3, 94, 20], [70, 11, 12, 13, 55, 6, 7, 88, 31, 29, 64])
# How far natural logarithms of probabilities may lie from float64's. Measured: 4e-6, float32's rounding; with Gemma's
# GELU 5e-3, since llama.cpp looks it up in a table of float16.
CLOSE = {"gemma": 2e-2, "gemma2": 2e-2, "gemma3_text": 2e-2}
CLOSE_OTHERWISE = 2e-5
# With 16-bit adapters, llama.cpp also rounds what it multiplies them with. In units of what the adapters change
# altogether: eight roundings. Measured: 1e-3 (with Gemma's table 2e-3) and 2e-2.
CLOSE_HALF = {"float16": 8 * 2.0**-11, "bfloat16": 8 * 2.0**-8}
FAR = 0.5  # a file in the wrong order of rows; measured: 1.7 and more

NAMES = {  # Hugging Face's names and llama.cpp's
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
FOUR_NORMS = NAMES | {  # gemma2, gemma3
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "attn_implementation": "eager",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
GEMMA2 = GEMMA | {"query_pre_attn_scalar": 32, "sliding_window": 64}
CLASSES = {  # in transformers: model, config, and what its config has besides
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"head_dim": 24}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA2),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA2),
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


class Base(NamedTuple):
    """A model in torch, the directory Hugging Face saves it in, and the same model in a GGUF file."""

    model: Any
    folder: Path
    path: Path


# ------------------------------------------------------------------ the base in GGUF


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put each head's rows 0, 1, 2, ... of first and second half in turns: what llama.cpp's rotary embedding pairs."""
    out = np.empty_like(rows)
    half = len(rows) // heads // 2
    for head in range(heads):
        for i in range(half):
            out[2 * (head * half + i)] = rows[2 * head * half + i]
            out[2 * (head * half + i) + 1] = rows[2 * head * half + half + i]
    return out


def gguf_name(name: str, names: Mapping[str, str]) -> str:
    if name in names:
        return names[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{names[module]}.{kind}"


def write_base(model: Any, family: str, path: Path) -> None:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or HEAD_DIM
    architecture = ARCHITECTURES.get(family, family)
    has_four_norms = architecture in ("gemma2", "gemma3")
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(10000.0)
    if has_four_norms:
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{number}" for number in range(3, VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if architecture == "llama" and "q_proj" in name:
            array = permuted(array, HEADS)
        if architecture == "llama" and "k_proj" in name:
            array = permuted(array, KV_HEADS)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        writer.add_tensor(gguf_name(name, FOUR_NORMS if has_four_norms else NAMES), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """Return a function that makes the base of a family, once."""
    import torch
    import transformers

    torch.set_num_threads(1)  # the models are so small that more threads only wait for each other
    made: dict[str, Base] = {}

    def make(family: str) -> Base:
        if family not in made:
            torch.manual_seed(0)
            model_class, config_class, besides = CLASSES[family]
            config = getattr(transformers, config_class)(**COMMON | besides)
            model = getattr(transformers, model_class)(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(mean=float(parameter.ndim == 1), std=0.15)
            model.requires_grad_(False)
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            write_base(model, family, folder / "base.gguf")
            made[family] = Base(model, folder, folder / "base.gguf")
        return made[family]

    return make


# ------------------------------------------------------------------ training by cylora, gradients by torch


def new_adapters(base: Base, configs: Mapping[str, LoraConfig]) -> AdapterSet:
    """Adapters for the linear layers whose last name is in ``configs``."""
    adapters = {}
    for name, module in base.model.named_modules():
        if config := configs.get(name.rpartition(".")[2]):
            adapters[name] = LoraAdapter(module.in_features, module.out_features, config, seed=len(adapters))
    return AdapterSet.from_adapters(adapters)


def train(base: Base, adapters: AdapterSet, n_steps: int = 8) -> tuple[float, float]:
    """Train with torch's gradients; return the first and the last loss."""
    import torch

    tensors, hooks = {}, []
    for name, adapter in adapters.items():
        a, b = torch.from_numpy(adapter.a_matrix), torch.from_numpy(adapter.b_matrix)  # the adapter's own memory
        a.requires_grad_()
        b.requires_grad_()
        tensors[name] = (a, b)

        def add(module: Any, inputs: Any, output: Any, a: Any = a, b: Any = b, s: float = adapter.scaling) -> Any:
            return output + s * (inputs[0] @ a.T) @ b.T

        hooks.append(base.model.get_submodule(name).register_forward_hook(add))
    tokens = torch.from_numpy(np.random.default_rng(5).integers(3, VOCABULARY, (4, 12)))
    trainer = LoraTrainer(
        LoraTrainingConfig(learning_rate=3e-2, warmup_steps=0, weight_decay=0.0, max_grad_norm=10.0, log_every=0)
    )
    gradients, losses = Gradients(adapters), []
    for _ in range(n_steps):
        loss = base.model(tokens, labels=tokens).loss
        loss.backward()
        for name, pair in tensors.items():
            for tensor, gradient in zip(pair, gradients[name], strict=True):
                gradient[...] = tensor.grad.numpy()
                tensor.grad = None
        losses.append(loss.item())
        trainer.step(losses[-1], adapters, gradients)
    for hook in hooks:
        hook.remove()
    return losses[0], losses[-1]


# ------------------------------------------------------------------ what the next token's probabilities are


def merged_log_probabilities(base: Base, adapters: Mapping[str, LoraAdapter]) -> list[np.ndarray]:
    """By transformers, with B @ A times its scale added to the weights, all in float64."""
    import torch

    model = type(base.model)(base.model.config).double().eval()
    model.load_state_dict(base.model.state_dict())
    with torch.no_grad():
        for name, adapter in adapters.items():
            delta = adapter.b_matrix.astype(float) @ adapter.a_matrix.astype(float)
            model.get_submodule(name).weight += torch.from_numpy(delta * adapter.config.scaling)
        return [torch.log_softmax(model(torch.tensor([p])).logits[0, -1], -1).numpy() for p in PROMPTS]


def served_log_probabilities(base: Base, lora: Path | None = None) -> list[np.ndarray]:
    """By llama.cpp, from the file."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(base.path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 128, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = params.ui = False
    params.verbosity = -1
    # Its defaults keep keys and values in float16, which hides differences below 1e-3.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if lora is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    server = xllamacpp.Server(params)
    found = []
    for prompt in PROMPTS:
        answer = server.handle_completions(
            {"prompt": prompt, "max_tokens": 1, "logprobs": VOCABULARY, "temperature": 0.0, "cache_prompt": False}
        )
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        row = np.full(VOCABULARY, np.nan)
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            row[entry["id"]] = entry["logprob"]
        assert not np.isnan(row).any()
        found.append(row)
    return found


def distance(one: list[np.ndarray], other: list[np.ndarray]) -> float:
    return max(float(abs(a - b).max()) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ tests

UNIFORM = dict.fromkeys(LoraConfig().target_modules, LoraConfig(rank=4, alpha=6.0))
MIXED = {  # three ranks, four scales, two of them rsLoRA's
    "q_proj": LoraConfig(rank=2, alpha=5.0),
    "k_proj": LoraConfig(rank=8, alpha=16.0, use_rslora=True),
    "o_proj": LoraConfig(rank=3, alpha=8.0),
    "down_proj": LoraConfig(rank=4, alpha=4.0, use_rslora=True),
}
RSLORA = dict.fromkeys(("q_proj", "v_proj", "up_proj"), LoraConfig(rank=6, alpha=3.0, use_rslora=True))
BaseOf = Callable[[str], Base]


@pytest.mark.parametrize("configs", [UNIFORM, MIXED, RSLORA], ids=["uniform", "mixed", "rslora"])
@pytest.mark.parametrize("family", CLASSES)
def test_llama_cpp_computes_what_the_merged_weights_do(
    base_of: BaseOf, family: str, configs: Mapping[str, LoraConfig], tmp_path: Path
) -> None:
    base = base_of(family)
    close = CLOSE.get(family, CLOSE_OTHERWISE)
    without = merged_log_probabilities(base, {})
    assert distance(served_log_probabilities(base), without) < close, "the base itself"
    adapters = new_adapters(base, configs)
    assert len(adapters) == LAYERS * len(configs)
    first, last = train(base, adapters)
    assert last < first - 2, "cylora has trained"
    expected = merged_log_probabilities(base, adapters)
    effect = distance(expected, without)
    assert effect > 1

    save_gguf(adapters, tmp_path / "adapter.gguf", base.folder)
    assert distance(served_log_probabilities(base, tmp_path / "adapter.gguf"), expected) < close
    for dtype, part in CLOSE_HALF.items():
        save_gguf(adapters, tmp_path / dtype, base.folder, dtype=dtype)
        assert distance(served_log_probabilities(base, tmp_path / dtype), expected) < part * effect + close, dtype


@pytest.mark.parametrize("family", CLASSES)
def test_rows_in_the_wrong_order_would_be_seen(
    base_of: BaseOf, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama's rows left as they are, or another family's reordered: llama.cpp loads it, and the numbers are wrong."""
    base = base_of(family)
    adapters = new_adapters(base, UNIFORM)
    train(base, adapters)
    rules = written.FAMILIES[family]
    monkeypatch.setitem(written.FAMILIES, family, rules._replace(permutes=not rules.permutes))
    save_gguf(adapters, tmp_path / "adapter.gguf", base.folder)
    served = served_log_probabilities(base, tmp_path / "adapter.gguf")
    assert distance(served, merged_log_probabilities(base, adapters)) > FAR


def test_a_scale_off_by_a_thousandth_would_be_seen(base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama")
    adapters = new_adapters(base, UNIFORM)
    train(base, adapters)
    expected = merged_log_probabilities(base, adapters)
    other = AdapterSet.zeros({n: (a.d_in, a.d_out, LoraConfig(rank=4, alpha=6.006)) for n, a in adapters.items()})
    other.flat.vector[...] = adapters.flat.vector
    save_gguf(other, tmp_path / "adapter.gguf", base.folder)
    assert distance(served_log_probabilities(base, tmp_path / "adapter.gguf"), expected) > 10 * CLOSE_OTHERWISE


def test_an_adapter_of_the_output_layer_is_applied(base_of: BaseOf, tmp_path: Path) -> None:
    base = base_of("llama")
    adapters = new_adapters(base, {"lm_head": LoraConfig(rank=3, alpha=6.0)})
    train(base, adapters)
    expected = merged_log_probabilities(base, adapters)
    assert distance(expected, merged_log_probabilities(base, {})) > 0.1
    save_gguf(adapters, tmp_path / "adapter.gguf", base.folder)
    assert distance(served_log_probabilities(base, tmp_path / "adapter.gguf"), expected) < CLOSE_OTHERWISE
