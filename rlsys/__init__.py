"""rlsys: distributed reinforcement learning for reasoning models that call tools."""

__version__ = "0.1.0"
