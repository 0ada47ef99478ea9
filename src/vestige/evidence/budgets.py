"""Policies under budgets: which have one, how it is set, and what a policy is called without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vestige.core.method import Method
from vestige.core.spec import Spec
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


def label(described: Spec) -> str:
    """A name, with the parameters that are not at their default; a budget is left out."""
    told, changed = described.spec(), []
    for key, entry in described.parameters().items():
        default, inner = entry.get("default"), getattr(described, key)
        if key == "budget" or told[key] == default:
            continue
        if not isinstance(inner, Spec):
            changed.append(f"{key}={_short(told[key])}")
        elif label(inner) != _default_label(default):  # an inner policy may differ by its budget alone
            changed.append(f"{key}={label(inner)}")
    return f"{described.name} ({', '.join(changed)})" if changed else described.name


def _default_label(spec: Any) -> str:
    return label(Method.from_spec(spec)) if spec else ""


def _short(value: Any) -> str:
    """A value as it reads in a label; tables of numbers are only named."""
    return "…" if isinstance(value, list) and value and isinstance(value[0], list) else str(value)
