"""Policies under budgets: which have one, how it is set, and what a policy is called without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vestige.core.method import Method
from vestige.errors import SpecError

if TYPE_CHECKING:
    from vestige.context.policy import CachePolicy

__all__ = ["at", "evicts", "label", "own_budget"]


def evicts(policy: CachePolicy) -> bool:
    """Whether the policy has a budget of entries that it keeps; plans with windows and the full cache have none."""
    if policy.ranking is None:
        return False
    try:
        policy.with_budget(0.5)
    except SpecError:
        return False
    return True


def at(policy: CachePolicy, budget: int | float) -> CachePolicy:
    """The policy at a budget; one that keeps every entry as it is."""
    return policy.with_budget(budget) if evicts(policy) else policy


def own_budget(policy: Any) -> int | float:
    """The budget that an evicting policy was built with; that of the policy inside where it stands there."""
    return policy.budget if hasattr(policy, "budget") else own_budget(policy.policy)


def label(policy: Method) -> str:
    """A policy's name, with the parameters that are not at their default; its budget left out."""
    defaults = {key: entry.get("default") for key, entry in policy.parameters().items()}
    changed = []
    for key, value in policy.spec().items():
        if key in ("name", "budget") or value == defaults[key]:
            continue
        inner = getattr(policy, key)
        if not isinstance(inner, Method):
            changed.append(f"{key}={_short(value)}")
        elif label(inner) != _default_label(defaults[key]):  # an inner policy may differ by its budget alone
            changed.append(f"{key}={label(inner)}")
    return f"{policy.name} ({', '.join(changed)})" if changed else policy.name


def _default_label(spec: Any) -> str:
    return label(Method.from_spec(spec)) if spec else ""


def _short(value: Any) -> str:
    """A value as it reads in a label; tables of numbers are only named."""
    return "…" if isinstance(value, list) and value and isinstance(value[0], list) else str(value)
