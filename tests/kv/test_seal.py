"""What passes through clients and routers: comes back as it went, or is refused."""

import base64
import copy
import json
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv.moves import LeaseTerms
from kv.seal import (
    CompatFacts,
    Identity,
    ParamsKind,
    SealError,
    compat_hash,
    open_sealed,
    prompt_digest,
    read_params,
    seal,
)

KEY = bytes(range(32))
WHO = Identity(engine_id="prefill-0", epoch="ab" * 16, host="10.0.0.7", port=5600, tp_size=2, page_size=16)
TERMS = LeaseTerms(
    request_id="cmpl-1-0badcafe",
    pages=((4, 9, 11), (0, 9, 12)),
    generations=((1, 2**32 - 1, 3), (0, 7, 8)),
    num_tokens=40,
    cached_tokens=16,
)
PROMPT = prompt_digest(range(41), "")
VLLM_KEYS = {
    "do_remote_prefill",
    "do_remote_decode",
    "remote_block_ids",
    "remote_engine_id",
    "remote_request_id",
    "remote_host",
    "remote_port",
    "tp_size",
    "dcp_size",
    "pp_size",
    "remote_num_tokens",
    "remote_blocks_expiry_time",
    "remote_registration_generation",
    "transfer_mode",
    "remote_prefill_cached_tokens",
}
USED = VLLM_KEYS - {"do_remote_prefill", "do_remote_decode", "remote_blocks_expiry_time"} | {"remote_lease"}


def sealed() -> dict[str, Any]:
    return seal(TERMS, who=WHO, prompt=PROMPT, key=KEY)


