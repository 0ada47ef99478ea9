"""What a study is: a paper's finding, measured again over several seeds, with a verdict.

A study is one file in this folder. It says in :meth:`Study.measure` what one seed measures, in :meth:`Study.findings`
what the paper claims of these numbers and between which bounds they must lie, in :meth:`Study.figures` how they
are drawn, and in :meth:`Study.formulas` which equations of the paper it computes. The reference beside it
(``vestige.evidence.references.<slug>``) holds the same equations in float64, arguments to try them with
(``examples``) and hyper-parameters for a run of a second (``SMALL``). Everything else stands here: seeds, progress,
the ledger that a killed run is taken up from, the report and the certificate.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from vestige.core.files import folder_for
from vestige.core.method import Method, Verdict, did_you_mean, param
from vestige.core.packages import need
from vestige.errors import SpecError
from vestige.evidence.engine.record import Record, cell_key, progress_bar

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from vestige.evidence.report.page import Figure

__all__ = ["Bench", "Finding", "Scale", "Study", "StudyResult", "Tell"]

Scale = Literal["small", "full"]
Tell = Callable[[float, str], None]
"""Takes the share of a seed's work that is done, 0 to 1, and what is being done."""

Seen = Mapping[str, Any]
"""What one seed measured: names to numbers, or to lists or further mappings of numbers, as JSON gives them back."""

REPORT, LEDGER = "report.html", "ledger.jsonl"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One claim of a paper, and what was measured of it.

    Attributes:
        claim: what the paper says.
        quantity: what was measured for it, with its unit.
        measured: one value per seed.
        at_least: the claim holds where no seed's value is below; ``None``: no such bound.
        at_most: the same for values above.
    """

    claim: str
    quantity: str
    measured: tuple[float, ...]
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if self.at_least is None and self.at_most is None:
            raise SpecError(f"the finding {self.claim!r} has no bound, so nothing could contradict it")

    @property
    def held(self) -> bool:
        """Whether every seed's value lies within the bounds; one that is no number does not."""
        low = -float("inf") if self.at_least is None else self.at_least
        high = float("inf") if self.at_most is None else self.at_most
        return bool(self.measured) and all(low <= value <= high for value in self.measured)

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return sum(self.measured) / len(self.measured)

    @property
    def expected(self) -> str:
        """The bounds in words."""
        if self.at_least is None:
            return f"at most {self.at_most:.3g}"
        if self.at_most is None:
            return f"at least {self.at_least:.3g}"
        return f"{self.at_least:.3g} to {self.at_most:.3g}"

    @property
    def spread(self) -> str:
        """Mean, and the smallest and largest value of any seed."""
        low, high = min(self.measured), max(self.measured)
        return f"{self.mean:.3g} ({low:.3g} to {high:.3g})" if len(self.measured) > 1 else f"{self.mean:.3g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = {name: getattr(self, name) for name in ("claim", "quantity", "at_least", "at_most")}
        return values | {"measured": list(self.measured), "mean": self.mean, "held": self.held}


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """What a study found.

    Attributes:
        study: the study, with the hyper-parameters that it ran with.
        scale: ``"small"`` or ``"full"``.
        model: name of the model that was looked at, where the study looks at one.
        seeds: in the order of all values.
        claims: the findings.
        rows: the ledger's row of each seed.
        measured: how many seeds were measured now; the others were in the ledger.
        folder: where report and ledger are, if they were asked for.
    """

    study: Study
    scale: Scale
    model: str | None
    seeds: tuple[int, ...]
    claims: tuple[Finding, ...]
    rows: tuple[Mapping[str, Any], ...]
    measured: int
    folder: Path | None = None

    @property
    def name(self) -> str:
        """The study's slug."""
        return self.study.name

    @property
    def seen(self) -> tuple[Seen, ...]:
        """What each seed measured."""
        return tuple(row["metrics"] for row in self.rows)

    @property
    def seconds(self) -> float:
        """How long all seeds took, in this run or an earlier one."""
        return sum(row["seconds"] for row in self.rows)

    @property
    def verdict(self) -> Verdict:
        """``reproduced`` where every finding held; else ``not reproduced``, with those that did not."""
        failed = [finding for finding in self.claims if not finding.held]
        if not failed:
            return Verdict("reproduced", f"{len(self.claims)} of {len(self.claims)} findings held")
        told = "; ".join(f"{finding.quantity} {finding.spread}, due {finding.expected}" for finding in failed)
        held = len(self.claims) - len(failed)
        return Verdict("not reproduced", f"{held} of {len(self.claims)} findings held; not: {told}")

    @property
    def report(self) -> Path | None:
        """The page."""
        return None if self.folder is None else self.folder / REPORT

    @property
    def ledger(self) -> Path | None:
        """The measurements."""
        return None if self.folder is None else self.folder / LEDGER

    def figures(self) -> tuple[Figure, ...]:
        """The figures, with titles and captions; the first one shows the main claim."""
        return self.study.figures(self.seen)

    def figure(self) -> Any:
        """The main figure, as a plotly figure."""
        return self.figures()[0].figure

    def table(self) -> pd.DataFrame:
        """One row per finding: claim, quantity, bounds, mean, lowest and highest value, and whether it held."""
        import pandas as pd

        rows = [
            (f.claim, f.quantity, f.expected, f.mean, min(f.measured), max(f.measured), f.held) for f in self.claims
        ]
        return pd.DataFrame(rows, columns=["claim", "quantity", "expected", "measured", "low", "high", "held"])

    def summary(self) -> dict[str, Any]:
        """The answers as plain JSON types."""
        return {
            "study": self.study.spec(),
            "paper": self.study.paper.title,
            "scale": self.scale,
            "model": self.model,
            "seeds": list(self.seeds),
            "findings": [finding.to_dict() for finding in self.claims],
            "verdict": {"status": self.verdict.status, "seen": self.verdict.seen},
            "seconds": round(self.seconds, 1),
            "report": None if self.report is None else str(self.report),
            "ledger": None if self.ledger is None else str(self.ledger),
        }


