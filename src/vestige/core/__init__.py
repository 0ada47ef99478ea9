"""The contract: methods and their registry, undoable patches, one view of any model, the ledger."""

from vestige.core.method import Method, Paper, Verdict, param
from vestige.core.registry import MethodCard, method, methods, registry

__all__ = ["Method", "MethodCard", "Paper", "Verdict", "method", "methods", "param", "registry"]
