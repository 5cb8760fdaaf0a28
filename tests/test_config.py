"""Configuration: presets, every combination, files, layers and rates by pattern, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from dataclasses import replace

import pytest

import hiddenkey_rs as hk
from hiddenkey_rs.config import rate_for, resolve_layers, threshold

NAMES = [
    "none",
    *(f"{p}-{q}" for p in ("dropkey", "dropattention", "hiddencut") for q in ("element", "column", "span")),
]
NAMES += ["hiddenkey-minus", "hiddenkey", "hiddenkey-js", "hiddenkey-input", "hiddenkey-output", "r-drop"]


def test_the_default_is_hiddenkey() -> None:
    config = hk.HiddenKeyConfig()
    assert config == hk.HiddenKeyConfig.preset("hiddenkey")
    assert config.attention == hk.AttentionDrop("dropkey", "column", 0.1, "group")
    assert config.hidden == hk.HiddenDrop("element", 0.1)
    assert config.consistency == hk.Consistency("kl", 1.0, "one")


def test_presets() -> None:
    assert tuple(NAMES) == hk.PRESETS
    minus = hk.HiddenKeyConfig.preset("hiddenkey-minus", rate=0.2)
    assert (minus.attention.rate, minus.hidden.rate, minus.consistency) == (0.2, 0.2, None)
    assert hk.HiddenKeyConfig.preset("hiddenkey-js").consistency.kind == "js"
    assert hk.HiddenKeyConfig.preset("hiddenkey-input", rate=0.3).input == hk.ElementDrop(0.3)
    assert hk.HiddenKeyConfig.preset("hiddenkey-output").output == hk.ElementDrop(0.1)
    span = hk.HiddenKeyConfig.preset("hiddencut-span", rate=0.15, seed=4)
    assert (span.attention, span.hidden, span.seed) == (None, hk.HiddenDrop("span", 0.15), 4)
    assert hk.HiddenKeyConfig.preset("dropattention-element").attention.position == "dropattention"
    rdrop = hk.HiddenKeyConfig.preset("r-drop")
    assert not rdrop.drops
    assert rdrop.consistency.gradient == "both"
    assert not hk.HiddenKeyConfig.preset("none").drops


def test_every_combination_survives_json_yaml_pickle_and_copies(tmp_path) -> None:
    attention = [
        None,
        *(
            hk.AttentionDrop(p, q, 0.2, h)
            for p in ("dropkey", "dropattention")
            for q in ("element", "column", "span")
            for h in ("group", "query")
        ),
    ]
    hidden = [
        None,
        *(hk.HiddenDrop(q, 0.3, r) for q in ("element", "column", "span") for r in (None, True, False)),
        hk.HiddenDrop("span", start="attention"),
    ]
    consistency = [
        None,
        *(
            hk.Consistency(k, 0.5, g)
            for k, g in itertools.product(("kl", "js", "jensen-shannon", "mse"), ("one", "both"))
            if (k, g) != ("js", "both")
        ),
    ]
    for n, (a, h, c) in enumerate(itertools.product(attention, hidden, consistency)):
        config = hk.HiddenKeyConfig(
            a, h, hk.ElementDrop(0.1) if n % 2 else None, None, {"layer.3": 0.05}, c, [1, "encoder.2"], n
        )
        assert hk.HiddenKeyConfig.from_json(config.to_json()) == config
        if n % 20 == 0:
            assert hk.HiddenKeyConfig.from_yaml(config.to_yaml()) == config
            assert pickle.loads(pickle.dumps(config)) == config == copy.deepcopy(config)
            assert hash(config) == hash(copy.deepcopy(config))
    config.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "hiddenkey_config.json").read_text())
    assert saved["hiddenkey_version"] == hk.__version__
    assert hk.HiddenKeyConfig.from_pretrained(tmp_path / "adapter") == config
    assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["hiddenkey_config.json"]


def test_saved_configs_name_their_stream(tmp_path) -> None:
    config = hk.HiddenKeyConfig()
    assert config.stream == "hk1"
    config.save_pretrained(tmp_path)
    file = tmp_path / "hiddenkey_config.json"
    saved = json.loads(file.read_text())
    assert saved["stream"] == "hk1"
    assert "stream: hk1" in config.to_yaml()
    assert hk.HiddenKeyConfig.from_dict({}).stream == "hk1", "configs older than the field"
    for unknown in ("hk2", "HK1", "", None, 1, ["hk1"]):
        message = r"unknown stream \(got .*\);.* use one of hk1"
        with pytest.raises(hk.ConfigError, match=message):
            hk.HiddenKeyConfig(stream=unknown)
        file.write_text(json.dumps({**saved, "stream": unknown}))
        with pytest.raises(hk.ConfigError, match=message):
            hk.HiddenKeyConfig.from_pretrained(tmp_path)
        with pytest.raises(hk.ConfigError, match=message):
            hk.HiddenKeyConfig.from_yaml(f"stream: {json.dumps(unknown)}")


@pytest.mark.parametrize(
    ("rate", "expected"), [(0.0, 0), (1.0, 65536), (0.5, 32768), (0.1, 6554), (1e-9, 0), (0.5 / 65536, 1)]
)
def test_thresholds(rate: float, expected: int) -> None:
    assert threshold(rate) == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hk.AttentionDrop(rate=1.0), r"attention rate must be a number in \[0, 1\) \(got 1.0\)"),
        (lambda: hk.AttentionDrop(rate=-0.1), r"got -0.1"),
        (lambda: hk.AttentionDrop(rate=float("nan")), r"got nan"),
        (lambda: hk.AttentionDrop(rate="0.1"), r"got '0.1'"),
        (lambda: hk.AttentionDrop(rate=True), r"got True"),
        (lambda: hk.HiddenDrop(rate=1e-6), r"multiples of 2\*\*-16 \(got 1e-06\)"),
        (lambda: hk.HiddenDrop(rate=1 - 1e-7), r"multiples of 2\*\*-16"),
        (
            lambda: hk.AttentionDrop(position="dropkeys"),
            r"unknown attention position \(got 'dropkeys'\); did you mean 'dropkey'",
        ),
        (lambda: hk.AttentionDrop(pattern="row"), r"unknown attention pattern \(got 'row'\); .*element, column, span"),
        (lambda: hk.AttentionDrop(heads="kv"), r"unknown heads \(got 'kv'\)"),
        (lambda: hk.HiddenDrop(start="attention"), r"only a span has a start"),
        (lambda: hk.HiddenDrop(rescale="yes"), r"rescale must be .*got 'yes'"),
        (lambda: hk.Consistency("kld"), r"unknown consistency kind \(got 'kld'\); did you mean 'kl'"),
        (lambda: hk.Consistency(weight=-1), r"weight must be a number >= 0 \(got -1\)"),
        (lambda: hk.Consistency(weight=float("inf")), r"got inf"),
        (lambda: hk.Consistency("js", gradient="both"), r"carries no gradient"),
        (lambda: hk.HiddenKeyConfig.preset("hiddenky"), r"unknown preset \(got 'hiddenky'\); did you mean 'hiddenkey'"),
        (lambda: hk.HiddenKeyConfig.preset("none", sed=1), r"unknown config field \(got 'sed'\)"),
        (lambda: hk.HiddenKeyConfig(layers="first"), r"unknown layers rule \(got 'first'\)"),
        (lambda: hk.HiddenKeyConfig(layers=[]), r"non-empty list of layers \(got \[\]\)"),
        (lambda: hk.HiddenKeyConfig(layers=[-1]), r"a layer is a number >= 0.*got -1"),
        (lambda: hk.HiddenKeyConfig(layers=["middle.1"]), r"got 'middle.1'"),
        (lambda: hk.HiddenKeyConfig(seed=-1), r"seed must be an integer in \[0, 2\*\*64\) \(got -1\)"),
        (lambda: hk.HiddenKeyConfig(stream="hk0"), r"unknown stream \(got 'hk0'\)"),
        (lambda: hk.HiddenKeyConfig(rate_pattern={"(": 0.1}), r"no regular expression \(got '\('"),
        (lambda: hk.HiddenKeyConfig(rate_pattern={"(?i)Layer": 0.1}), r"no regular expression \(got '\(\?i\)Layer'"),
        (lambda: hk.HiddenKeyConfig(rate_pattern={"a": 2}), r"rate_pattern\['a'\] must be .*got 2"),
        (lambda: hk.HiddenKeyConfig(attention={"rate": 0.1}), r"attention must be a AttentionDrop or None"),
        (
            lambda: hk.HiddenKeyConfig.from_dict({"atention": None}),
            r"unknown key in HiddenKeyConfig \(got 'atention'\); did you mean 'attention'",
        ),
        (lambda: hk.HiddenKeyConfig.from_dict({"attention": {"rates": 0.1}}), r"unknown key in AttentionDrop"),
        (lambda: hk.HiddenKeyConfig.from_json("{"), r"the config is no JSON"),
        (lambda: hk.HiddenKeyConfig.from_yaml("a: ["), r"the config is no YAML"),
        (lambda: hk.HiddenKeyConfig.from_file("nowhere.json"), r"cannot be read \(got 'nowhere.json'"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(hk.ConfigError, match=message):
        make()


def test_layers() -> None:
    assert resolve_layers("auto", 4, None) == {"encoder": {0, 1, 2, 3}, "decoder": set()}
    assert resolve_layers("auto", None, 5) == {"encoder": set(), "decoder": {3, 4}}
    assert resolve_layers("auto", 3, 4) == {"encoder": {0, 1, 2}, "decoder": {2, 3}}
    assert resolve_layers("latter-half", 4, None)["encoder"] == {2, 3}
    assert resolve_layers("all", 2, 2) == {"encoder": {0, 1}, "decoder": {0, 1}}
    assert resolve_layers([0, "encoder.2"], 3, 4) == {"encoder": {2}, "decoder": {0}}
    assert resolve_layers([0, 2], 3, None)["encoder"] == {0, 2}
    with pytest.raises(hk.ConfigError, match=r"got 4, the decoder has 4 layer\(s\)"):
        resolve_layers([4], None, 4)
    with pytest.raises(hk.ConfigError, match=r"got 'encoder.0', the encoder has 0"):
        resolve_layers(["encoder.0"], None, 4)


def test_rates_by_pattern() -> None:
    config = hk.HiddenKeyConfig(rate_pattern={r"layer\.1": 0.3, r"layer\.\d+": 0.2, "output.dense": 0.05})
    assert rate_for(config, 0.1, ["encoder.layer.1", "encoder.layer.1.output.dense"]) == 0.3
    assert rate_for(config, 0.1, ["encoder.layer.11", "x"]) == 0.2
    assert rate_for(config, 0.1, ["decoder", "decoder.output.dense"]) == 0.05
    assert rate_for(config, 0.1, ["embeddings"]) == 0.1
    assert hk.HiddenKeyConfig(hk.AttentionDrop(rate=0.0), None, rate_pattern={"layer.1": 0.2}).drops
    assert replace(config, seed=3).rate_pattern == config.rate_pattern


@pytest.mark.parametrize("name", ["none", "r-drop"])
def test_presets_without_rates_take_none(name: str) -> None:
    with pytest.raises(hk.ConfigError, match=rf"the preset '{name}' drops nothing by itself \(got rate=0.2\)"):
        hk.HiddenKeyConfig.preset(name, rate=0.2)


@pytest.mark.parametrize("value", [0, 1, 0.0, "yes"])
def test_rescale_is_a_truth_value(value: object) -> None:
    with pytest.raises(hk.ConfigError, match="rescale must be true, false or null"):
        hk.HiddenDrop(rescale=value)
