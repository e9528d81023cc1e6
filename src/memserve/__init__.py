"""MemServe: LLM serving on one elastic memory pool."""

__version__ = "0.1.0"