def as_floats(value: Any) -> Any:
    """As a router that knows only floats sends it on."""
    if isinstance(value, dict):
        return {name: as_floats(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [as_floats(entry) for entry in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def test_the_keys_are_vllms_and_one_of_ours() -> None:
    params = sealed()
    assert set(params) == VLLM_KEYS | {"remote_lease"}
    assert (params["do_remote_prefill"], params["do_remote_decode"]) == (True, False)
    assert params["remote_block_ids"] == [[4, 9, 11], [0, 9, 12]]
    assert params["remote_blocks_expiry_time"] is None and params["transfer_mode"] == "pull"
    assert params["remote_host"] == "10.0.0.7" and params["remote_port"] == 5600
    assert params["remote_num_tokens"] == 40 and params["remote_prefill_cached_tokens"] == 16


def test_what_was_sealed_is_what_is_opened() -> None:
    source = open_sealed(json.loads(json.dumps(sealed())), prompt=PROMPT, key=KEY)
    assert (source.engine_id, source.epoch, source.request_id) == (WHO.engine_id, WHO.epoch, TERMS.request_id)
    assert (source.host, source.port, source.page_size) == (WHO.host, WHO.port, WHO.page_size)
    assert (source.pages, source.generations) == (TERMS.pages, TERMS.generations)
    assert (source.num_tokens, source.cached_tokens) == (TERMS.num_tokens, TERMS.cached_tokens)


def test_routers_may_send_floats_another_order_and_more_keys() -> None:
    params = as_floats(sealed())
    shuffled = {"trace_id": "7", **dict(reversed(params.items())), "_hops": 3.5}
    source = open_sealed(shuffled, prompt=PROMPT, key=KEY)
    assert source == open_sealed(sealed(), prompt=PROMPT, key=KEY)
    assert type(source.port) is int and all(type(page) is int for group in source.pages for page in group)


@pytest.mark.parametrize("name", sorted(USED))
def test_a_missing_or_null_key_is_named(name: str) -> None:
    params = sealed()
    params[name] = None
    with pytest.raises(SealError, match=f"^{name} is missing$"):
        open_sealed(params, prompt=PROMPT, key=KEY)
    del params[name]
    with pytest.raises(SealError, match=f"^{name} is missing$"):
        open_sealed(params, prompt=PROMPT, key=KEY)


@pytest.mark.parametrize("name", sorted(USED))
@pytest.mark.parametrize(
    "value",
    [True, 0.5, float("nan"), float("inf"), -1, 1e300, 10**400, "", "x" * 513, [], {}, [[True]], [[0.5]],
     [[-1]], [["1"]], [3], [[1], 3], [[]] * 65, [[2**31]], "\ud800", b"bytes"],
)  # fmt: skip
def test_a_value_of_a_wrong_kind_or_size_is_refused_by_name(name: str, value: Any) -> None:
    params = sealed()
    params[name] = value
    with pytest.raises(SealError, match=f"{name}|the seal is not ours") as refused:
        open_sealed(params, prompt=PROMPT, key=KEY)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_page_lists_are_bounded() -> None:
    params = sealed()
    params["remote_block_ids"] = [[1] * 500_000, [1] * 500_001]
    with pytest.raises(SealError, match="remote_block_ids has more than 1000000 pages"):
        open_sealed(params, prompt=PROMPT, key=KEY)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("remote_block_ids", [[4, 9, 10], [0, 9, 12]]),
        ("remote_block_ids", [[4, 9, 11, 0], [9, 12]]),
        ("remote_engine_id", "prefill-1"),
        ("remote_request_id", "cmpl-2-0badcafe"),
        ("remote_host", "10.6.6.6"),
        ("remote_port", 5601),
        ("tp_size", 1),
        ("dcp_size", 2),
        ("pp_size", 2),
        ("remote_num_tokens", 41),
        ("remote_registration_generation", 1),
        ("transfer_mode", "push"),
        ("remote_prefill_cached_tokens", 0),
    ],
)
def test_a_changed_field_breaks_the_seal(name: str, value: Any) -> None:
    params = sealed()
    assert params[name] != value
    params[name] = value
    with pytest.raises(SealError, match="the seal is not ours or something in it was changed"):
        open_sealed(params, prompt=PROMPT, key=KEY)


@given(st.data())
def test_any_flipped_bit_of_the_opaque_string_is_refused(data: st.DataObject) -> None:
    params = sealed()
    blob = bytearray(base64.b64decode(params["remote_lease"]))
    at = data.draw(st.integers(0, len(blob) * 8 - 1))
    blob[at // 8] ^= 1 << at % 8
    params["remote_lease"] = base64.b64encode(blob).decode()
    with pytest.raises(SealError, match="remote_lease"):
        open_sealed(params, prompt=PROMPT, key=KEY)


@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda b: base64.b64encode(b).decode())))
def test_any_other_opaque_string_is_refused(text: str) -> None:
    params = {**sealed(), "remote_lease": text}
    with pytest.raises(SealError, match="remote_lease"):
        open_sealed(params, prompt=PROMPT, key=KEY)


def test_another_key_another_version_and_a_mixed_seal_are_refused() -> None:
    with pytest.raises(SealError, match="the seal is not ours"):
        open_sealed(sealed(), prompt=PROMPT, key=KEY[::-1])
    blob = b"\x02" + base64.b64decode(sealed()["remote_lease"])[1:]
    with pytest.raises(SealError, match="remote_lease is of version 2"):
        open_sealed({**sealed(), "remote_lease": base64.b64encode(blob).decode()}, prompt=PROMPT, key=KEY)
    other = seal(TERMS, who=Identity(**{**facts(WHO), "port": 5601}), prompt=PROMPT, key=KEY)
    with pytest.raises(SealError, match="the seal is not ours"):
        open_sealed({**sealed(), "remote_lease": other["remote_lease"]}, prompt=PROMPT, key=KEY)


def facts(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in type(value).__dataclass_fields__}


def test_a_seal_serves_only_its_prompt() -> None:
    for tokens, salt in ((range(40), ""), (range(1, 42), ""), (range(41), "tenant-b")):
        with pytest.raises(SealError, match="the prompt is not the one that was prefilled"):
            open_sealed(sealed(), prompt=prompt_digest(tokens, salt), key=KEY)


