"""On whose account a request runs, and whether it may enter: by its key, else by a header."""

from __future__ import annotations

import hmac
import re
from collections.abc import Sequence

from memserve.core.config import TenantConfig
from memserve.core.errors import InvalidRequest
from memserve.server.backend import DEFAULT_TENANT

TENANT_HEADER = "x-memserve-tenant"
_NAME = re.compile(r"[A-Za-z0-9._:/+=@-]{1,64}")


class Tenants:
    """``api_key`` lets anybody enter, in the name of whom the header names; a tenant's own key only it."""

    def __init__(self, api_key: str | None, tenants: Sequence[TenantConfig]) -> None:
        self._weights = {tenant.name: tenant.weight for tenant in tenants}
        keys = [(tenant.api_key, tenant.name) for tenant in tenants if tenant.api_key is not None]
        self._tenant_of_key = [(_bearer(key), name) for key, name in keys]
        self._general = None if api_key is None else _bearer(api_key)
        self.locked = bool(keys) or api_key is not None
        """Whether a key is needed."""

    def weight(self, tenant: str) -> float:
        """Its part of the tokens beside others that wait."""
        return self._weights.get(tenant, 1.0)

    def may_enter(self, authorization: str) -> bool:
        """Whether a request with this header has a valid key, or needs none."""
        if not self.locked:
            return True
        given = authorization.encode()
        general = self._general is not None and hmac.compare_digest(given, self._general)
        return general or self._holder(given) is not None

    def tenant_of(self, authorization: str, named: str | None) -> str:
        """The tenant of a request that may enter. Raises ``InvalidRequest`` for a name that is none."""
        holder = self._holder(authorization.encode())
        if holder is not None:
            return holder
        if named is None:
            return DEFAULT_TENANT
        if not _NAME.fullmatch(named):
            raise InvalidRequest(
                f"'{TENANT_HEADER}' is {named[:80]!r}; accepted: 1 to 64 characters of A-Za-z0-9._:/+=@-.",
                field=TENANT_HEADER,
            )
        return named

    def _holder(self, given: bytes) -> str | None:
        # All are compared, so that the time taken does not tell which key is nearly right.
        found = [name for key, name in self._tenant_of_key if hmac.compare_digest(given, key)]
        return found[0] if found else None


def _bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()
