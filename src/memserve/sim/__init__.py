"""The real scheduler and the real pool index on a virtual clock; only engines are modelled."""