def test_our_own_seal_over_nonsense_is_refused() -> None:
    short = LeaseTerms(request_id="r", pages=((1, 2),), generations=((1,),), num_tokens=1)
    with pytest.raises(SealError, match="one generation per page"):
        open_sealed(seal(short, who=WHO, prompt=PROMPT, key=KEY), prompt=PROMPT, key=KEY)
    many = LeaseTerms(request_id="r", pages=((1, 2),), generations=((1, 1),), num_tokens=33)
    with pytest.raises(SealError, match="more tokens than the pages"):
        open_sealed(seal(many, who=WHO, prompt=PROMPT, key=KEY), prompt=PROMPT, key=KEY)


@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=40), min_size=1, max_size=4), st.randoms())
def test_any_terms_survive_a_router(pages: list[list[int]], chance: random.Random) -> None:
    terms = LeaseTerms(
        request_id="réquest",
        pages=tuple(map(tuple, pages)),
        generations=tuple(tuple(chance.randrange(2**32) for _ in group) for group in pages),
        num_tokens=min(map(len, pages)) * WHO.page_size,
    )
    params = json.loads(json.dumps(as_floats(seal(terms, who=WHO, prompt=PROMPT, key=KEY))))
    before = copy.deepcopy(params)
    source = open_sealed(params, prompt=PROMPT, key=KEY)
    assert (source.pages, source.generations) == (terms.pages, terms.generations)
    assert params == before


def test_prompts_and_salts_have_names_of_their_own() -> None:
    names = {prompt_digest(*case) for case in (((), ""), ((1,), ""), ((1, 2), ""), ((12,), ""), ((1,), "2"))}
    assert len(names) == 5 and all(len(name) == 64 for name in names)
    assert prompt_digest([1, 2], "s") == prompt_digest((1, 2), "s")
    assert (
        prompt_digest((1, 2, 3), "s") == "a6a80b3fe2a26e2cdbafd7e3e2e48cf275794b8684d34e87a2360ac6e1edf118"
    ), "peers of other releases know it by this name"


COMPAT = CompatFacts(
    protocol=1,
    cache_key="smollm2@1",
    dtype="bfloat16",
    page_shape=(30, 2, 3, 64),
    num_layers=30,
    kv_heads=3,
    head_dim=64,
    digest="xxh3",
)


@pytest.mark.parametrize("name", list(CompatFacts.__dataclass_fields__))
def test_every_fact_changes_the_compatibility_hash(name: str) -> None:
    old = getattr(COMPAT, name)
    new = (*old, 1) if isinstance(old, tuple) else old + type(old)(1)
    assert compat_hash(CompatFacts(**{**facts(COMPAT), name: new})) != compat_hash(COMPAT)


def test_the_compatibility_hash_is_the_same_everywhere() -> None:
    assert compat_hash(COMPAT) == "d073776716d6cf57a1003fdd54ccda7c09cae2fd4ce3f1e58bcc8ae1b04358da"


TOY_PROXY = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, ParamsKind.NOTHING),
        ({}, ParamsKind.NOTHING),
        ({"do_remote_decode": False, "do_remote_prefill": None, "note": 1}, ParamsKind.NOTHING),
        (TOY_PROXY, ParamsKind.LEASE),
        ({"do_remote_decode": True}, ParamsKind.LEASE),
        ({"do_remote_prefill": True}, ParamsKind.SOURCE),
        (sealed(), ParamsKind.SOURCE),
    ],
)
def test_what_a_client_asks_for_is_read(value: object, kind: ParamsKind) -> None:
    assert read_params(value) is kind


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([], "kv_transfer_params"),
        ("x", "kv_transfer_params"),
        (1, "kv_transfer_params"),
        ({"do_remote_decode": True, "do_remote_prefill": True}, "do_remote_prefill"),
        ({"do_remote_decode": 1}, "do_remote_decode"),
        ({"do_remote_prefill": "true"}, "do_remote_prefill"),
        ({**TOY_PROXY, "remote_host": "10.6.6.6"}, "remote_host"),
        ({**TOY_PROXY, "remote_block_ids": [[1]]}, "remote_block_ids"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(value: object, names: str) -> None:
    with pytest.raises(SealError, match=names):
        read_params(value)
