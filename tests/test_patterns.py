"""Pattern: which key counts for a module, as PEFT has it, and what is no pattern."""

import copy
import pickle
import re

import numpy as np
import pytest

from cylora import ConfigError, LoraConfig, LoraTrainingConfig
from cylora.patterns import Pattern


def first_match_as_in_peft(keys: list[str], module: str) -> str | None:
    """Return what PEFT's ``get_pattern_key`` finds, for keys that are literal."""
    for key in keys:
        name = re.escape(key.removeprefix("^").removesuffix("$").replace("\\.", "."))
        anchored = f"^{name}" if key.startswith("^") else name
        if re.match(rf"(.*\.)?({anchored})$", module):
            return key
    return None


KEYS = ["q_proj", "layers.0.q_proj", "^model.layers.1.q_proj", "0.q_proj", r"layers\.1\.up", "^up", "proj$", "q"]
MODULES = ["model.layers.0.q_proj", "model.layers.1.q_proj", "layers.1.up", "up", "x.up", "proj", "q", "q_projx", ""]


@pytest.mark.parametrize("turn", range(len(KEYS)))
def test_the_first_key_that_fits_counts(turn: int) -> None:
    keys = KEYS[turn:] + KEYS[:turn]
    pattern = Pattern({key: place for place, key in enumerate(keys)})
    for module in MODULES:
        expected = first_match_as_in_peft(keys, module)
        assert pattern.key(module) == expected
        assert pattern.value(module, -1) == (-1 if expected is None else keys.index(expected))


def test_a_pattern_is_an_immutable_mapping_that_minds_its_order() -> None:
    pattern = Pattern({"b": 2, "a": 1})
    assert (dict(pattern), list(pattern), len(pattern), pattern["a"]) == ({"b": 2, "a": 1}, ["b", "a"], 2, 1)
    assert pattern == {"b": 2, "a": 1} == pattern
    assert pattern != {"a": 1, "b": 2}
    assert pattern != [("b", 2), ("a", 1)]
    assert hash(pattern) == hash(Pattern({"b": 2, "a": 1})) != hash(Pattern({"a": 1, "b": 2}))
    assert repr(pattern) == "{'b': 2, 'a': 1}"
    for again in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert (again, again.value("x.a", 0)) == (pattern, 1)
    with pytest.raises(TypeError):
        pattern["a"] = 2  # type: ignore[index]


FIELDS = [(LoraConfig, "rank_pattern"), (LoraConfig, "alpha_pattern"), (LoraTrainingConfig, "rate_pattern"),
          (LoraTrainingConfig, "weight_decay_pattern")]  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_what_is_no_pattern_is_refused_by_name(kind: type, name: str) -> None:
    for value in (None, 3, "q=1", [("q", 1)]):
        with pytest.raises(ConfigError, match=f"{name} must be a mapping of module names to values, got"):
            kind(**{name: value})
    for key in ("", "q_(proj|x)", "layers.*.q", "q ", 3, "q$x", None):
        with pytest.raises(ConfigError, match=f"{name} must have names of modules or their ends as keys, of letters"):
            kind(**{name: {key: 1}})
    for value in ("1", None, -1, True, float("nan")):
        with pytest.raises(ConfigError, match=rf"{name}\['q'\] must be "):
            kind(**{name: {"q": value}})


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=[name for _, name in FIELDS])
def test_a_config_with_patterns_is_hashable_and_survives_its_dict(kind: type, name: str) -> None:
    config = kind(**{name: {"q_proj": 4, "layers.0.q_proj": 2}})
    assert config.to_dict()[name] == {"q_proj": 4, "layers.0.q_proj": 2}
    assert type(config.to_dict()[name]) is dict
    again = kind.from_dict(config.to_dict())
    assert (again, hash(again)) == (config, hash(config))
    assert list(getattr(again, name)) == ["q_proj", "layers.0.q_proj"]
    assert config != kind(**{name: {"layers.0.q_proj": 2, "q_proj": 4}})
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_the_values_of_a_pattern_are_plain_numbers() -> None:
    lora = LoraConfig(rank_pattern={"q": np.int8(3)}, alpha_pattern={"q": np.float32(0.5)})
    assert [type(x["q"]) for x in (lora.rank_pattern, lora.alpha_pattern)] == [int, float]
