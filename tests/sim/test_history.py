"""A fault is remembered with those whom it struck, and with when it was over."""

from jaxserve.sim.history import History


def test_a_fault_of_a_moment_is_known_from_its_moment_on():
    history = History()
    history.strike("X38", ("p", "d"), 10.0)
    history.strike("X38", ("p", "d"), 5.0)
    assert history.of_host(("X1", "X38"), "p", 10.0)
    assert not history.of_host(("X38",), "p", 10.5), "it struck before"
    assert not history.of_host(("X38",), "d", 0.0), "it only notices"
    assert not history.of_host(("X1",), "p", 0.0), "it was another"


def test_a_fault_that_lasts_is_there_until_it_ends_and_so_is_another_of_its_kind():
    history = History()
    first, second = history.begin("X45", ("d",)), history.begin("X45", ("d",))
    assert history.of_host(("X45",), "d", 100.0)
    history.end(first, 20.0)
    history.end(first, 20.0)
    assert history.of_host(("X45",), "d", 100.0), "the second lasts"
    history.end(second, 30.0)
    assert history.of_host(("X45",), "d", 30.0) and not history.of_host(("X45",), "d", 30.5)
    assert history.near("d", 30.0) == {"X45"} and not history.near("d", 30.5)


def test_what_goes_on_between_two_hosts_concerns_no_third():
    history = History()
    history.strike("X7", ("p", "d"), 10.0)
    history.strike("X7", ("m",), 10.0)
    assert history.of_pair(("X7",), "d", "p", 10.0) and history.of_pair(("X7",), "p", "d", 10.0)
    assert not history.of_pair(("X7",), "p", "other", 0.0)
    assert history.of_pair(("X7",), "m", "m", 0.0), "who reads from itself"
    assert not history.of_pair(("X7",), "m", "p", 0.0) and not history.of_pair(("X7",), "p", "p", 0.0)
    assert history.near("d", 10.0) == {"X7"} and history.near("other", 0.0) == set()
