"""adapter_config.json: what is read, refused, carried along and written."""

import re
from typing import Any

import pytest

from cylora.errors import FormatError
from cylora.formats.peft_config import CONFIG_NAME, parse_config, target_modules, to_config
from cylora.patterns import Pattern

LAYERS = [f"model.layers.{n}.self_attn.{name}" for n in range(3) for name in ("q_proj", "v_proj")]


def document(**keys: Any) -> dict[str, Any]:
    return {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]} | keys


def parsed(**keys: Any) -> Any:
    return parse_config(document(**keys), "dir/adapter_config.json")


# ------------------------------------------------------------------ reading


def test_the_least_config_has_pefts_defaults() -> None:
    assert CONFIG_NAME == "adapter_config.json"
    assert parsed() == (8, 16.0, False, 0.0, {}, {}, {})
    assert type(parsed().alpha) is float


def test_every_field_is_read() -> None:
    config = parsed(use_rslora=True, lora_dropout=0.25, rank_pattern={"q_proj": 4}, alpha_pattern={r"^a\.b$": 0.5})
    assert config == (8, 16.0, True, 0.25, {"q_proj": 4}, {r"^a\.b$": 0.5}, {})


def test_a_pattern_that_is_null_is_none() -> None:
    assert parsed(rank_pattern=None, alpha_pattern=None) == parsed()


def test_keys_that_say_nothing_of_the_mathematics_are_kept_as_they_are() -> None:
    harmless = {
        "base_model_name_or_path": "some/model",
        "auto_mapping": {"base_model_class": "Llama", "parent_library": "transformers"},
        "bias": "none",
        "fan_in_fan_out": True,
        "layers_to_transform": [0, 1],
        "layers_pattern": "layers",
        "exclude_modules": "lm_head",
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_version": "0.21.2",
        "qalora_group_size": 16,
        "revision": "main",
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_something_new": False,
        "lora_something_new": None,
        "something_new_config": None,
        "velora_config": {"num_groups": 2},
        "from the future": [1, {"a": None}],
    }
    assert parsed(**harmless).kept == harmless


