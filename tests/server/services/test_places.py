from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.services import places
from server.services.places import Places


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STRANGERS_MAX": 6, "ADDRESS_MAX": 3, "SITE_MAX": 2}.items():
        monkeypatch.setattr(places, name, value)


class House(Places):
    """Places of connections that note whom was hung up on."""

    def __init__(self) -> None:
        super().__init__()
        self.gone: list[tuple[str, int]] = []

    def come(self, host: str, port: int) -> None:
        self.enter((host, port), lambda: self.gone.append((host, port)))

    def go(self, host: str, port: int) -> None:
        if (host, port) in self._here:
            self.leave((host, port), self._here[host, port])


def test_an_address_takes_places_from_itself_first() -> None:
    house = House()
    house.come("10.0.0.1", 1)
    for port in range(5):
        house.come("10.0.0.2", port)
    assert house.gone == [("10.0.0.2", 0), ("10.0.0.2", 1)]


def test_the_neighbours_of_one_network_are_one_address() -> None:
    house = House()
    for port, host in enumerate(["2001:db8::1", "2001:db8::2", "2001:db8::3", "2001:db8:0:1::1", "2001:db8::4"]):
        house.come(host, port)
    assert house.gone == [("2001:db8::1", 0)]


def test_whoever_comes_has_a_place_and_the_oldest_stranger_goes() -> None:
    house = House()
    for number in range(8):
        house.come(f"10.0.1.{number}", 1)
    assert house.gone == [("10.0.1.0", 1), ("10.0.1.1", 1)]


def test_no_stranger_takes_a_sites_place() -> None:
    house = House()
    house.come("10.0.0.1", 1)
    assert house.prove(("10.0.0.1", 1), "NORTH")
    for number in range(100):
        house.come("10.0.0.1", 2 + number)
        house.come(f"10.0.1.{number}", 1)
    assert ("10.0.0.1", 1) not in house.gone


def test_a_site_has_so_many_and_those_that_it_leaves_again() -> None:
    house = House()
    for port in range(3):
        house.come("10.0.0.1", port)
    assert [house.prove(("10.0.0.1", port), "NORTH") for port in (0, 1, 2, 0)] == [True, True, False, True]
    assert house.prove(("10.0.0.1", 2), "SOUTH")
    house.go("10.0.0.1", 0)
    house.come("10.0.0.1", 3)
    assert house.prove(("10.0.0.1", 3), "NORTH")


def test_a_port_that_is_used_again_is_another_connection() -> None:
    """Whose time is its own."""
    house = House()
    before = lambda: house.gone.append(("before", 1))  # noqa: E731 (it is looked at for what it is)
    house.enter(("10.0.0.1", 1), before)
    house.go("10.0.0.1", 1)
    house.come("10.0.0.1", 1)
    house.expire(("10.0.0.1", 1), before)
    assert not house.gone


def test_the_end_of_a_connection_that_was_reset_takes_no_place_of_the_next_at_its_port() -> None:
    house, peer = House(), ("10.0.0.1", 1)
    house.enter(peer, reset := lambda: house.gone.append(("reset", 1)))
    house.come(*peer)
    house.leave(peer, reset)  # it is seen only now
    house.expire(peer, house._here[peer])
    assert house.gone == [peer]


def test_a_stranger_at_the_port_of_a_site_s_connection_is_not_that_site() -> None:
    """Which has ended, though its end was not seen yet."""
    house = House()
    for port in (1, 2):
        house.come("10.0.0.1", port)
        assert house.prove(("10.0.0.1", port), "north")
    house.come("10.0.0.1", 2)
    house.come("10.0.0.3", 1)
    assert house.prove(("10.0.0.3", 1), "north")  # that place is free again
    for port in range(8):
        house.come(f"10.0.1.{port}", 1)
    assert ("10.0.0.1", 2) in house.gone  # as a stranger's is
    assert ("10.0.0.1", 1) not in house.gone


def test_who_has_asked_is_not_silent() -> None:
    house, gone = House(), []
    for port in (1, 2):
        house.enter(("10.0.0.1", port), hang_up := lambda: gone.append(1))
        if port == 1:
            house.asks(("10.0.0.1", port))
        house.expire(("10.0.0.1", port), hang_up)
    assert gone == [1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.sampled_from(["come", "leave", "NORTH", "SOUTH"]))))
def test_there_are_never_more_than_there_may_be(events: list[tuple[int, int, str]]) -> None:
    """Of strangers, of an address, of a site, whatever comes and goes; and who was hung up on is not here."""
    house, here = House(), set()
    for network, port, what in events:
        peer = (f"10.0.0.{network}", port)
        if what == "come":
            house.come(*peer)
            here.add(peer)
        elif what == "leave":
            house.go(*peer)
            here.discard(peer)
        elif peer in house._here:
            house.prove(peer, what)
        here -= set(house.gone)
        house.gone.clear()
        strangers = [one for one in here if one not in house._sites]
        assert set(house._here) == here
        assert len(strangers) <= places.STRANGERS_MAX
        assert all(sum(one[0] == host for one in strangers) <= places.ADDRESS_MAX for host, _ in strangers)
        assert all(list(house._sites.values()).count(site) <= places.SITE_MAX for site in ("NORTH", "SOUTH"))
