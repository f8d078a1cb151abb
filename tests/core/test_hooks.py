"""Each hook on its own: what a plugin returns from it is what a user gets. test_hooks_documented.py counts them."""

from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import pytest
import torch
from click.testing import CliRunner

import kvtiers
from kvtiers.cli import main
from kvtiers.events import Committed, Event
from kvtiers.observers import Observers
from kvtiers.planning import Shape
from kvtiers.plugins import Registry, registry
from kvtiers_policies.memory import MemoryBlockStore

GEOMETRY = kvtiers.Geometry(kv_heads=2, head_dim=4)


@attrs.frozen(kw_only=True)
class UpTo(kvtiers.Sink):
    upto: int = 3

    def is_anchor(self, block: kvtiers.Extent, sink: int) -> bool:
        return block.start < min(self.upto, sink)


class Same(kvtiers.Compressor):
    keeps = True

    def age(self, blocks: kvtiers.Blocks, moment: kvtiers.Moment) -> kvtiers.Blocks:
        return blocks

    def compressed_tokens(self, tokens: int) -> int:
        return tokens


class Oldest(kvtiers.Retriever):
    needs_query = False
    needs_digests = False

    def score(self, query: object, digests: object, archived: int, moment: kvtiers.Moment) -> torch.Tensor:
        return -torch.arange(archived, dtype=torch.float32, device=moment.device)[None, None]


class Still(kvtiers.Realigner):
    rotates = False

    def place(self, *, starts: torch.Tensor, **_: object) -> kvtiers.Placement:
        return kvtiers.Placement(sink_shift=0, mid_starts=starts.double(), recent_shift=0)


class Here(kvtiers.Archive):
    location = "device"

    def open(self, budget: kvtiers.ByteBudget) -> kvtiers.BlockStore:
        return MemoryBlockStore("device", budget)


@attrs.frozen
class Halved(kvtiers.Codec):
    """Keys and values divided by two: what is written differs from what is read."""

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"half keys": keys / 2, "half values": values / 2}

    def decode(self, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return parts["half keys"] * 2, parts["half values"] * 2

    def block_bytes(self, tokens: int, geometry: kvtiers.Geometry) -> int:
        return tokens * geometry.token_bytes


@pytest.fixture
def plugged() -> Iterator[Any]:
    """Register an object with one hook for the length of a test."""
    names = []

    def plug(hook: str, answer: Any) -> None:
        plugin = type(f"With_{hook}", (), {hook: kvtiers.hookimpl(answer)})()
        names.append(registry().register(plugin).name)

    yield plug
    for name in names:
        registry().unregister(name)


def fed(policy: kvtiers.Policy, *, steps: int = 20, **options: Any) -> kvtiers.Layer:
    layer = kvtiers.Layer(policy=policy, geometry=GEOMETRY, **options)
    for step in range(steps):
        x = torch.full((1, 2, 1, 4), float(step))
        layer.write(x, x)
        layer.select(x)
    return layer


def test_kvtiers_policies_adds_a_preset(plugged: Any) -> None:
    plugged("kvtiers_policies", lambda self: {"mine": lambda: kvtiers.policy("streaming", sink=7)})
    assert kvtiers.policy("mine", recent=9) == kvtiers.policy("streaming", sink=7, recent=9)


def test_kvtiers_sinks_adds_a_choice_of_anchors(plugged: Any) -> None:
    plugged("kvtiers_sinks", lambda self: {"mine": UpTo})
    made = kvtiers.policy(
        "streaming", sinks={"name": "mine", "upto": 2}, sink=8, recent=4, block_size=2, realigner="original"
    )
    assert made.sink_steps == 2
    assert fed(made).tier_counts()["sink"] == 2


def test_kvtiers_compressors_adds_a_form_for_blocks(plugged: Any) -> None:
    plugged("kvtiers_compressors", lambda self: {"mine": Same})
    made = kvtiers.policy("archive", compressor="mine", recent=4, block_size=2)
    assert isinstance(made.compressor, Same)
    assert fed(made).tier_counts()["dropped"] == 0


def test_kvtiers_retrievers_adds_a_way_to_choose_blocks(plugged: Any) -> None:
    plugged("kvtiers_retrievers", lambda self: {"mine": Oldest})
    made = kvtiers.policy("archive", retriever="mine", sink=0, recent=4, block_size=2, top_k=2)
    context = fed(made).context()
    assert context.values[0, 0, :4, 0].tolist() == [0, 1, 2, 3]


def test_kvtiers_realigners_adds_a_placement(plugged: Any) -> None:
    plugged("kvtiers_realigners", lambda self: {"mine": Still})
    made = kvtiers.policy("streaming", realigner="mine", sink=2, recent=4, block_size=2)
    context = fed(made).context()
    assert context.placed.flatten().tolist() == context.origins.flatten().tolist()


def test_kvtiers_archives_adds_a_place(plugged: Any) -> None:
    plugged("kvtiers_archives", lambda self: {"mine": Here})
    made = kvtiers.policy("archive", archive="mine", recent=4, block_size=2)
    assert fed(made).history.count > 0
    assert type(made.archive) is Here


def test_kvtiers_codecs_adds_a_way_to_write_blocks(plugged: Any) -> None:
    plugged("kvtiers_codecs", lambda self: {"mine": Halved})
    changes = {"retriever": "recency", "recent": 4, "block_size": 2, "top_k": 3}
    layer = fed(kvtiers.policy("archive", codec="mine", **changes))
    assert torch.equal(layer.context().keys, fed(kvtiers.policy("archive", **changes)).context().keys)
    assert set(layer.history.stores["full"].parts()) == {"half keys", "half values"}


def test_kvtiers_shapes_adds_a_model_that_can_be_planned_for(plugged: Any) -> None:
    asked = []

    def known(model: str, *, tokens: int, dtype: torch.dtype, **_: Any) -> Shape | None:
        asked.append(model)
        geometry = kvtiers.Geometry(kv_heads=2, head_dim=4, dtype=dtype)
        shape = Shape(name="my model", layers=3, geometry=geometry, steps=tokens, growth_steps=1, growth_unit="token")
        return shape if model == "mine" else None

    plugged("kvtiers_shapes", lambda self: {"mine": known})
    planned = CliRunner(env={"COLUMNS": "120"}).invoke(main, ["plan", "--model", "mine", "--tokens", "777", "full"])
    assert planned.exit_code == 0, planned.output
    assert "my model" in planned.output
    assert "777" in planned.output
    assert asked == ["mine"]


def test_kvtiers_observe_is_told_of_every_commit(plugged: Any) -> None:
    told: list[Event] = []
    plugged("kvtiers_observe", lambda self, event: told.append(event))
    fed(kvtiers.policy("archive", recent=4, block_size=2), steps=5, layer=3, observe=Observers(None))
    commits = [event for event in told if isinstance(event, Committed)]
    assert sum(event.tokens for event in commits) >= 4
    assert {event.layer for event in told} == {3}


def test_without_an_observer_nothing_is_told() -> None:
    assert not Registry([("quiet", type("Quiet", (), {})())]).observers_active()
