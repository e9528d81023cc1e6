"""Certificates made when tests need them: a cluster's authority, and a stranger's."""

from __future__ import annotations

import ssl
from functools import cache

import trustme

from memserve.wire import Security


@cache
def _authority(name: str) -> trustme.CA:
    return trustme.CA(organization_name=name)


@cache
def _node(name: str) -> trustme.LeafCert:
    return _authority(name).issue_cert("127.0.0.1", "localhost")


def with_tls(key: bytes, name: str = "cluster", trusted: str = "cluster") -> Security:
    """``name``'s certificate, and trust in those that ``trusted`` signed."""
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        _node(name).configure_cert(context)
        _authority(trusted).configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        contexts.append(context)
    return Security(key, *contexts)
