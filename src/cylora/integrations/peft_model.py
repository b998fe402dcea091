"""The LoRA matrices of a PEFT model as an `AdapterSet`: the same memory, seen by both."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from cylora.adapter import AdapterSet, Gradients
from cylora.config import LoraConfig
from cylora.errors import ConfigError, FormatError, InputError
from cylora.flat import FloatArray
from cylora.formats.peft_config import parse_config
from cylora.integrations.tensors import check_parameters

__all__ = ["wrap_peft_gradients", "wrap_peft_model"]

PREFIX = "base_model.model."  # before a module's own name, where the model is a PeftModel


class Pair(NamedTuple):
    """What one adapted module has of one adapter; ``full_name`` is the module's in the PEFT model."""

    full_name: str
    a: torch.Tensor
    b: torch.Tensor
    config: LoraConfig

    def parameters(self, adapter_name: str) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield A and B by their names in the PEFT model."""
        yield f"{self.full_name}.lora_A.{adapter_name}.weight", self.a
        yield f"{self.full_name}.lora_B.{adapter_name}.weight", self.b


def wrap_peft_model(model: Any, adapter_name: str = "default") -> AdapterSet:
    """Return the LoRA matrices of a PEFT model as an AdapterSet that shares their memory.

    An AdapterSet is one flat vector, so the matrices move there, once: the values stay, and so do the model's Parameter
    objects, whose ``data`` become views of the vector. From then on each side sees what the other writes, until
    something gives the Parameters other memory, as ``model.to(dtype)`` does.

    Parameters
    ----------
    model : PeftModel, or a transformers model with adapters, with float32 LoRA matrices on the CPU
        Of linear layers; ranks, alphas, rsLoRA and dropout may differ from module to module.
    adapter_name : str

    Returns
    -------
    AdapterSet
        Named by the modules' paths in the base model, as `cylora.formats.save_peft` writes them. ``origin`` has what
        else the adapter's config says.

    Raises
    ------
    InputError
        If the adapter has what an AdapterSet cannot hold (DoRA, biases, embeddings, convolutions, modules_to_save), or
        a matrix is not float32 on the CPU, shares memory or is merged. The message names it. Nothing was changed.
    """
    pairs, origin = _pairs(model, adapter_name)
    adapters = AdapterSet.zeros({name: (p.a.shape[1], p.b.shape[0], p.config) for name, p in pairs.items()})
    adapters.origin = origin
    homes = [(torch.from_numpy(view), tensor) for view, tensor, _ in _matched(pairs, adapters, adapter_name)]
    with torch.no_grad():
        for home, tensor in homes:
            home.copy_(tensor)
    for home, tensor in homes:
        tensor.data = home
    return adapters


def wrap_peft_gradients(model: Any, adapters: AdapterSet, adapter_name: str = "default") -> Gradients:
    """Return Gradients that ``loss.backward()`` adds to: the ``grad`` of each LoRA matrix becomes a view of them.

    Empty them with ``gradients.zero_()``. ``model.zero_grad()`` and an optimizer's would take the views away, and with
    them what connects the model to these gradients.

    Parameters
    ----------
    model, adapter_name : as for `wrap_peft_model`
    adapters : AdapterSet
        What `wrap_peft_model` returned for them.

    Raises
    ------
    InputError
        If a matrix does not lie in the memory of ``adapters``, or is not being trained. Nothing was changed.
    """
    pairs, _ = _pairs(model, adapter_name)
    if not isinstance(adapters, AdapterSet) or list(pairs) != list(adapters):
        got = f"{len(adapters)} others" if isinstance(adapters, AdapterSet) else type(adapters).__name__
        raise InputError(f"adapters must be what wrap_peft_model made of the model's {len(pairs)} modules, got {got}")
    for view, tensor, name in _matched(pairs, adapters, adapter_name):
        if tensor.data_ptr() != view.ctypes.data:
            raise InputError(f"{name} must lie in the memory of the adapters, got other memory: wrap the model again")
        if not tensor.requires_grad:
            raise InputError(f"{name} must require a gradient, got a frozen one")
    gradients = Gradients(adapters)
    for pair, views in zip(pairs.values(), gradients.values(), strict=True):
        pair.a.grad, pair.b.grad = map(torch.from_numpy, views)
    return gradients


def _matched(
    pairs: Mapping[str, Pair], adapters: AdapterSet, adapter_name: str
) -> Iterator[tuple[FloatArray, torch.Tensor, str]]:
    """Yield each matrix of the set with the model's tensor and that one's name."""
    for name, pair in pairs.items():
        views = (adapters[name].a_matrix, adapters[name].b_matrix)
        for view, (full_name, tensor) in zip(views, pair.parameters(adapter_name), strict=True):
            yield view, tensor, full_name


def _pairs(model: Any, adapter_name: str) -> tuple[dict[str, Pair], dict[str, Any]]:
    """Return the adapted modules by their names in the base model, and what else the config says; or InputError."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(model, torch.nn.Module) or not isinstance(configs, Mapping):
        raise InputError(f"model must be a PEFT model, got {type(model).__name__}")
    if adapter_name not in configs:
        raise InputError(f"adapter_name must be one of {', '.join(map(repr, configs))}, got {adapter_name!r}")
    document = json.loads(json.dumps(configs[adapter_name].to_dict(), default=_plain))
    document |= {"rank_pattern": None, "alpha_pattern": None}  # the modules say it themselves
    try:
        origin = parse_config(document, f"config of {adapter_name!r}").kept
    except FormatError as error:
        raise InputError(str(error)) from None
    pairs: dict[str, Pair] = {}
    seen: dict[int, str] = {}
    for full_name, module in model.named_modules(remove_duplicate=False):
        alphas = getattr(module, "lora_alpha", None)  # which all of PEFT's LoRA layers have
        if not isinstance(alphas, Mapping) or adapter_name not in alphas:
            continue
        if id(module) in seen:
            raise InputError(f"{full_name} must not be the same module as {seen[id(module)]}")
        seen[id(module)] = full_name
        pairs[full_name.removeprefix(PREFIX)] = _pair(full_name, module, adapter_name, document["use_rslora"])
    if not pairs:
        raise InputError(f"model must have modules with the adapter {adapter_name!r}, got none")
    named = [item for pair in pairs.values() for item in pair.parameters(adapter_name)]
    check_parameters([{"params": [tensor for _, tensor in named], "param_names": [name for name, _ in named]}])
    targets = tuple(dict.fromkeys(name.rpartition(".")[2] for name in pairs))
    for name, pair in pairs.items():
        pairs[name] = pair._replace(config=dataclasses.replace(pair.config, target_modules=targets))
    return pairs, origin


