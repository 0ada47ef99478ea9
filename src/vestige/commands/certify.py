"""Certify a method: reference, undo, bytes, invariance, behaviour, bad input.

Exits 0 only where the certificate holds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.status import Status


def run(
    name: Annotated[str | None, typer.Argument(help="A method; `vestige methods` lists them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every method, one after the other.")] = False,
    model: Annotated[str | None, typer.Option(help="Model for the behaviour checks; default: the family's.")] = None,
    behaviour: Annotated[bool, typer.Option(help="Run the behaviour checks, which take the most time.")] = True,
    device: Annotated[str, typer.Option(help="Where small models are put: cpu, cuda.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    from vestige.commands._shared import print_json
    from vestige.core.registry import registry
    from vestige.errors import SpecError

    if (name is None) == (not everything):
        raise SpecError("give the name of one method, or --all")
    names = [name] if name is not None else [card.name for card in registry.cards()]
    for known in names:
        registry.card(known)  # a mistyped name is refused before torch is imported

    import sys

    from rich.console import Console

    from vestige.evidence.certify import Outcome, certify

    progress, certificates = Console(stderr=True), []
    for known in names:
        with progress.status(f"certifying {known}") as status:

            def tell(outcome: Outcome, of: str = known, status: Status = status) -> None:
                status.update(f"certifying {of}: {outcome.says}")

            certificates.append(certify(known, model=model, behaviour=behaviour, device=device, on_outcome=tell))
        if not as_json:
            if sys.stdout.isatty():
                Console().print(certificates[-1])
            else:
                print(certificates[-1])
    if as_json:
        documents = [certificate.to_dict() for certificate in certificates]
        print_json(documents if everything else documents[0])
    elif everything:
        print("\n".join(certificate.summary for certificate in certificates))
    if not all(certificate.holds for certificate in certificates):
        raise typer.Exit(1)
