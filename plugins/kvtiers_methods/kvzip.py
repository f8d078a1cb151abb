"""Compressor `kvzip`: of a context stays what the model attends when it repeats that context.

Source: KVzip (arXiv 2505.23416) section 3 and algorithm 1 (appendix A). A token's score is the largest attention that
any query of the repetition, of any query head of its KV head, gives it. `reconstruct` has the model repeat a context:

    with tiered(model, "kvzip", most=500) as cache:
        read = lambda ids: model(ids, cache=cache)
        read(context)
        reconstruct(cache, read, context, prompt)  # prompt: the ids of "Repeat the previous context:"

Deviations: every KV head keeps as many tokens (the paper's uniform budget; by default it compares heads and layers with
each other). A part of a context longer than `chunk` is repeated with all of the context in view, where the paper
normalises over that part alone. The last token of the context always stays. A cache is compressed once.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import attrs
import torch
from attrs import validators as v
from jaxtyping import Int
from torch import Tensor

from kvtiers.blocks import Blocks
from kvtiers.errors import PolicyError
from kvtiers.geometry import Geometry
from kvtiers.slots import Attention, Moment
from kvtiers_methods.whole_past import Past, WholePast, best

_PROMPT = "\n\nRepeat the previous context exactly.\n\n"
"""What asks for the repetition, where `Compressor.after_reading` is called."""
_LEAD = 8
"""Tokens before a further part of a context that are given as its beginning."""


@attrs.frozen(kw_only=True)
class KVzip(WholePast):
    """All that leaves recent stays and its attention counts from zero; the next time, `most` tokens a KV head stay.

    longest: the most tokens that a context may have.
    """

    attention: ClassVar[Attention | None] = "max"
    longest: int = attrs.field(default=131_072, validator=[v.instance_of(int), v.ge(1)])

    def rewrite(self, leaving: Blocks, mid: Blocks | None, moment: Moment) -> Blocks | None:
        past = Past.of(leaving, mid)
        scores, count = self.scores(past, moment), past.keys.shape[2]
        repeated = mid is not None and mid.attention is not None and bool(mid.attention.any())
        if not repeated and count > self.longest:
            raise PolicyError(f"a context of {count} tokens is more than longest = {self.longest}; raise it")
        anew = attrs.evolve(past, attention=torch.zeros_like(past.noted()).flatten(1, 2))
        return anew.block(best(scores, self.most if repeated else count), close_up=self.close_up)

    @property
    def kept_after_reading(self) -> int | None:
        return self.most

    def after_reading(
        self,
        cache: Any,
        read: Callable[[Tensor], object],
        context: Int[Tensor, "rows tokens"],
        encode: Callable[[str], list[int]],
    ) -> None:
        prompt = context.new_tensor([encode(_PROMPT)]).expand(context.shape[0], -1)
        reconstruct(cache, read, context, prompt)

    def scores(self, past: Past, moment: Moment) -> Tensor:
        """What leaves now was not repeated, and stays."""
        found = past.noted().amax(2) + past.bias
        stays = torch.zeros_like(found)
        stays[..., -past.leaving.count * past.leaving.tokens :] = 2  # more than any attention
        return found + stays

    def mid_tokens(self, geometry: Geometry) -> int:
        return max(self.longest, self.most)


def reconstruct(
    cache: Any,
    read: Callable[[Tensor], object],
    context: Int[Tensor, "rows tokens"],
    prompt: Int[Tensor, "rows words"],
    further: Int[Tensor, "rows words"] | None = None,
    *,
    chunk: int = 2048,
) -> None:
    """Compress `context`, the ids of what `cache` holds, by having the model repeat it; `read` feeds ids to the model.

    The policy of the cache has the compressor `kvzip` and `recent=None`. prompt, further: ids that ask for the context,
    and for a further part of it (None: the same); a part has `chunk` tokens. Of the repetition nothing is kept.
    """
    if cache.tier_counts().get("mid"):
        raise PolicyError(
            "a part of this cache was compressed before; begin a new one, read the context and compress it"
        )
    parts = context.split(chunk, 1)
    cache.compact(recent=1)
    for number, part in enumerate(parts):
        asked = [prompt if further is None or not number else further, part]
        if number:
            asked.insert(1, parts[number - 1][:, -_LEAD:])
        ids, more = torch.cat(asked, 1), number + 1 < len(parts)
        read(ids)
        cache.compact(recent=ids.shape[1] + more)  # once the last token leaves, the compressor chooses
        cache.rewind_recent()
        if more:
            read(context[:, -1:])