@dataclass(frozen=True)
class Bench:
    """What a seed is measured with.

    Attributes:
        device: where small models are trained and trials are run.
        tell: to be called as work goes on.
        lm: the model that is looked at and its tokenizer, for studies that look at one.
    """

    device: torch.device
    tell: Tell = lambda share, what: None
    lm: tuple[Any, Any] | None = None


class Study(Method):
    """A finding of a paper, looked for again.

    The hyper-parameters' defaults are the small scale: three seeds within five minutes on two cores.

    Class attributes
        FULL: hyper-parameters of the full scale, where they differ.
        MODEL: the model that the study looks at where the user names none; ``None``: it looks at none.
    """

    FULL: ClassVar[Mapping[str, Any]] = {}
    MODEL: ClassVar[str | None] = None

    batch: int = param(8, "texts or trials that run together; changes time and memory, not what is measured", ge=1)

    def measure(self, seed: int, bench: Bench) -> Seen:
        """What one seed measures, as :data:`Seen`. torch's random numbers are seeded with ``seed`` before."""
        raise NotImplementedError

    def findings(self, seen: Sequence[Seen]) -> tuple[Finding, ...]:
        """What the paper claims, and what was seen of it, one :data:`Seen` per seed."""
        raise NotImplementedError

    def figures(self, seen: Sequence[Seen]) -> tuple[Figure, ...]:
        """The figures of the report; the first one shows the main claim."""
        raise NotImplementedError

    def about(self) -> tuple[str, ...]:
        """How it is measured, and where that departs from the paper: paragraphs for the report."""
        raise NotImplementedError

    def formulas(self) -> Mapping[str, Callable[..., Any]]:
        """The paper's equations as the study computes them, by the names that the reference gives them.

        Each takes what the reference's ``examples`` hold for it, arrays as float64 tensors.
        """
        raise NotImplementedError

    def at(self, scale: Scale) -> Study:
        """The study with the hyper-parameters of a scale; those that the user has changed stay.

        Raises:
            SpecError: no such scale.
        """
        if scale not in get_args(Scale):
            raise SpecError(f"scale is {scale!r}; allowed: {', '.join(get_args(Scale))}")
        plain = type(self)()
        larger = {} if scale == "small" else self.FULL
        return self.replace(**{k: v for k, v in larger.items() if getattr(self, k) == getattr(plain, k)})

    def run(
        self,
        scale: Scale = "small",
        seeds: Iterable[int] = (0, 1, 2),
        *,
        model: Any = None,
        out: str | os.PathLike[str] | None = None,
        device: str = "cpu",
        progress: bool = True,
    ) -> StudyResult:
        """Measure every seed and say what held.

        Args:
            scale: ``"small"`` ends within minutes; ``"full"`` is nearer to the paper.
            seeds: whole numbers, all different.
            model: for studies that look at a model: what :func:`vestige.models.hub.load` takes, or a pair of a loaded
                model and its tokenizer.
            out: folder for ``report.html`` and ``ledger.jsonl``. Seeds found there are not measured again, so that a
                killed run goes on at the seed that it was killed in.
            device: where it runs; ``"auto"`` takes an accelerator if there is one.
            progress: show a progress bar on stderr.

        Raises:
            SpecError: a wrong scale, seeds, device, or a model for a study that looks at none; before any work.
            InputError: ``out`` is no folder.
            MissingPackageError: a package for the report, or the embedded model's, is absent.
            ModelError: the model cannot be loaded.
            LedgerError: the folder's ledger cannot be read or written.
        """
        study, chosen = self.at(scale), _checked(seeds)
        if model is not None and self.MODEL is None:
            raise SpecError(f"{self.name} looks at no model of the user's; leave 'model' out")
        folder = None
        if out is not None:
            need("the study's report", "report", "jinja2", "plotly")
            folder = folder_for(out)
        from vestige.evidence.engine.bench import load_pair
        from vestige.models.hub import find_device

        place = find_device(device)
        name, lm = None, None
        if self.MODEL is not None:
            name, *pair = load_pair(self.MODEL if model is None else model, "auto", device)
            lm = (pair[0], pair[1])
        with tempfile.TemporaryDirectory() as scratch:
            record = Record((folder or Path(scratch)) / LEDGER)
            rows = _measure(study, scale, chosen, record, name, Bench(place, lm=lm), progress)
        seen = [row["metrics"] for row in rows]
        result = StudyResult(
            study=study,
            scale=scale,
            model=name,
            seeds=chosen,
            claims=study.findings(seen),
            rows=rows,
            measured=record.measured,
            folder=folder,
        )
        if result.report is not None:
            from vestige.evidence.report.study_page import write_study_report

            write_study_report(result, result.report)
        return result


