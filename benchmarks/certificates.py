"""Certify methods, and keep what every check saw: the figures behind the verdicts of the catalogue.

    python benchmarks/certificates.py                       # all methods, one file each in benchmarks/certificates
    python benchmarks/certificates.py a2sf titans --out F   # some of them; those that the folder holds are left out

What stands in a file is ``vestige certify NAME --json`` with the machine it ran on.
"""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from vestige.core.files import write_whole
from vestige.core.registry import registry
from vestige.evidence.certify import certify


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="methods; default: all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "certificates")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.names or [card.name for card in registry.cards()]:
        place = args.out / f"{name}.json"
        if place.exists():
            continue
        certificate = certify(name)
        document = {
            **certificate.to_dict(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {package: metadata.version(package) for package in ("torch", "transformers")},
        }
        write_whole(place, json.dumps(document, indent=1) + "\n")
        print(certificate.summary, f"({certificate.seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
