"""Guidance: going on from the flow that a model tells without a prompt, through that of the prompt, and beyond."""

from collections.abc import Callable

from torch import Tensor


def guided(flow_of: Callable[[Tensor], Tensor], prompt: Tensor, without: Tensor | None, guidance: float) -> Tensor:
    """The flow `prompt + guidance * (prompt - without)`.

    flow_of: the flow that a model tells for an embedding. without: the embedding of no prompt, or of a negative one;
    None: there is none, and the prompt is looked at alone. guidance: 0 looks at the prompt alone too.

    Source: classifier-free guidance (arXiv 2207.12598, equation 6).
    """
    flow = flow_of(prompt)
    if without is None or guidance == 0:
        return flow
    return flow + guidance * (flow - flow_of(without))