def test_how_the_weights_were_drawn_is_not_kept() -> None:
    """A file that says False makes PEFT draw a B that is not zero for modules that the file does not have."""
    for drawn in (True, False, None, "gaussian", "eva", "orthogonal"):
        assert parsed(init_lora_weights=drawn, eva_config={"rho": 2.0}).kept == {}
    written = to_config(parsed(init_lora_weights=False).kept, ["q"], rank=1, alpha=1.0, dropout=0.0)
    assert written["init_lora_weights"] is True


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_dora", 0),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("bias", None),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("trainable_token_indices", [3]),
        ("trainable_token_indices", {"embed_tokens": [3]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("megatron_config", {}),
        ("arrow_config", {}),
        ("loftq_config", {"loftq_bits": 4}),
        ("corda_config", {}),
        ("ensure_weight_tying", True),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "mica"),
        ("init_lora_weights", 1),
    ],
)
def test_what_changes_the_mathematics_is_refused_by_name(key: str, value: object) -> None:
    message = f"dir/adapter_config.json: {key} must not be set, since it changes what adapters do, got {value!r}"
    with pytest.raises(FormatError, match=re.escape(message)):
        parsed(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_magic", True),
        ("lora_magic", "yes"),
        ("lora_ga_config", {"stable_gamma": 16}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"num_samples": 4}),
        ("my_velora_config", {"a": 1}),
    ],
)
def test_what_looks_like_a_variant_is_refused_by_name(key: str, value: object) -> None:
    message = f"dir/adapter_config.json: {key} is not known and may change what adapters do, got {value!r}"
    with pytest.raises(FormatError, match=re.escape(message)):
        parsed(**{key: value})


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
        ({"peft_type": None}, "peft_type must be 'LORA', got None"),
        ({"r": None}, "r must be an integer, got None"),
        ({"r": True}, "r must be an integer, got True"),
        ({"r": 8.0}, "r must be an integer, got 8.0"),
        ({"r": 0}, "r must be an integer in [1, 2147483648], got 0"),
        ({"lora_alpha": 0}, "lora_alpha must be a number in (0, 1e6], got 0"),
        ({"lora_alpha": 1000001}, "lora_alpha must be a number in (0, 1e6], got 1000001"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number in (0, 1e6], got '16'"),
        ({"lora_alpha": True}, "lora_alpha must be a number in (0, 1e6], got True"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number in (0, 1e6], got nan"),
        ({"lora_dropout": 1.0}, "lora_dropout must be in [0, 1), got 1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout must be in [0, 1), got -0.1"),
        ({"lora_dropout": None}, "lora_dropout must be in [0, 1), got None"),
        ({"use_rslora": 1}, "use_rslora must be true or false, got 1"),
        ({"use_rslora": None}, "use_rslora must be true or false, got None"),
        ({"rank_pattern": [4]}, "rank_pattern must be an object, got [4]"),
        ({"alpha_pattern": "x"}, "alpha_pattern must be an object, got 'x'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern 'q_proj' must be an integer in [1, 2147483648], got 0"),
        ({"rank_pattern": {"q_proj": True}}, "rank_pattern 'q_proj' must be an integer, got True"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern 'q_proj' must be a number in (0, 1e6], got 0"),
    ],
)
def test_a_value_that_breaks_its_rule_is_refused_by_name(keys: dict[str, Any], rule: str) -> None:
    with pytest.raises(FormatError, match=re.escape(f"dir/adapter_config.json: {rule}")):
        parsed(**keys)


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("key", [".*q_proj", "q|v", "(a+)+b", "", "a$b", "^^a", "a b", "a\n", r"a\d", "[qv]_proj", "é"])
def test_patterns_that_are_regular_expressions_are_refused(pattern: str, key: str) -> None:
    message = f"{pattern} must have names as keys, no regular expressions, got {key!r}"
    with pytest.raises(FormatError, match=re.escape(message)):
        parsed(**{pattern: {key: 4}})


@pytest.mark.parametrize(
    ("key", "rule"), [("peft_type", "'LORA', got None"), ("r", "given, got None"), ("lora_alpha", "given, got None")]
)
def test_a_key_that_is_missing_is_named(key: str, rule: str) -> None:
    without = document()
    del without[key]
    with pytest.raises(FormatError, match=f"p: {key} must be {rule}"):
        parse_config(without, "p")


@pytest.mark.parametrize(("value", "kind"), [([], "list"), ("x", "str"), (None, "NoneType")])
def test_a_document_that_is_no_object_is_refused(value: object, kind: str) -> None:
    with pytest.raises(FormatError, match=f"p: the config must be an object, got {kind}"):
        parse_config(value, "p")


# ------------------------------------------------------------------ patterns


@pytest.mark.parametrize(
    ("key", "module", "matches"),
    [
        ("q_proj", "q_proj", True),
        ("q_proj", "layers.0.q_proj", True),
        ("q_proj", "layers.0.my_q_proj", False),
        ("q_proj", "q_proj.inner", False),
        ("0.q_proj", "layers.0.q_proj", True),
        ("0.q_proj", "layers.10.q_proj", False),
        (r"0\.q_proj", "layers.0.q_proj", True),
        ("q_proj$", "layers.0.q_proj", True),
        ("^q_proj", "layers.0.q_proj", False),
        ("^q_proj", "q_proj", True),
        (r"^layers\.0\.q_proj", "layers.0.q_proj", True),
        (r"^layers\.0\.q_proj$", "layers.0.q_proj", True),
        (r"^layers\.0\.q_proj", "model.layers.0.q_proj", False),
        (r"^layers\.0", "layers.0.q_proj", False),
    ],
)
def test_pattern_for_finds_what_peft_finds(key: str, module: str, matches: bool) -> None:
    """PEFT's own rule (``get_pattern_key``), a regular expression, is the oracle."""
    assert bool(re.match(rf"(.*\.)?({key})$", module)) == matches
    assert Pattern({key: 3}).value(module, 7) == (3 if matches else 7)


def test_the_first_pattern_that_fits_counts() -> None:
    assert Pattern({"other": 1, "q_proj": 2, "0.q_proj": 3}).value("layers.0.q_proj", 7) == 2
    assert Pattern({"0.q_proj": 3, "q_proj": 2}).value("layers.0.q_proj", 7) == 3
    assert Pattern({}).value("q", 7) == 7


# ------------------------------------------------------------------ writing


@pytest.mark.parametrize(
    ("modules", "targets"),
    [
        (LAYERS, ["q_proj", "v_proj"]),
        (reversed(LAYERS), ["q_proj", "v_proj"]),
        (LAYERS[:1], ["q_proj"]),
        (LAYERS[1:], sorted(LAYERS[1:])),  # no q_proj in the first layer
        (LAYERS[:5], sorted(LAYERS[:5])),  # no v_proj in the last
        (LAYERS[2:], sorted(LAYERS[2:])),  # none in the first
        (LAYERS[:2] + LAYERS[4:], sorted(LAYERS[:2] + LAYERS[4:])),  # none in the middle
        ([*LAYERS, "lm_head"], sorted([*LAYERS, "lm_head"])),
        (["lm_head"], ["lm_head"]),
        (["q", "k"], ["k", "q"]),
        # The same last part in two places: one name for both would also mean their neighbours.
        (["layers.0.attn.out", "layers.0.mlp.out"], ["layers.0.attn.out", "layers.0.mlp.out"]),
        (["layers.0.experts.0.up", "layers.0.experts.1.up"], ["layers.0.experts.0.up", "layers.0.experts.1.up"]),
    ],
)
def test_target_modules_mean_these_modules(modules: Any, targets: list[str]) -> None:
    modules = list(modules)
    assert target_modules(modules) == targets
    # PEFT's rule for lists: the name itself, or the end of it from a dot on.
    for module in modules:
        assert any(module == target or module.endswith(f".{target}") for target in targets)


def test_to_config_has_every_key_that_loaders_read() -> None:
    assert to_config({}, LAYERS, rank=8, alpha=16.0, dropout=0.0) == {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj"],
        "base_model_name_or_path": None,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "task_type": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "modules_to_save": None,
        "init_lora_weights": True,
        "revision": None,
    }


def test_to_config_keeps_what_was_there_but_not_what_it_says_itself() -> None:
    kept = {"fan_in_fan_out": True, "mine": 1, "r": 99, "inference_mode": False, "target_modules": ["wrong"]}
    config = to_config(
        kept, ["q"], rank=2, alpha=0.5, use_rslora=True, dropout=0.1, rank_pattern={"a": 1}, alpha_pattern={"b": 2.0}
    )
    expected = {"fan_in_fan_out": True, "mine": 1, "r": 2, "inference_mode": True, "target_modules": ["q"]}
    assert {key: config[key] for key in kept} == expected
    assert (config["lora_dropout"], config["use_rslora"]) == (0.1, True)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"a": 1}, {"b": 2.0})


@pytest.mark.parametrize(("alpha", "written", "kind"), [(16.0, 16, int), (0.5, 0.5, float), (1e6, 1000000, int)])
def test_an_alpha_without_fraction_is_an_integer(alpha: float, written: float, kind: type) -> None:
    config = to_config({}, ["q"], rank=1, alpha=alpha, dropout=0.0)
    assert config["lora_alpha"] == written
    assert type(config["lora_alpha"]) is kind


def test_what_is_written_is_read() -> None:
    config = to_config({"mine": 1}, LAYERS, rank=2, alpha=0.5, use_rslora=True, dropout=0.1, rank_pattern={"q_proj": 1})
    read = parse_config(config, "p")
    assert read[:6] == (2, 0.5, True, 0.1, {"q_proj": 1}, {})
    again = to_config(read.kept, LAYERS, rank=2, alpha=0.5, use_rslora=True, dropout=0.1, rank_pattern={"q_proj": 1})
    assert again == config
