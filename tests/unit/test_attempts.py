"""Failed attempts to authenticate: whose they are, how long replies wait, and that little is remembered."""

import pytest

from app.api import attempts
from app.api.attempts import FailedAttempts, client_address
from app.settings import Settings, SettingsError, load, parse_networks

PROXIES = parse_networks("10.0.0.0/8, 2001:db8::1")


class Clock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_the_reply_to_more_failures_than_a_minute_may_have_waits_longer_and_longer_up_to_a_limit(clock):
    failed = FailedAttempts(Settings(auth_attempts_per_minute=4, auth_delay_max_s=40), clock=clock)
    assert [failed.count("1.2.3.4") for _ in range(8)] == [0, 0, 0, 0, 15, 30, 40, 40]
    assert failed.count("1.2.3.5") == 0
    clock.now += 85
    assert [failed.count("1.2.3.4") for _ in range(4)] == [0, 0, 0, 15]
    clock.now += 1_000
    assert failed.count("1.2.3.4") == 0


def test_addresses_of_one_ipv6_site_are_one_client(clock):
    failed = FailedAttempts(Settings(auth_attempts_per_minute=1, auth_delay_max_s=60), clock=clock)
    assert [failed.count(one) for one in ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1")] == [0, 60, 0]


def test_few_addresses_are_remembered_those_that_failed_last(clock, monkeypatch):
    monkeypatch.setattr(attempts, "ADDRESSES_MAX", 3)
    failed = FailedAttempts(Settings(auth_attempts_per_minute=1, auth_delay_max_s=60), clock=clock)
    for last in (1, 2, 3, 2, 4):
        failed.count(f"1.1.1.{last}")
    assert list(failed._empty_at) == ["1.1.1.3", "1.1.1.2", "1.1.1.4"]


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        ("1.2.3.4", "", "1.2.3.4"),
        ("1.2.3.4", "5.6.7.8", "1.2.3.4"),
        ("10.0.0.1", "5.6.7.8", "5.6.7.8"),
        ("10.0.0.1", "9.9.9.9, 5.6.7.8", "5.6.7.8"),
        ("10.0.0.1", "9.9.9.9, 5.6.7.8, 10.0.0.2", "5.6.7.8"),
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "5.6.7.8, nonsense", "10.0.0.1"),
        ("10.0.0.1", "5.6.7.8:4711", "5.6.7.8"),
        ("2001:db8::1", "[2001:db8::2]:4711", "2001:db8::2"),
        ("2001:db8::1", "2001:db8::2", "2001:db8::2"),
        ("::ffff:10.0.0.1", "::ffff:5.6.7.8", "5.6.7.8"),
        ("10.0.0.1", "fe80::1%any text", "fe80::1"),
        (None, "5.6.7.8", "None"),
    ],
)
def test_a_client_is_named_by_trusted_proxies_only(peer, forwarded, client):
    assert str(client_address(peer, forwarded.split(","), PROXIES)) == client


def test_a_bad_address_of_a_proxy_is_refused():
    with pytest.raises(SettingsError, match=r"REPRISE_PROXIES='10\.0\.0\.1/8' is not valid"):
        load({"REPRISE_PROXIES": "10.0.0.1/8"})
