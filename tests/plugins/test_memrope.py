"""Compressor `memrope` against running means by hand."""

import torch

from distances import near
from kvtiers import Geometry, Layer, policy
from strategies import attend, rotary

FRAME, BLOCK = 4, 3
GEOMETRY = Geometry(kv_heads=2, head_dim=12, grid=(2, 2), steps_per_commit=BLOCK, causal=False)


def blocks(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [tuple(torch.randn(2, 1, 2, BLOCK * FRAME, 12, generator=generator).unbind()) for _ in range(count)]


def test_mid_is_two_frames_of_running_means_that_are_placed_behind_the_sink():
    turn = rotary(12)
    chosen = policy("memrope", recent=BLOCK, slow=0.2, fast=0.5)
    layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=turn)
    made = blocks(6)
    for keys, values in made:
        layer.write(keys, values, replace=True)
        layer.commit()
    now = made[0]
    layer.write(*now, replace=True)
    layer.select(now[0])
    context = layer.context()
    wanted_keys, wanted_values = [], []
    for part, found in ((0, wanted_keys), (1, wanted_values)):
        slow = fast = made[1][part].mean(2)  # the first block is the sink, the last one recent
        for block in made[2:5]:
            slow = 0.8 * slow + 0.2 * block[part].mean(2)
            fast = 0.5 * fast + 0.5 * block[part].mean(2)
        found += [made[0][part], *(mean[:, :, None].expand(-1, -1, FRAME, -1) for mean in (slow, fast))]
        found += [made[5][part], now[part]]
    places = GEOMETRY.positions(0, BLOCK + 2 + 2 * BLOCK)
    keys, values = turn.rotate(torch.cat(wanted_keys, 2), places), torch.cat(wanted_values, 2)
    seen = torch.ones(BLOCK * FRAME, keys.shape[2], dtype=torch.bool)
    query = turn.rotate(now[0], places[-BLOCK * FRAME :])
    wanted = attend(query, keys, values, seen)
    assert context.keys.shape[2] == keys.shape[2]
    got = attend(layer.place_query(now[0]), context.keys, context.values, seen)
    turned_first = turn.rotate(made[1][0], GEOMETRY.positions(BLOCK, 2 * BLOCK)).mean(2)
    near("memrope", (got - wanted).abs().max(), (turned_first - wanted_keys[1][:, :, 0]).abs().max(), apart=0.01)


def test_where_keys_are_rotated_already_they_are_averaged_as_they_were_before():
    """Under `original` the layer is given rotated keys, and the two frames lie where the last steps were that left."""
    turn, found = rotary(12), {}
    for realigner in ("original", "contiguous"):
        chosen = policy("memrope", realigner=realigner, recent=BLOCK, slow=0.2, fast=0.5)
        layer = Layer(policy=chosen, geometry=GEOMETRY, rotary=turn)
        for nth, (keys, values) in enumerate(blocks(6)):
            at = GEOMETRY.positions(nth * BLOCK, (nth + 1) * BLOCK)
            layer.write(turn.rotate(keys, at) if realigner == "original" else keys, values, replace=True)
            layer.commit()
        found[realigner] = layer.history.rewritten
    assert torch.equal(found["original"].values, found["contiguous"].values)
    places = GEOMETRY.positions(5 * BLOCK - 2, 5 * BLOCK)
    wanted = turn.rotate(found["contiguous"].keys[:, :, 0], places)
    assert (found["original"].keys[:, :, 0] - wanted).abs().max() < 1e-5
