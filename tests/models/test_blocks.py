"""Blocks named in a config."""

from __future__ import annotations

import json

import pytest

from vestige.errors import SpecError
from vestige.models import VestigeConfig
from vestige.models.blocks import cycle, parse_blocks


def names(blocks, **options):
    return [(block.mixer.name, count) for block, count in parse_blocks(blocks, **options)]


def test_patterns():
    assert names("gated-delta-net*3 softmax") == [("gated-delta-net", 3), ("softmax", 1)]
    block, count = parse_blocks(" based(feature_dim=8, heads=2)*2 ")[0]
    assert (block.mixer.feature_dim, block.mixer.heads, count) == (8, 2, 2)
    assert block.channel.name == "swiglu" and block.norm == "rmsnorm" and block.residual == "pre"


def test_lists():
    blocks = [
        "gla*2",
        {"name": "sliding-window", "window": 32},
        {"mixer": "softmax", "channel": {"name": "mlp", "activation": "relu"}, "norm": "layernorm", "residual": "post"},
        {"mixer": {"name": "mamba2", "state": 16}, "channel": None, "repeat": 3},
    ]
    parsed = parse_blocks(blocks)
    assert [count for _, count in parsed] == [2, 1, 1, 3]
    assert parsed[1][0].mixer.window == 32
    assert parsed[2][0].channel.activation == "relu" and parsed[2][0].residual == "post"
    assert parsed[3][0].channel is None
    assert parse_blocks([block.to_dict(count) for block, count in parsed]) == parsed


def test_a_pattern_is_cycled():
    pattern = parse_blocks("gla*2 softmax")
    assert [b.mixer.name for b in cycle(pattern, 5)] == ["gla", "gla", "softmax", "gla", "gla"]
    assert len(cycle(pattern, None)) == 3
    with pytest.raises(SpecError, match=r"num_hidden_layers is 2.*at least the 3 blocks"):
        cycle(pattern, 2)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ("gla gated-deltanet*3", r"entry 2 of 2, gated-deltanet\*3: unknown mixer 'gated-deltanet'.*gated-delta-net"),
        ("swiglu", "entry 1 of 1.*'swiglu' is no mixer"),
        ("h2o", "no mixer"),
        ("", "empty"),
        ([], "empty"),
        (7, "blocks is 7"),
        ("gla*0", "count is 0"),
        ("gla(windw=3)", "entry 1 of 1.*unknown parameter 'windw'"),
        ("sliding-window(window)", "no parameter=value"),
        ("sliding-window(window=3", "do not match"),
        ("gla gla)", "do not match"),
        ("gla)(", "cannot be read"),
        ([{"mixer": "gla", "chanel": "mlp"}], "unknown part 'chanel'.*channel"),
        ([{"channel": "mlp"}], "names no mixer"),
        ([{"mixer": "gla", "channel": "softmax"}], "'softmax' is no channel mixer"),
        ([{"mixer": "gla", "norm": "rmsnrm"}], "unknown norm 'rmsnrm'; did you mean rmsnorm"),
        ([{"mixer": "gla", "residual": "before"}], "residual is 'before'; allowed: pre"),
        ([None], "entry 1 of 1, None"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(blocks, words):
    with pytest.raises(SpecError, match=words):
        VestigeConfig(blocks=blocks)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": "gla softmax", "num_attention_heads": 3}, "block 1 of 2: gla: heads = 3 does not divide"),
        ({"blocks": "gla softmax(heads=3)"}, "block 2 of 2: softmax: heads = 3 does not divide hidden_size = 64"),
        ({"blocks": "softmax", "num_key_value_heads": 3}, "kv_heads = 3 does not divide heads = 4"),
        ({"blocks": "softmax", "head_dim": 5}, "head_dim = 5 is odd"),
        ({"blocks": "mamba2(head_dim=48)"}, "head_dim = 48 does not divide"),
        ({"blocks": "sliding-window(window=512)", "max_position_embeddings": 256}, "window = 512 is longer .* 256"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5"),
        ({"norm_eps": -1e-6}, "norm_eps is -1e-06; allowed: a number > 0"),
        ({"initializer_range": "0.02"}, "initializer_range is '0.02'"),
        (
            {"num_atention_heads": 8},
            r"num_atention_heads.* did you mean num_attention_heads",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(options, words):
    with pytest.raises(SpecError, match=words):
        VestigeConfig(**{"hidden_size": 64, **options})


def test_a_config_survives_json_with_every_parameter_spelled_out():
    config = VestigeConfig(blocks="gated-delta-net*3 softmax", num_hidden_layers=10, hidden_size=64)
    again = VestigeConfig.from_dict(json.loads(config.to_json_string()))
    assert again.plan() == config.plan() and again.to_dict() == config.to_dict()
    assert config.blocks[0]["mixer"]["conv"] == 4 and config.blocks[0]["repeat"] == 3
    assert again.signature == config.signature
    assert VestigeConfig(blocks="softmax*4").signature != VestigeConfig(blocks="softmax*3").signature
