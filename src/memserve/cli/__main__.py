"""``python -m memserve.cli``: the same as the ``memserve`` script."""

from memserve.cli import main

main()
