"""Policies by name, from TOML, and written down."""

import json
import sys
import time

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.cache import TieredCache
from kvtiers.errors import BudgetError, PluginError, PolicyError, SlotError, UnknownPolicyError
from kvtiers.geometry import Geometry
from kvtiers.hookspecs import hookimpl
from kvtiers.layered import resolve
from kvtiers.plugins import registry
from kvtiers.policy import SLOTS, Policy, Sink
from kvtiers.presets import describe, from_description, load_policy, policy
from kvtiers_policies.affinity import Affinity
from kvtiers_policies.recency import Recency

PRESETS = ("archive", "full", "packforcing-lm", "sliding-window", "streaming")


@attrs.frozen(kw_only=True)
class Every(Sink):
    nth: int = 2

    def is_anchor(self, block, sink):
        return block.start % self.nth == 0


class Odd:
    """A plugin whose factories go wrong in every way."""

    @hookimpl
    def kvtiers_sinks(self):
        return {"every": lambda nth=3: Every(nth=nth), "crashes": self.crash, "no-sink": dict, "exits": sys.exit}

    @hookimpl
    def kvtiers_policies(self):
        return {"bad-preset": lambda: policy("full", recent=-1), "no-preset": dict}

    def crash(self):
        raise RuntimeError("GPU on fire")


@pytest.fixture
def odd():
    with registry().registered(Odd(), "odd"):
        yield


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_survives_being_written_as_json(name):
    built = policy(name)
    written = json.loads(json.dumps(describe(built)))
    assert from_description(written) == built
    assert written["sinks"]["name"] in registry().names("sinks")


def test_the_sliding_window_equals_a_hugging_face_window_of_1024():
    assert policy("sliding-window").recent == 1023
    assert policy("sliding-window").sink_steps == 0


@pytest.mark.parametrize(
    "choice",
    [
        {"name": "affinity", "heads": "per-kv"},
        ("affinity", {"heads": "per-kv"}),
        Affinity(heads="per-kv"),
    ],
    ids=["mapping", "tuple", "instance"],
)
def test_a_slot_is_changed_by_mapping_tuple_or_instance(choice):
    assert policy("full", retriever=choice).retriever == Affinity(heads="per-kv")


def test_a_slot_is_changed_by_name_and_the_rest_stays():
    changed = policy("packforcing-lm", retriever="recency", recent=99)
    assert changed.retriever == Recency()
    assert changed.recent == 99
    preset = policy("packforcing-lm")
    assert attrs.evolve(changed, retriever=preset.retriever, recent=preset.recent) == preset


BAD = [
    pytest.param("steaming", {}, UnknownPolicyError, "unknown policy 'steaming'.*streaming.*Did you mean", id="preset"),
    pytest.param("full", {"retriever": "recensy"}, UnknownPolicyError, "Did you mean 'recency'", id="slot name"),
    pytest.param(
        "full", {"resent": 3}, PolicyError, "no setting 'resent'; settings: .*Did you mean 'recent'", id="field"
    ),
    pytest.param(
        "archive",
        {"digest_bitz": 3},
        PolicyError,
        "and the options of its choices.*Did you mean 'digest_bits'",
        id="option",
    ),
    pytest.param("full", {"sink": -1}, PolicyError, "sink must be a whole number of at least 0, got -1", id="negative"),
    pytest.param("full", {"block_size": 0}, PolicyError, "block_size", id="zero block"),
    pytest.param("full", {"top_k": 0}, PolicyError, "top_k", id="zero top_k"),
    pytest.param("full", {"recent": 1.5}, PolicyError, "recent", id="fraction"),
    pytest.param("full", {"recent": True}, PolicyError, "recent", id="true is no number"),
    pytest.param("full", {"refresh": "often"}, PolicyError, "refresh", id="refresh"),
    pytest.param("streaming", {"sink": 8, "recent": 8, "budget": 15}, BudgetError, "8 \\+ 8 = 16", id="budget"),
    pytest.param(
        "full",
        {"retriever": Every()},
        SlotError,
        "'retriever' takes an object of class Retriever, got Every",
        id="wrong kind",
    ),
    pytest.param("full", {"sinks": Every}, SlotError, "'sinks' takes an object of class Sink, got", id="a class"),
    pytest.param(
        "full", {"archive": None}, SlotError, "'archive' takes an object of class Archive, got None", id="none"
    ),
    pytest.param("full", {"archive": 7}, SlotError, "'archive' takes", id="a number"),
    pytest.param("full", {"retriever": {"heads": "mean"}}, PolicyError, "names nothing.*recency", id="no name"),
    pytest.param(
        "full", {"retriever": ("affinity", {"head": "mean"})}, PolicyError, "Did you mean 'heads'", id="option"
    ),
    pytest.param(
        "full",
        {"retriever": {"name": "affinity", "heads": "half"}},
        PolicyError,
        "retriever 'affinity' with {'heads': 'half'}: .*heads.*must be in",
        id="option value",
    ),
    pytest.param("full", {"retriever": {"name": "recency", "k": 1}}, PolicyError, "options: none", id="no options"),
    pytest.param(
        "full", {"compressor": ("mean-pool", {"ratio": "8"})}, PolicyError, "ratio.*options: ratio", id="type"
    ),
    pytest.param("full", {"compressor": ("mean-pool", {"ratio": 0})}, PolicyError, "'ratio' must be >= 1", id="ratio"),
    pytest.param(
        "full", {"compressor": ("top-tokens", {"by": "luck"})}, PolicyError, "'key-norm'.*got 'luck'", id="by"
    ),
    pytest.param(
        "packforcing-lm", {"compressor": "top-tokens"}, PolicyError, "'top-tokens' would never be asked", id="idle"
    ),
    pytest.param("full", {"archive": ("host", {"limit_bytes": 0})}, PolicyError, "limit_bytes", id="limit"),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), BAD)