def _measure(
    study: Study, scale: Scale, seeds: Sequence[int], record: Record, model: str | None, bench: Bench, progress: bool
) -> tuple[Mapping[str, Any], ...]:
    """The row of each seed: those that the record has, and the others measured now."""
    import torch

    import vestige
    from vestige.evidence.engine.bench import fingerprint

    given = {
        "vestige": vestige.__version__,
        "method": study.spec(),
        "device": bench.device.type,
        "weights": None if bench.lm is None else fingerprint(bench.lm[0]),
    }
    keys = {seed: cell_key("study", **given, seed=seed) for seed in seeds}
    missing = [seed for seed in seeds if keys[seed] not in record.known]
    cards = [bench.device] if bench.device.type == "cuda" else []
    with progress_bar(study.name, len(missing), progress and bool(missing)) as advance:
        for seed in missing:
            tell = _teller(advance, seed)
            tell(0, "begins")
            began = time.perf_counter()
            with torch.random.fork_rng(devices=cards):
                torch.manual_seed(seed)
                seen = study.measure(seed, Bench(bench.device, tell, bench.lm))
            tell(1, "done")
            record.store(
                keys[seed],
                study=study.name,
                method=study.spec(),
                task={"name": "study", "scale": scale},
                model=model,
                seed=seed,
                metrics=seen,
                seconds=time.perf_counter() - began,
            )
    # As the file gives them back: what was measured now and what was read must not differ by a type.
    rows = {row.get("key"): row for row in record.ledger.rows()}
    return tuple(rows[keys[seed]] for seed in seeds)


def _teller(advance: Callable[[float, str], None], seed: int) -> Tell:
    """Turn the share of a seed that is done into what was done since the last time."""
    told = 0.0

    def tell(share: float, what: str) -> None:
        nonlocal told
        advance(share - told, f"seed {seed}: {what}")
        told = share

    return tell


def _checked(seeds: Iterable[int]) -> tuple[int, ...]:
    chosen = tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen) or not all(type(s) is int and 0 <= s < 2**63 for s in chosen):
        raise SpecError(f"seeds is {chosen!r}; allowed: whole numbers, not negative, all different, at least one")
    return chosen


def study_named(name: str) -> type[Study]:
    """The class of a study.

    Raises:
        SpecError: there is no such study; the nearest ones are named.
    """
    from vestige.core.registry import registry

    studies = [card.name for card in registry.cards("evidence") if ".studies." in card.module]
    if name in studies or name in {card.name for card in registry.cards()}:
        found = registry.load(name)
        if issubclass(found, Study):
            return found
        raise SpecError(f"{name!r} is a method and no study; the studies are {', '.join(studies)}")
    raise SpecError(f"unknown study {name!r}; {did_you_mean(name, studies)}")