def _pair(full_name: str, module: Any, adapter_name: str, use_rslora: bool) -> Pair:
    if adapter_name not in module.lora_A or adapter_name not in module.lora_B:
        raise InputError(f"{full_name} must have lora_A and lora_B, got an adapter of a {_kind(module)}")
    a, b = module.lora_A[adapter_name], module.lora_B[adapter_name]
    if not isinstance(a, torch.nn.Linear) or not isinstance(b, torch.nn.Linear):
        raise InputError(f"{full_name} must be a linear layer, got an adapter of a {_kind(module)}")
    if module.lora_variant.get(adapter_name) is not None:
        variant = type(module.lora_variant[adapter_name]).__name__
        raise InputError(f"{full_name} must have plain LoRA, got {variant}")
    if a.bias is not None or b.bias is not None:
        raise InputError(f"{full_name} must have no bias in lora_A and lora_B, got one")
    if module.merged:
        raise InputError(f"{full_name} must not be merged: call unmerge_adapter() first")
    alpha, scaling = module.lora_alpha[adapter_name], module.scaling[adapter_name]
    dropout = getattr(module.lora_dropout[adapter_name], "p", 0.0)
    try:
        config = LoraConfig(rank=module.r[adapter_name], alpha=alpha, dropout=dropout, use_rslora=use_rslora)
    except ConfigError as error:
        raise InputError(f"{full_name}: {error}") from None
    if not math.isclose(config.scaling, scaling, rel_tol=1e-9):
        raise InputError(f"{full_name} must be scaled by its alpha and rank, {config.scaling:g}, got {scaling:g}")
    return Pair(full_name, a.weight, b.weight, config)


def _kind(module: Any) -> str:
    return type(module.get_base_layer()).__name__


def _plain(value: Any) -> Any:
    """Return what JSON does not know, a set of names, as a list."""
    return sorted(value)