def test_a_wrong_name_setting_or_slot_is_refused_with_what_would_be_right(name, changes, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        policy(name, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("full", {"sinks": "crashes"}, "sinks 'crashes' of plugin 'odd' .*failed: RuntimeError: GPU on fire"),
        ("full", {"sinks": "exits"}, "sinks 'exits' of plugin 'odd' .*failed: SystemExit"),
        ("full", {"sinks": "no-sink"}, "made a dict, which is no Sink"),
        ("bad-preset", {}, "policy 'bad-preset' of plugin 'odd' .*failed: PolicyError: recent"),
        ("no-preset", {}, "made a dict, which is no Policy"),
    ],
)
def test_a_factory_at_fault_is_blamed_on_its_plugin(odd, name, changes, message):
    with pytest.raises(PluginError, match=message):
        policy(name, **changes)


def test_a_factory_function_can_be_written_down_too(odd):
    changed = policy("full", sinks={"name": "every", "nth": 5})
    assert describe(changed)["sinks"] == {"name": "every", "nth": 5}
    assert from_description(describe(changed)) == changed


def test_what_no_plugin_provides_cannot_be_written_down():
    with pytest.raises(PolicyError, match="sinks Every cannot be written down: no plugin provides it by name"):
        describe(policy("full", sinks=Every()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("archive"), "must name every slot; missing: archive"),
        (lambda d: d.update(extra=1), "no setting 'extra'"),
        (lambda d: d.update(recent=-3), "recent must be"),
        (lambda d: d["retriever"].update(name="gone"), "unknown retriever 'gone'"),
    ],
)
def test_a_changed_description_is_refused(change, message):
    description = describe(policy("archive"))
    change(description)
    with pytest.raises(PolicyError, match=message):
        from_description(description)


