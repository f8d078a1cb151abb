from hypothesis import given, strategies as st
from strategies import *
from kvtiers import testing

@given(data=st.data())
def test_all(data):
    s = data.draw(settings_of())
    trial = testing.Trial.start(s.policy, s.geometry, s.rotary, seed=s.seed, steps=STEPS)
    for n in data.draw(cuts(s.policy)):
        c = trial.feed(n)
        testing.conservation(trial)
        testing.contents(trial, c)
        if type(s.policy.realigner).__name__ == "Anchored":
            testing.order(trial, c)
        testing.bounded(trial, c)
        testing.reading(trial, c)
