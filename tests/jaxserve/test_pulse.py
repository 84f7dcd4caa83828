"""When an engine's loop counts as stalled."""

from jaxserve.pulse import Pulse


def test_a_loop_at_rest_is_never_stalled():
    pulse = Pulse()
    assert not pulse.stalled(1e9, 10.0)
    pulse.woken(5.0)
    pulse.turned(6.0, idle=True)
    assert not pulse.stalled(1e9, 10.0)


def test_a_step_that_takes_too_long_stalls_it_until_it_ends():
    pulse = Pulse()
    pulse.woken(5.0)
    pulse.turned(6.0, idle=False)
    assert not pulse.stalled(16.0, 10.0) and pulse.stalled(16.5, 10.0)
    pulse.woken(20.0)
    assert pulse.stalled(20.0, 10.0), "a turn that begins has completed nothing"
    pulse.turned(21.0, idle=False)
    assert not pulse.stalled(31.0, 10.0) and pulse.stalled(31.5, 10.0)


def test_a_turn_that_hangs_after_a_rest_stalls_it():
    pulse = Pulse()
    pulse.turned(1.0, idle=True)
    pulse.woken(100.0)
    assert not pulse.stalled(110.0, 10.0) and pulse.stalled(110.5, 10.0)