def test_a_toml_file_changes_a_preset(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'policy = "packforcing-lm"\nrecent = 512\nchunk_size = "none"\ncompressor = "keep"\n'
        '[retriever]\nname = "affinity"\nheads = "mean"\nnormalise = "none"\n'
    )
    expected = policy(
        "packforcing-lm", recent=512, chunk_size=None, compressor="keep", retriever=Affinity(heads="mean")
    )
    assert load_policy(path) == expected
    assert load_policy(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("recent = 3", PolicyError, "must name the preset to start from"),
        ("policy = 3", PolicyError, "must name the preset"),
        ("policy = [", PolicyError, "is not valid TOML"),
        ('policy = "full"\nresent = 3', PolicyError, "Did you mean 'recent'"),
        ('policy = "ful"', UnknownPolicyError, "Did you mean 'full'"),
        ('policy = "full"\nretriever = 3', SlotError, "takes an object of class Retriever"),
        ('policy = "full"\nsink = "none"', PolicyError, "sink must be"),
        ('policy = "full"\n[retriever]\nname = "affinity"\nheds = "mean"', PolicyError, "Did you mean 'heads'"),
        ('policy = "full"\nname = "mine"', PolicyError, "no setting 'name'"),
        (f'policy = "full"\nx = {"[" * 9_999}', PolicyError, "is not valid TOML: RecursionError"),
        (f'policy = "full"\n[retriever]\nname = "affinity"\n[retriever.heads{".x" * 9_999}]', PolicyError, "too deep"),
        (f'policy = "full"\nrecent = 1{"0" * 400}', PolicyError, "at most 2147483647, got a number of 1329 bits"),
        (f'policy = "full"\nrecent = 1{"0" * 5_000}', PolicyError, "is not valid TOML: ValueError: Exceeds the limit"),
        (f'policy = "full"\nrecent = 0x1{"0" * 5_000}', PolicyError, "got a number of 20001 bits"),
        (f'policy = "full"\nretriever = {{name = "affinity", digest_tokens = 1{"0" * 400}}}', PolicyError, "1329 bits"),
        (f'policy = "archive"\ndigest_tokens = 1{"0" * 400}', PolicyError, r"digest_tokens must be less than 2\*\*63"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
def test_a_wrong_toml_file_is_refused_with_its_name_in_one_line(tmp_path, text, error, message):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(error, match=rf"(?s)mine\.toml.*{message}") as refused:
        load_policy(path)
    assert len(str(refused.value)) < 1_000


def test_a_number_of_any_size_is_named_without_writing_it_out():
    for name in ("sink", "recent", "top_k", "refresh"):
        with pytest.raises(PolicyError, match=f"{name} must be .*got a number of 33220 bits"):
            policy("full", **{name: -(10**10_000)})


def test_a_sink_of_a_billion_steps_is_no_work():
    """Counting them one by one took minutes."""
    started = time.perf_counter()
    found = policy("streaming", sink=10**9)
    assert found.sink_steps == 10**9
    assert found.timeline(Geometry(kv_heads=1, head_dim=4)).sink == 10**9
    assert found.bound(Geometry(kv_heads=1, head_dim=4)) > 10**9
    assert time.perf_counter() - started < 1


def test_a_sink_that_must_be_counted_block_by_block_is_refused_where_that_would_take_minutes():
    counted = policy("streaming", sinks=Every(nth=1), sink=1000)
    assert counted.sink_steps == 1000
    with pytest.raises(PolicyError, match=r"Every was asked for more than 100,000 blocks.*let it define steps\(\)"):
        _ = policy("streaming", sinks=Every(nth=1), sink=10**7).sink_steps


def test_settings_and_slots_differ_by_layer():
    found = resolve(
        "archive",
        layers=[3, 4, 5],
        recent={3: 64, "*": 128},
        top_k=lambda layer: layer,
        retriever={4: "recency", "*": ("page-bounds", {"digest_tokens": 4})},
        compressor={3: {"name": "mean-pool", "ratio": 2}},
        attend={3: "compressed"},
    )
    assert [one.recent for one in found] == [64, 128, 128]
    assert [one.top_k for one in found] == [3, 4, 5]
    assert [type(one.retriever).__name__ for one in found] == ["PageBounds", "Recency", "PageBounds"]
    assert found[0].retriever.digest_tokens == 4
    assert [type(one.compressor).__name__ for one in found] == ["MeanPool", "Keep", "Keep"]
    assert [one.attend for one in found] == ["compressed", "full", "full"]
    cache = TieredCache(found, [Geometry(kv_heads=1, head_dim=4)] * 3)
    for index, one in enumerate(found):
        assert cache.new_layer(index, 1).policy is one
    same = resolve("archive", layers=[0, 1], archive={"name": "host", "limit_bytes": 9})
    assert same[0] is same[1]
    assert same[0].archive.limit_bytes == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retriever": {7: "recency"}}, "retriever is set for layer 7, which is not tiered; layers: 0, 1"),
        ({"recent": {"all": 3}}, "recent is set for layer 'all'"),
        ({"heads": {0: "mean"}}, "heads is no slot or setting of a policy"),
        ({"retriever": {0: "recensy"}}, "Did you mean 'recency'"),
    ],
)
def test_a_wrong_choice_by_layer_is_refused(changes, message):
    with pytest.raises(PolicyError, match=message):
        resolve("archive", layers=[0, 1], **changes)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"], ids=["missing", "not text"])
def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PolicyError, match=r"mine\.toml' cannot be read"):
        load_policy(path)


@given(data=st.data())
def test_any_mix_of_named_slots_survives_being_written_down(data):
    slots = {slot: data.draw(st.sampled_from(registry().names(slot))) for slot in SLOTS}
    sizes = data.draw(
        st.fixed_dictionaries(
            {"sink": st.integers(0, 99), "recent": st.none() | st.integers(0, 99), "block_size": st.integers(1, 64)}
        )
    )
    built = policy("full", **slots, **sizes)
    assert isinstance(built, Policy)
    assert from_description(json.loads(json.dumps(describe(built)))) == built


def test_an_option_of_a_slots_choice_is_one_word():
    assert policy("packforcing", branches="hr").compressor.branches == "hr"
    both = policy("packforcing", retriever="affinity", heads="per-kv", positions="corner")
    assert (both.retriever.heads, both.compressor.positions) == ("per-kv", "corner")
    assert policy(both, rows="mean").retriever.rows == "mean"
    with pytest.raises(PolicyError, match="no setting 'brunches'"):
        policy("packforcing", brunches="hr")
    with pytest.raises(PolicyError, match="no setting 'branches'"):
        policy("archive", branches="hr")
    with pytest.raises(PolicyError, match=r"with \{'branches': 'left'\}: 'branches' must be in"):
        policy("packforcing", branches="left")


def test_an_option_that_two_slots_have_must_say_whose_it_is():
    @attrs.frozen(kw_only=True)
    class Elsewhere(type(policy("archive").archive)):
        heads: str = "none"

    found = attrs.evolve(policy("packforcing-lm"), archive=Elsewhere())
    with pytest.raises(PolicyError, match="'heads' is an option of retriever and of archive; write which"):
        policy(found, heads="mean")
