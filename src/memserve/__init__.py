"""MemServe: LLM serving on one elastic memory pool."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memserve.mempool import MemPool

__all__ = ["MemPool", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the pool when it is asked for: ``memserve --help`` needs neither numpy nor native code."""
    if name != "MemPool":
        raise AttributeError(f"module 'memserve' has no attribute {name!r}")
    from memserve.mempool import MemPool

    return MemPool
