"""Show versions, devices, packages and data, and the command for each absent one.

Exits 1 where something is absent that Vestige cannot work without.
"""

from __future__ import annotations

from typing import Annotated

import typer


def run(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    from vestige.commands._shared import columns, print_json
    from vestige.core.doctor import examine

    found = examine()
    if as_json:
        print_json(found.to_dict())
    else:
        print(columns(found.versions.items(), indent=0))
        print("\nDevices\n  " + "\n  ".join(found.devices))
        print(f"\nCache folder\n  {found.cache}")
        for title, findings in (("Required", found.required), ("Optional", found.optional), ("Data", found.data)):
            print(f"\n{title}")
            print(columns((f.name, f.problem or f.version or "", f.purpose) for f in findings))
        wanted = [f.install for f in (*found.required, *found.optional, *found.data) if f.install]
        print("\nTo install what is absent\n  " + "\n  ".join(wanted) if wanted else "\nNothing is absent.")
    if found.problems:
        raise typer.Exit(1)
