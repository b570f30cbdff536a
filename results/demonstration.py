"""Makes results/demonstration.md from nothing: python results/demonstration.py

Three seeds of the built-in demonstration; within a seed every loss starts from the same base and
sees the same pairs in the same order, with the same learning rate and mio's beta twice dpo's.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402

LOSSES = ("mio", "dpo", "sft")
COLUMNS = {"greedy": 100, "pass@8": 100, "Δ chosen": 1, "Δ rejected": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--flags", nargs="*", default=[], help="more flags for train.py, as a=b")
    options = parser.parse_args()
    more = [part for flag in options.flags for part in f"--{flag}".split("=")]
    found = {}
    for seed in range(options.seeds):
        for loss in LOSSES:
            out = f"out/demonstration/seed{seed}/{loss}"
            folder = train.main(["--loss", loss, "--seed", str(seed), "--out", out, *more])
            found[loss, seed] = json.loads((folder / "summary.json").read_text())["table"]
    print("\n| | seed |" + "".join(f" {name} |" for name in COLUMNS))
    print("|---|---|" + "---|" * len(COLUMNS))
    for row in ("base", *LOSSES):
        tables = [found["mio" if row == "base" else row, seed] for seed in range(options.seeds)]
        for seed, table in enumerate(tables):
            cells = [cell(table[row].get(name), scale) for name, scale in COLUMNS.items()]
            print(f"| {row} | {seed} | {' | '.join(cells)} |")
        if row != "base":
            gains = [100 * table["change"]["greedy"]["mean"] for table in tables]
            spread = statistics.stdev(gains) if len(gains) > 1 else float("nan")
            print(f"| **{row} minus base** | mean | **{statistics.mean(gains):+.1f}** "
                  f"(sd over seeds {spread:.1f}) | | | |")  # fmt: skip


def cell(figure: dict | None, scale: float) -> str:
    if figure is None:
        return ""
    digits = 1 if scale == 100 else 2
    return f"{scale * figure['mean']:.{digits}f} ± {scale * figure['error']:.{digits}f}"


if __name__ == "__main__":
    main()
