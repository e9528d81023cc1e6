"""The configurations of ours that can be compared by name, as options of ``memserve serve``.

Their policy keeps to the roles, so that what is compared is the arrangement: ``cost`` lets D prefill what
little it lacks.
"""

from __future__ import annotations

_BY_ROLE = ("--policy", "prompt-tree")
_TWO_COLOCATED = ("--prefill", "0", "--decode", "0", "--colocated", "2", *_BY_ROLE)
_ONE_EACH = ("--prefill", "1", "--decode", "1", *_BY_ROLE)

CONFIGURATIONS = {
    "colocated": (*_TWO_COLOCATED, "--phases", "pd-basic"),
    "colocated-cache": (*_TWO_COLOCATED, "--phases", "colocated"),
    "disagg": (*_ONE_EACH, "--phases", "pd-basic"),
    "disagg-cache-1": (*_ONE_EACH, "--phases", "pd-caching-1"),
    "disagg-cache-2": (*_ONE_EACH, "--phases", "pd-caching-2"),
    "disagg-cache": (*_ONE_EACH, "--phases", "pd-caching-3"),
}
"""Two instances each, so that all have the same memory and cores."""
