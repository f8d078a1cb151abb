from hypothesis import given, strategies as st
from strategies import *
import pytest
from kvtiers import testing

@pytest.mark.parametrize("what", ["conservation","contents","order","bounded","reading"])
@given(data=st.data())
def test_all(data, what):
    s = data.draw(settings_of())
    trial = testing.Trial.start(s.policy, s.geometry, s.rotary, seed=s.seed, steps=STEPS)
    for n in data.draw(cuts(s.policy)):
        c = trial.feed(n)
        if what == "order":
            if type(s.policy.realigner).__name__ != "Gaps": testing.order(trial, c)
        elif what == "conservation": testing.conservation(trial)
        else: getattr(testing, what)(trial, c)
