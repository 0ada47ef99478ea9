"""LazyEviction: wait and see which entries come back, and drop those that have been silent for too long."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vestige.context.cache import KeptCache
from vestige.context.layer import KeptLayer, Step
from vestige.context.policy import Evict
from vestige.core.method import Paper, Verdict, param
from vestige.errors import InputError, SpecError

__all__ = ["LazyEviction"]


class LazyEviction(Evict):
    r"""Keep entries that attention keeps coming back to, judged by how long they have been silent before.

    In long reasoning a token may go unseen for many steps and then matter again. An entry is active when it gets at
    least the weight ``activity`` from a query (of any head of its group). Its recurrence interval is the time between
    two activations; :math:`\mathrm{MRI}` is the longest so far, zero for an entry that was never active, and *s* the
    steps of silence since it was active last, or came. The score is

    .. math:: 2\,\sigma(-s / \mathrm{MRI}) + [\mathrm{MRI} > 0]\; 2\,\sigma(1 - \mathrm{MRI}),

    so that an entry fades once it is silent for longer than ever before, and quick recurrence counts in addition.
    Of equals the older goes first. Entries are dropped every ``lag`` steps only, the observation window, and the
    tokens of the window are kept, so that each entry is watched for a while before it is judged. Prompts are not cut:
    nothing is known of recurrence then.

    ``activity`` is absolute: sensible values lie around or below the weight that an entry would get by chance, one over
    the entries held. ``lag`` goes by how a model recurs on a task: the paper takes the 80th percentile of the longest
    intervals, 27 to 363 steps; :meth:`suggest_lag` measures it.
    """

    name = "lazy-eviction"
    paper = Paper(
        title="LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient Long Reasoning",
        year=2025,
        arxiv="2506.15969",
        venue="ACL 2026",
        code="https://github.com/Halo-949/LazyEviction",
        equations="recurrence interval tracking, lagged eviction, and the score centred on the maximum interval",
    )
    verdict = Verdict(
        "reproduced",
        "One head, 32 entries, a window of 16, some entries looked at every 6 to 15 steps: of the times that such an "
        "entry is looked at again it is still held in 61 to 76%, under TOVA with the same lag in 9 to 12%, in a plain"
        " window never. SmolLM2, 512 tokens read one by one under half as many entries: 10 of 15 needles are found "
        "that are asked for afterwards, as by the last entries alone; of 1,024 and 2,048 tokens 5. No first token is "
        "protected: at a tenth of 512 entries perplexity is 30.2, with sinks and a window 14.7. Prompts are not cut, "
        "so that what they hold is lost only once decoding has passed the budget",
    )

    activity: float = param(1e-4, "attention weight from which on an entry counts as active", gt=0, lt=1)
    lag: int = param(128, "observation window: steps from one drop to the next; its tokens are kept", ge=1)
    recent: int | float = param(0, "last tokens kept, where more than the window: tokens, or a share of budget", ge=0)
    when: Literal["decoding"] = param("decoding", "recurrence shows while decoding: prompts are not cut")

    needs_attention: ClassVar[bool] = True
    comparable: ClassVar[bool] = False

    def check(self) -> None:
        super().check()
        if isinstance(self.budget, int) and self.budget < self.sinks + self.lag:
            raise SpecError(
                f"lazy-eviction: parameter 'budget' is {self.budget}; "
                f"it must hold sinks + lag = {self.sinks + self.lag}"
            )

    @staticmethod
    def suggest_lag(cache: KeptCache, share: float = 0.8) -> int:
        """The interval that ``share`` of the entries that were active never exceeded, to be used as ``lag``.

        ``cache`` is what a policy with ``budget=1.0`` has held while a typical text was written, a few hundred tokens
        or more.

        Raises:
            InputError: nothing has been decoded with it under this policy.
        """
        states = [layer.state["longest"].flatten() for layer in cache.layers if "longest" in layer.state]
        longest = torch.cat([state[state > 0].cpu() for state in states]) if states else torch.empty(0)
        if not len(longest):
            raise InputError("lazy-eviction: no entry has been active yet; decode some tokens with this cache first")
        return int(longest.sort().values[math.ceil(share * len(longest)) - 1])

    def recent_tokens(self, allowed: int) -> int:
        return max(super().recent_tokens(allowed), min(self.lag, allowed - self.sinks))

    def receive(self, entries: KeptLayer, share: Tensor, step: Step) -> None:
        held = entries.state
        if "silence" not in held:
            held["silence"] = torch.zeros(share.shape[:2] + share.shape[3:], dtype=torch.int32, device=share.device)
            held["longest"] = torch.zeros_like(held["silence"])
        active = (share >= self.activity).any(dim=2)
        silence = held["silence"].add_(1)
        longest = held["longest"]
        torch.where(active, torch.maximum(longest, silence), longest, out=longest)
        silence.masked_fill_(active, 0)

    def score(self, entries: KeptLayer) -> Tensor:
        """Ranks from 0 in the order of score and, of equals, of age."""
        positions = entries._positions(entries.slots)
        if "silence" not in entries.state:
            return positions.to(torch.float64)
        silence, longest = (entries.state[name].to(torch.float64) for name in ("silence", "longest"))
        fades = torch.sigmoid(-silence / longest.clamp_min(torch.finfo(torch.float64).tiny))
        quick = torch.sigmoid(1 - longest).masked_fill(longest == 0, 0)
        by_age = positions.argsort(dim=2)
        order = by_age.gather(2, (2 * (fades + quick)).gather(2, by_age).argsort(dim=2, stable=True))
        ranks = torch.arange(entries.slots, dtype=torch.float64, device=positions.device).expand(order.shape)
        return torch.empty_like(ranks).scatter_(2, order, ranks)
