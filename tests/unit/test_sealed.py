"""Sealed content: opened by the key that sealed it, by no other, and not when it was changed."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.sealed import KEY_BYTES, Seal, parse_key

SEAL = Seal(bytes(range(KEY_BYTES)))


@given(st.text())
def test_what_is_sealed_is_opened_as_it_was(text: str):
    assert SEAL.open(SEAL.close(text)) == text


def test_the_text_can_t_be_read_in_its_sealed_form():
    sealed = SEAL.close("a secret thought")
    assert "secret" not in sealed and b"secret" not in base64.urlsafe_b64decode(sealed)
    assert SEAL.close("a secret thought") != sealed


@given(st.text())
def test_what_nobody_sealed_counts_as_absent(text: str):
    assert SEAL.open(text) is None


def test_half_a_surrogate_pair_counts_as_absent():
    assert SEAL.open("\ud83d") is None


def test_another_key_opens_nothing():
    assert Seal(bytes(KEY_BYTES)).open(SEAL.close("x")) is None


def test_an_old_key_opens_what_it_sealed_and_seals_no_more():
    new = Seal(bytes(KEY_BYTES), bytes(range(KEY_BYTES)))
    assert new.open(SEAL.close("x")) == "x"
    assert new.of("t").open(SEAL.of("t").close("x")) == "x"
    assert new.of("t").has_signed(SEAL.of("t").sign("x"), "x")
    assert SEAL.open(new.close("x")) is None and not SEAL.of("t").has_signed(new.of("t").sign("x"), "x")
    assert Seal(bytes(KEY_BYTES)).fingerprints[0] == new.fingerprints[0] != SEAL.fingerprints[0] == new.fingerprints[1]


def test_a_change_is_noticed():
    sealed = SEAL.close("hello")
    middle = len(sealed) // 2
    changed = sealed[:middle] + ("A" if sealed[middle] != "A" else "B") + sealed[middle + 1 :]
    assert SEAL.open(changed) is None


@given(st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES))
def test_a_key_is_taken_from_either_base64(key: bytes):
    for encoded in (base64.b64encode(key), base64.urlsafe_b64encode(key), base64.urlsafe_b64encode(key).rstrip(b"=")):
        assert parse_key(encoded.decode()) == key


@pytest.mark.parametrize("text", ["", "abc", "not base64!", base64.b64encode(bytes(31)).decode(), "A" * 50])
def test_a_bad_key_is_refused(text: str):
    with pytest.raises(ValueError, match=r"the key has|base64|padding"):
        parse_key(text)


def test_a_key_of_another_length_is_refused():
    with pytest.raises(ValueError, match="32"):
        Seal(bytes(KEY_BYTES - 1))


def test_what_one_tenant_was_given_opens_for_no_other():
    ours, others = SEAL.of("one"), SEAL.of("two")
    sealed = ours.close("a thought")
    assert (ours.open(sealed), others.open(sealed), SEAL.open(sealed)) == ("a thought", None, None)
    assert ours.open(SEAL.close("sealed before tenants had keys")) == "sealed before tenants had keys"


def test_a_signature_is_of_its_texts_its_tenant_and_its_server():
    ours = SEAL.of("one")
    signature = ours.sign("a", "bc")
    assert ours.has_signed(signature, "a", "bc")
    assert not ours.has_signed(signature, "ab", "c")
    assert not ours.has_signed("", "a", "bc")
    assert not ours.has_signed("\u00e9" * len(signature), "a", "bc")
    assert not SEAL.of("two").has_signed(signature, "a", "bc")
    assert not Seal(bytes(KEY_BYTES)).of("one").has_signed(signature, "a", "bc")
