"""The contract of methods and their registry: specs, errors, discovery."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap

import pytest
import yaml

import vestige
from vestige.core import Method, Paper, Verdict, param
from vestige.core import registry as the_registry
from vestige.core.registry import MethodCard
from vestige.errors import SpecError, VestigeError

registry_module = sys.modules["vestige.core.registry"]


def test_a_method_is_a_frozen_value(samples):
    method = samples.Plain(needed=1, budget=8, heads=[3, 4])
    assert method == samples.Plain(needed=1, budget=8, heads=(3, 4)) and hash(method) == hash(method.replace())
    assert method != method.replace(budget=9)
    assert method.heads == (3, 4) and method.shared == 1 and method.rate == 1e-5
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.budget = 3


@pytest.mark.parametrize(
    "values",
    [
        {"needed": 1},
        {"needed": -3, "budget": 512, "rate": 0.5, "when": "prefill", "heads": (1, 2), "label": "a: b", "exact": True},
        {"needed": 0, "budget": 1e-7, "rate": 1e-300, "label": "yes"},
        {"needed": 10**12, "budget": 0.1 + 0.2, "rate": 0.0, "label": "1e-3", "shared": 7},
    ],
)
def test_specs_round_trip(samples, values):
    method = samples.Plain(**values)
    assert method.spec()["name"] == "sample-plain"
    assert set(method.spec()) == {"name", "shared", *samples.Plain.__annotations__}
    for form in (
        method.spec(),
        method.to_json(),
        method.to_yaml(),
        json.loads(method.to_json()),
        json.dumps(method.spec(), indent=2),
    ):
        back = Method.from_spec(form)
        assert type(back) is samples.Plain and back == method
        assert all(type(getattr(back, k)) is type(getattr(method, k)) for k in method.spec() if k != "name")
    assert samples.Sample.from_spec(method.spec()) == method


def test_a_method_within_a_method_round_trips(samples):
    outer = samples.Nesting(inner=samples.Nesting(inner=samples.Plain(needed=2)), table=[[1, 2], [3, 0.5]])
    assert outer.table == ((1, 2), (3, 0.5)) and hash(outer) is not None
    assert outer.spec()["inner"]["inner"]["needed"] == 2
    for form in (outer.spec(), outer.to_json(), outer.to_yaml()):
        assert Method.from_spec(form) == outer
    assert samples.Nesting(inner={"name": "sample-plain", "needed": 2}).inner == samples.Plain(needed=2)


def test_a_spec_may_be_a_name(samples):
    assert Method.from_spec("sample-other") == samples.Other() == vestige.method("sample-other")
    assert vestige.method("sample-plain", needed=1, budget=256) == samples.Plain(needed=1, budget=256)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"budget": "4"}, r"sample-plain: parameter 'budget' is '4'; allowed: int | float, > 0"),
        ({"budget": True}, r"'budget' is True; allowed"),
        ({"budget": 0}, r"'budget' is 0; allowed: int | float, > 0"),
        ({"budget": -0.5}, r"'budget' is -0.5"),
        ({"budget": float("nan")}, r"'budget' is nan"),
        ({"budget": float("inf")}, r"'budget' is inf"),
        ({"rate": 1}, r"'rate' is 1; allowed: float, >= 0 and < 1"),
        ({"rate": -1e-9}, r"'rate' is -1e-09"),
        ({"when": "later"}, r"'when' is 'later'; allowed: 'both' | 'prefill'"),
        ({"heads": "12"}, r"'heads' is '12'; allowed: tuple[int, ...]"),
        ({"heads": (1, 2.5)}, r"'heads' is (1, 2.5)"),
        ({"label": 3}, r"'label' is 3; allowed: str | None"),
        ({"exact": 1}, r"'exact' is 1; allowed: bool"),
        ({"needed": 1.0}, r"'needed' is 1.0; allowed: int"),
        ({"needed": None}, r"'needed' is None; allowed: int"),
        ({"shared": -1}, r"'shared' is -1; allowed: int, >= 0"),
        ({"buget": 4}, r"sample-plain: unknown parameter 'buget' (given 4); did you mean budget?"),
        ({"zzz": 4}, r"unknown parameter 'zzz' (given 4); known: budget, exact"),
        ({"budget": 13}, r"sample-plain: parameter 'budget' is 13; allowed: any other"),
    ],
)
def test_a_wrong_parameter_is_named_with_what_is_allowed(samples, values, text):
    values = {"needed": 1, **values}
    with pytest.raises(SpecError) as direct:
        samples.Plain(**values)
    assert text in str(direct.value) and "\n" not in str(direct.value)
    with pytest.raises(SpecError) as by_spec:
        Method.from_spec({"name": "sample-plain", **values})
    assert str(by_spec.value) == str(direct.value)
    if not {"buget", "zzz", "needed"} & set(values) - {"needed"}:
        with pytest.raises(SpecError, match="parameter"):
            samples.Plain(needed=1).replace(**values)


def test_other_wrong_specs(samples):
    for wrong, text in {
        "sample-plane": "unknown method 'sample-plane'; did you mean sample-plain",
        "": "a spec is a name or a mapping",
        "[1, 2]": "a spec is a name or a mapping with 'name', not list",
        "{name: [": "neither JSON nor YAML",
        "budget: 3": "lacks 'name'",
    }.items():
        with pytest.raises(SpecError, match=r".*") as caught:
            Method.from_spec(wrong)
        assert text in str(caught.value), wrong
    for mapping in ({"name": 3}, {"name": None}, {"name": ["sample-plain"]}):
        with pytest.raises(SpecError, match="unknown method"):
            Method.from_spec(mapping)
    with pytest.raises(SpecError, match="not int: 7"):
        Method.from_spec(7)
    with pytest.raises(SpecError, match="'sample-other' is a Method, where a Sample is wanted"):
        samples.Sample.from_spec("sample-other")
    with pytest.raises(SpecError, match="parameter 'needed' is required"):
        samples.Plain()
    with pytest.raises(SpecError, match="given by name"):
        samples.Plain(3)
    with pytest.raises(SpecError, match=r"sample-nesting: parameter 'inner': 'sample-other' is a Method"):
        samples.Nesting(inner={"name": "sample-other"})
    with pytest.raises(SpecError, match=r"parameter 'inner': sample-plain: parameter 'budget' is 0"):
        samples.Nesting(inner={"name": "sample-plain", "needed": 1, "budget": 0})
    with pytest.raises(SpecError, match=r"'inner': 'sample-other' is a Method, where a Sample"):
        samples.Nesting(inner=samples.Other())


def test_errors_are_also_the_builtins_that_fit():
    assert issubclass(SpecError, ValueError) and issubclass(SpecError, VestigeError)


def test_parameters_are_described(samples):
    described = samples.Plain.parameters()
    assert list(described) == ["shared", "budget", "rate", "when", "heads", "label", "exact", "needed"]
    assert described["rate"] == {"type": "float", "help": "per token", "bounds": ">= 0 and < 1", "default": 1e-5}
    assert "default" not in described["needed"] and described["heads"]["default"] == []
    assert samples.Nesting.parameters()["table"]["default"] == [[1, 0.5]]


def test_a_class_registers_by_being_defined(samples):
    class Defined(samples.Sample):
        name = "sample-defined"
        paper = samples.PAPER

    assert vestige.method("sample-defined") == Defined()
    assert "sample-defined" in {card.name for card in vestige.methods()}
    with pytest.raises(SpecError, match="'sample-defined' is taken by"):

        class Twin(samples.Sample):
            name = "sample-defined"
            paper = samples.PAPER

    with pytest.raises(SpecError, match="'sample-unsourced' but names no paper"):

        class Unsourced(Method):
            name = "sample-unsourced"

    assert "sample-unsourced" not in the_registry._defined

    class Nameless(samples.Sample):
        extra: int = param(1, "is not registered")

    assert Nameless(extra=2).extra == 2
    with pytest.raises(SpecError, match="Nameless: parameter 'extra' is 'two'"):
        Nameless(extra="two")


def test_a_class_may_be_defined_anew_in_its_place(samples):
    again = type(
        "Other",
        (Method,),
        {"name": "sample-other", "paper": samples.PAPER, "__module__": samples.__name__, "__qualname__": "Other"},
    )
    assert the_registry.load("sample-other") is again


def test_paper_and_card(samples):
    assert samples.PAPER.url == "https://arxiv.org/abs/2401.00001" and Paper(title="x", year=1999).url is None
    card = the_registry.card("sample-plain")
    assert card == MethodCard(
        name="sample-plain",
        room="tests",
        module="tests.core.sample_methods",
        qualname="Plain",
        idea="Keep what comes first.",
        paper=samples.PAPER,
        verdict=Verdict("reproduced", "as claimed"),
    )


def test_rooms_are_known(samples):
    for room in registry_module.ROOMS:
        assert {card.room for card in vestige.methods(room)} <= {room}
    with pytest.raises(SpecError, match=r"unknown room 'contxt'; did you mean context\?"):
        vestige.methods("contxt")
    cards = vestige.methods()
    assert cards == sorted(cards, key=lambda card: (card.room, card.name))
    assert len({card.name for card in cards}) == len(cards)


def test_what_is_read_from_the_files_equals_the_classes():
    cards = the_registry.package_cards()
    assert cards, "the package defines methods"
    for card in cards:
        cls = the_registry.load(card.name)
        assert card == the_registry.class_card(cls), card.name
        assert card.idea and card.paper is not None
    found = {card.name for card in cards}
    package = {name for name, cls in the_registry._defined.items() if cls.__module__.startswith("vestige.")}
    assert package == found


def test_every_parameter_of_the_package_is_described_and_specs_round_trip():
    for card in the_registry.package_cards():
        cls = the_registry.load(card.name)
        parameters = cls.parameters()
        assert all(entry["help"] for entry in parameters.values()), card.name
        if all("default" in entry for entry in parameters.values()):
            method = cls()
            assert Method.from_spec(method.to_json()) == Method.from_spec(yaml.safe_load(method.to_yaml())) == method


@pytest.fixture
def plug_in(tmp_path, monkeypatch, samples):
    """Install a package with entry points into a folder of its own."""
    (tmp_path / "plugin_methods.py").write_text(
        textwrap.dedent(
            """
            from vestige.core import Method, Paper, param

            class Guest(Method):
                "A method of a third party."

                name = "plugin-guest"
                paper = Paper(title="Elsewhere", year=2025)
                room = "context"

                size: int = param(2, "how many", ge=1)
            """
        )
    )
    (tmp_path / "plugin_broken.py").write_text("raise RuntimeError('out of order')\n")
    (tmp_path / "plugin_empty.py").write_text("")
    info = tmp_path / "plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[vestige.methods]\n"
        "plugin-guest = plugin_methods:Guest\n"
        "plugin-broken = plugin_broken:Broken\n"
        "plugin-empty = plugin_empty\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    registry_module._entries.cache_clear()
    yield
    registry_module._entries.cache_clear()
    for name in ("plugin_methods", "plugin_broken", "plugin_empty"):
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore:method 'plugin")
def test_third_parties_register_through_entry_points(plug_in):
    cards = {card.name: card for card in vestige.methods()}
    assert cards["plugin-guest"].room == "context" and cards["plugin-guest"].idea == "A method of a third party."
    method = vestige.method("plugin-guest", size=3)
    assert Method.from_spec(method.to_json()) == method
    with pytest.raises(SpecError, match="'size' is 0"):
        vestige.method("plugin-guest", size=0)
    with pytest.raises(SpecError, match="did you mean plugin-guest"):
        vestige.method("plugin-gest")


def test_a_broken_plug_in_takes_nothing_else_down(plug_in):
    with pytest.warns(UserWarning, match="'plugin-broken' of plugin_broken:Broken does not load: out of order"):
        cards = {card.name: card for card in vestige.methods()}
    assert cards["plugin-broken"].room == "?" and cards["plugin-broken"].paper is None
    with pytest.warns(UserWarning), pytest.raises(SpecError, match=r"'plugin-broken'.*out of order"):
        vestige.method("plugin-broken")
    with pytest.warns(UserWarning), pytest.raises(SpecError, match="plugin_empty was imported but does not define"):
        vestige.method("plugin-empty")


@pytest.mark.parametrize(
    "work",
    [
        "import vestige",
        "import vestige.core",
        "import vestige; vestige.methods()",
        "import vestige; vestige.Method, vestige.Paper, vestige.method, vestige.errors, dir(vestige), vestige.core",
        "from vestige.core import Ledger, Method, param",
    ],
)
def test_nothing_heavy_is_imported(work):
    heavy = "{'torch', 'transformers', 'numpy', 'pandas', 'plotly'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", f"import sys; {work}; print({heavy})"], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def test_the_doors_of_core_open():
    import vestige.core

    assert all(getattr(vestige.core, name) is not None for name in vestige.core.__all__)
    assert set(vestige.core.__all__) <= set(dir(vestige.core))
    with pytest.raises(AttributeError, match="no attribute 'Pach'"):
        _ = vestige.core.Pach
