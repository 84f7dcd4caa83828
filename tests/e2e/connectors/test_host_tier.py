"""OffloadingConnector beside NIXL: what left the device comes back, on P and on D."""

import pytest

from tests.e2e.connectors.eviction import evict_and_restore

pytestmark = [pytest.mark.e2e, pytest.mark.connectors, pytest.mark.timeout(900)]


def test_a_prompt_that_left_the_device_of_p_comes_back_from_offloading_connector(pair128, prompts):
    evict_and_restore(pair128.prefill, prompts, others=0, router_url=pair128.router_url)


def test_a_prompt_that_left_the_device_of_d_comes_back_from_its_host_tier(pair16, prompts):
    """D's own tier, asked directly; its children are in the other order."""
    evict_and_restore(pair16.decode, prompts, others=0)
