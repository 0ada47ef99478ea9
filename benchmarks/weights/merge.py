"""Put results of calls that shared the work (by seeds or methods) into one file.

python benchmarks/weights/merge.py retain-digits-?.json --out benchmarks/weights/retain-digits.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from common import keep

# What makes a row another than the rest.
KEY = ("task", "learner", "eraser", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = [json.loads(path.read_text()) for path in args.parts]
    rows = {tuple(row.get(name) for name in KEY): row for part in found for row in part["rows"]}
    for part in found[1:]:
        if part["device"] != found[0]["device"]:
            raise SystemExit(f"the parts are of {found[0]['device']} and {part['device']}")
    order = sorted(rows, key=lambda key: (key[-1], str(key[0])))  # by seed and task, else as they came
    keep(args.out, {**found[0], "rows": [rows[key] for key in order]})
    print(f"{args.out}: {len(rows)} rows")


if __name__ == "__main__":
    main()
