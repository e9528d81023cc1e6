"""The proof of the cluster key, message by message, and what TCP needs before it may be used."""

from __future__ import annotations

import ssl

import pytest

from memserve.core.errors import ConfigError, NotAuthenticated
from memserve.wire.security import KeyProof, Security, require_key, tls_for_connecting, tls_for_listening

KEY = b"0123456789abcdef"


def exchange(dialler: KeyProof, listener: KeyProof) -> None:
    """Run both sides to their ends."""
    answer = listener.feed(dialler.start())
    listener.feed(dialler.feed(answer))


def test_equal_keys_are_proved() -> None:
    dialler, listener = KeyProof(KEY, "messages", dialling=True), KeyProof(KEY, "messages", dialling=False)
    exchange(dialler, listener)
    assert dialler.done
    assert listener.done


@pytest.mark.parametrize(("key", "purpose"), [(KEY[::-1], "messages"), (KEY, "blocks")])
def test_another_key_or_purpose_is_refused_by_the_dialler(key: bytes, purpose: str) -> None:
    dialler, listener = KeyProof(KEY, "messages", dialling=True), KeyProof(key, purpose, dialling=False)
    with pytest.raises(NotAuthenticated, match="cluster key"):
        exchange(dialler, listener)
    assert not dialler.done
    assert not listener.done


def test_a_dialler_that_only_repeats_what_it_hears_is_refused() -> None:
    listener = KeyProof(KEY, "messages", dialling=False)
    answer = listener.feed(b"memserve\x01" + bytes(32))
    with pytest.raises(NotAuthenticated, match="cluster key"):
        listener.feed(answer[-listener.wanted :])


def test_an_answer_is_good_for_one_connection_only() -> None:
    dialler, listener = KeyProof(KEY, "messages", dialling=True), KeyProof(KEY, "messages", dialling=False)
    opening = dialler.start()
    proof = dialler.feed(listener.feed(opening))
    again = KeyProof(KEY, "messages", dialling=False)
    again.feed(opening)
    with pytest.raises(NotAuthenticated, match="cluster key"):
        again.feed(proof)


@pytest.mark.parametrize(
    ("opening", "reason"),
    [(b"\x16\x03\x01".ljust(41, b"\0"), "TLS"), (b"memserve\x02".ljust(41, b"\0"), "version")],
)
def test_strange_openings_are_told_apart(opening: bytes, reason: str) -> None:
    with pytest.raises(NotAuthenticated, match=reason):
        KeyProof(KEY, "messages", dialling=False).feed(opening)


def test_what_tcp_needs() -> None:
    bare = Security(KEY)
    assert tls_for_listening(bare, "127.0.0.1") is None
    assert tls_for_connecting(bare, "::1") is None
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is not loopback.*server_tls"):
        tls_for_listening(bare, "0.0.0.0")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.1 is not loopback.*client_tls"):
        tls_for_connecting(bare, "10.0.0.1")
    with pytest.raises(ConfigError, match="cluster key"):
        require_key(None)
    tls = ssl.create_default_context()
    assert tls_for_connecting(Security(KEY, client_tls=tls), "10.0.0.1") is tls


def test_weak_settings_are_refused_at_the_door() -> None:
    with pytest.raises(ConfigError, match="has 5 bytes"):
        Security(b"short")
    one_sided = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with pytest.raises(ConfigError, match="server_tls does not demand"):
        Security(KEY, server_tls=one_sided)


def test_the_key_is_not_shown() -> None:
    assert "0123" not in repr(Security(KEY))
