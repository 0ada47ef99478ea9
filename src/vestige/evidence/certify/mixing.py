"""What the checks of mixers share: small layers and models, feeding them in pieces, teaching them to recall."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vestige.core.method import Method
from vestige.core.registry import registry
from vestige.errors import SpecError
from vestige.evidence.certify.suite import Case, Seen, expect
from vestige.evidence.references import reference_of
from vestige.evidence.tasks.recall import PairRecall, Pairs
from vestige.layers.layout import Layout
from vestige.layers.mixers.base import Mixer
from vestige.layers.place import Place
from vestige.layers.state import LayerState

__all__ = [
    "LayerCase",
    "Recaller",
    "costs_the_same_at_every_length",
    "feed",
    "fitted",
    "flops_per_token",
    "forms",
    "lone",
    "recalls_more",
    "redraw",
    "taught",
    "tells_the_last_word",
]

HIDDEN, HEADS, CONTEXT, CHUNK = 16, 2, 64, 8


def fitted(method: Method) -> Any:
    """The method with sizes that go with a layer of a few channels, and chunks that a few dozen tokens fill."""
    small = getattr(reference_of(method.name), "SMALL", {})
    changes = {"chunk": CHUNK, **small}
    return method.replace(**{name: value for name, value in changes.items() if name in method.parameters()})


def lone(mixer: Any) -> Any:
    """A mixer for tasks whose tokens stand each for itself: a short convolution, where it has one, could only blur
    them, and is as short as may be."""
    if "conv" not in mixer.parameters():
        return mixer
    try:
        return mixer.replace(conv=0)
    except SpecError:
        return mixer.replace(conv=1)


@dataclass
class LayerCase(Case):
    """A mixer or channel mixer, and the small layers and models that it is tried in."""

    method: Any

    @functools.cached_property
    def fitted(self) -> Any:
        """The method as small layers have it."""
        return fitted(self.method)

    def recall(self, task: PairRecall, method: Any = None, **options: Any) -> list[float]:
        """The share of right answers after a short training, for each seed; see :func:`taught`.

        Args:
            method: another than the case's, to compare with: a mixer, or the name of one.
        """
        if isinstance(method, str):
            method = fitted(registry.load(method)())
        mixer = lone(method or self.fitted)
        return [taught(mixer, task, seed, device=self.device, **options) for seed in self.seeds]

    def place(self, index: int = 1, **sizes: Any) -> Place:
        """A place in a small model; not the first layer unless asked for, as some mixers treat that one differently."""
        small = {"hidden_size": HIDDEN, "heads": HEADS, "context": CONTEXT, "layers": 3, "index": index}
        return Place(**{**small, **sizes})

    def layer(self, method: Any = None, place: Place | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A layer whose weights are large enough that each of them matters."""
        layer = (method or self.fitted).build(place or self.place()).to(dtype=dtype)
        return redraw(layer).to(self.device)

    def x(self, batch: int = 2, length: int = 21, seed: int = 0, width: int = HIDDEN) -> Tensor:
        """``(batch, length, width)`` inputs of the order of one, float64."""
        drawn = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn.to(self.device)

    def ids(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """``(batch, length)`` token ids for small models, none of them special."""
        return torch.randint(2, 53, (batch, length), generator=torch.Generator().manual_seed(seed)).to(self.device)

    def config(self, blocks: Any = None, **changes: Any) -> Any:
        """The config of a small model of two such blocks, or of others."""
        from vestige.models.config import VestigeConfig

        sizes = {"hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": CONTEXT}
        tokens = {"vocab_size": 53, "pad_token_id": 0}
        if blocks is None:
            blocks = [{"mixer": self.fitted, "repeat": 2}]
        return VestigeConfig(blocks=blocks, **{**sizes, **tokens, **changes})

    def lm(self, blocks: Any = None, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
        """A small model, in evaluation mode."""
        from vestige.models.lm import VestigeLM

        return redraw(VestigeLM(self.config(blocks, **changes)).to(dtype)).eval().to(self.device)


@torch.no_grad()
def redraw(module: nn.Module, seed: int = 0) -> Any:
    """Draw weights anew, so that activations are of the order of one and no weight is without effect.

    The result depends on names and shapes alone: a float32 module is the float64 one, to float32's precision.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, weight in module.named_parameters():
        drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        if weight.dim() >= 2 and "emb" not in name:
            drawn = 1.5 * drawn * weight[0].numel() ** -0.5
        elif weight.dim() == 1:
            drawn = 1 + 0.2 * drawn if "norm" in name and "bias" not in name else 0.5 * drawn
        weight.copy_(drawn)
    return module


def forms(method: Method) -> Iterator[Any]:
    """The method, and its forms that differ in one choice: each value of a parameter that is a choice or a switch."""
    yield method
    for name, hint in get_type_hints(type(method)).items():
        if name not in method.parameters():
            continue
        values = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        for value in values:
            if value != getattr(method, name):
                yield method.replace(**{name: value})


def feed(layer: nn.Module, x: Tensor, pieces: Sequence[int], held: Tensor | None = None) -> tuple[Tensor, LayerState]:
    """Give a layer its tokens in pieces, with a state between them.

    Args:
        held: ``(batch, length)`` False at padding.
    """
    state, outputs, past = LayerState(), [], 0
    for count in pieces:
        seen = None if held is None else held[:, : past + count]
        layout = Layout.of(x.shape[0], count, device=x.device, past=past, held=seen)
        outputs.append(layer(x[:, past : past + count], layout, state))
        past += count
    return torch.cat(outputs, 1), state


class Recaller(nn.Module):
    """The smallest model that can do :class:`~vestige.evidence.tasks.recall.PairRecall`: one mixer between embeddings
    and a head. A token is the sum of its key and its value, so that nothing has to be put together before it is stored.

    Args:
        blind: whether the mixer sees the last token alone: what can be done without a memory.
    """

    def __init__(self, mixer: Mixer, task: PairRecall, place: Place, blind: bool = False) -> None:
        super().__init__()
        self.blind = blind
        self.key = nn.Embedding(task.keys + 2, place.hidden_size)
        self.value = nn.Embedding(task.values + 1, place.hidden_size)
        self.norm = nn.RMSNorm(place.hidden_size)
        self.mixer = mixer.build(place)
        for part in self.mixer.modules():  # at this width transformers' small weights would learn nothing in seconds
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, std=part.in_features**-0.5)
        self.out = nn.RMSNorm(place.hidden_size)
        self.head = nn.Linear(place.hidden_size, task.values + 1)

    def forward(self, pairs: Pairs) -> Tensor:
        """``(rows, values + 1)`` logits of the answer; the last: there is none."""
        x = self.key(pairs.key + 1) + self.value(pairs.value + 1)
        if self.blind:
            x = x[:, -1:]
        mixed = self.mixer(self.norm(x), Layout.of(*x.shape[:2], device=x.device))
        return self.head(self.out(x + mixed)[:, -1])


@functools.lru_cache(maxsize=256)  # several claims compare with the same baseline
def taught(
    mixer: Mixer,
    task: PairRecall,
    seed: int,
    *,
    steps: int = 150,
    rows: int = 64,
    blind: bool = False,
    place: Place | None = None,
    device: str = "cpu",
) -> float:
    """Train a :class:`Recaller` and return the share of right answers on rows that it has not seen."""
    place = place or Place(hidden_size=32, heads=2, index=11, layers=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Recaller(mixer, task, place, blind).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(steps):
        pairs = _on(task.draw(rows, generator), device)
        loss = F.cross_entropy(model(pairs), pairs.answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        pairs = _on(task.draw(512, generator), device)
        return (model(pairs).argmax(1) == pairs.answer).float().mean().item()


def _on(pairs: Pairs, device: str) -> Pairs:
    return Pairs(pairs.key.to(device), pairs.value.to(device), pairs.answer.to(device))


def flops_per_token(mixer: Mixer, length: int, place: Place | None = None) -> float:
    """Floating-point operations of matrix products per token when a layer reads so many at once."""
    from torch.utils.flop_counter import FlopCounterMode

    place = place or Place(hidden_size=32, heads=2, index=11, layers=12)
    layer = mixer.build(place)
    layout = Layout.of(1, length)
    layout.implementation = "eager"  # fused attention does not let itself be counted
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, length, place.hidden_size), layout)
    return counter.get_total_flops() / length


def recalls_more(case: LayerCase, task: PairRecall, other: Any, called: str, by: float = 0.0, **options: Any) -> Seen:
    """Expect more right answers on any seed than another mixer gives on its best, by so much; both are taught alike."""
    mine, theirs = case.recall(task, **options), case.recall(task, other, **options)
    seen = {"right answers": mine, f"of {called}": theirs}
    expect(min(mine) > max(theirs) + by, f"{called} does as well: {seen}")
    return seen


def tells_the_last_word(case: LayerCase, **options: Any) -> Seen:
    """Expect new values of keys written anew to be recalled more often than by linear attention, which cannot tell."""
    return recalls_more(case, PairRecall(pairs=4, rewritten=4), "linear-attention", "linear attention", **options)


def costs_the_same_at_every_length(case: LayerCase) -> Seen:
    """Expect 2048 tokens read at once to take as many operations each as 256 do, and more by softmax attention."""
    mine = [flops_per_token(case.method, length) for length in (256, 2048)]  # type: ignore[arg-type]
    softmax = [flops_per_token(Mixer.from_spec("softmax"), length) for length in (256, 2048)]
    seen = {"operations per token": mine, "of softmax attention": softmax}
    expect(mine[1] <= 1.02 * mine[0], f"they grow: {seen}")
    expect(softmax[1] > 2 * softmax[0], f"softmax attention's do not grow: {seen}")
    return seen
