"""Every causal language model that transformers can build tiny: it works, or it is refused before anything ran.

A model that does not work with a cache of transformers itself says nothing about tiers, and is counted apart.
"""

from collections import Counter

import pytest

pytest.importorskip("transformers", reason="needs the extra 'transformers'")

from every_model import LEFT_OUT, MODELS, POLICIES, QUICK, NotBuilt, build_tiny, outcome

CASES = [(policy, padded) for policy in POLICIES for padded in (False, True) if policy != "window" or not padded]
RIGHT = {"works", "refused", "by itself"}


@pytest.mark.parametrize("name", QUICK)
def test_a_model_works_or_is_refused_before_anything_ran(name: str) -> None:
    model = build_tiny(name)
    found = {(policy, padded): outcome(model, policy, padded=padded) for policy, padded in CASES}
    assert {case: said for case, said in found.items() if said.kind not in RIGHT} == {}
    assert any(said.kind != "by itself" for said in found.values())


@pytest.mark.slow
def test_no_causal_language_model_of_transformers_is_silently_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    kinds, bad, left_out = Counter[str](), {}, {}
    for name in MODELS:
        try:
            model = build_tiny(name)
        except NotBuilt as error:
            left_out[name] = str(error)
            continue
        found = {(policy, padded): outcome(model, policy, padded=padded) for policy, padded in CASES}
        kinds.update(said.kind for said in found.values())
        bad |= {(name, *case): said for case, said in found.items() if said.kind not in RIGHT}
        served = [said.kind for (policy, _), said in found.items() if policy == "full"]
        kinds["models served under full"] += all(kind == "works" for kind in served)
    kinds["models"] = len(MODELS) - len(left_out)
    with capsys.disabled():
        print(f"\n{dict(kinds)}")  # noqa: T201 (the count is what the sweep is for)
    assert bad == {}
    assert set(left_out) <= set(LEFT_OUT), left_out
    assert kinds["models served under full"] > 90
