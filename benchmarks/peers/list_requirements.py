"""Prints what an installed package asks for on this machine, without extras, but for the packages named.

Runs inside an environment made for an engine: ``python -m peers.list_requirements PACKAGE [EXCEPT ...]``.
"""

from __future__ import annotations

import sys
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement


def main() -> None:
    package, *leave_out = sys.argv[1:]
    for text in requires(package) or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in leave_out:
            requirement.marker = None
            print(requirement)


if __name__ == "__main__":
    main()
