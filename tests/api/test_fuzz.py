"""Broken requests of every kind: none is a 5xx, every refusal is in shape, and what is refused asks nothing of the upstream."""

from tests.conftest import NewServer
from tests.fuzz.sending import Fuzzer, report
from tests.upstream import Upstream

REQUESTS = 1_500
SEED = 20_261


def test_broken_requests_are_refused_in_shape(new_server: NewServer):
    with Upstream() as upstream:
        fuzzer = Fuzzer(new_server(OPENAI_BASE_URL=upstream.base_url), upstream, SEED)
        wrong = fuzzer.run(0, REQUESTS, at_once=4) + fuzzer.afterwards()
    assert not wrong, "\n".join([*wrong[:20], report(fuzzer, wrong)])
    assert fuzzer.statuses.total() == REQUESTS
    assert fuzzer.statuses[400] > REQUESTS / 2
    assert fuzzer.statuses[200] > REQUESTS / 10
