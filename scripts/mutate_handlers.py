"""Put small mistakes into the functions that lift masks, one at a time, and see which of them no test notices.

    .venv/bin/python scripts/mutate_handlers.py [--handler NAME] [--sample N] [--survivors]

Prints one line a function: mutants that were noticed, that survived, and that make no difference (`lift.equivalent`
says why); then the survivors, and the score.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
warnings.simplefilter("ignore")

import torch  # noqa: E402

from lift.checks import all_mutants, relevant  # noqa: E402
from lift.equivalent import why_equivalent  # noqa: E402
from lift.mutants import Mutant, killer  # noqa: E402


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handler", default="", help="only functions whose name or module contains this")
    parser.add_argument("--kind", default="", help="only mistakes of this kind, e.g. 'wrong axis'")
    parser.add_argument("--sample", type=int, default=0, help="only so many mutants, chosen at random but always the same")
    return parser.parse_args()


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    found = [m for m in all_mutants() if arguments.handler in f"{m.module}.{m.function}" and arguments.kind in m.kind]
    if arguments.sample and arguments.sample < len(found):
        keep = set(random.Random(0).sample(range(len(found)), arguments.sample))
        found = [m for n, m in enumerate(found) if n in keep]
    return found


def outcome_of(mutant: Mutant) -> str:
    checks = relevant(mutant)
    if checks and killer(mutant, checks) is not None:
        return "killed"
    if why_equivalent(mutant):
        return "equivalent"
    return "survived" if checks else "not run"


def main() -> None:
    torch.set_num_threads(1)
    outcomes: dict[str, Counter[str]] = {}
    total: Counter[str] = Counter()
    left: list[tuple[str, Mutant]] = []
    for mutant in chosen(parsed()):
        outcome = outcome_of(mutant)
        outcomes.setdefault(".".join(mutant.place).removeprefix("trilithon."), Counter())[outcome] += 1
        total[outcome] += 1
        if outcome in ("survived", "not run"):
            left.append((outcome, mutant))
            print(f"{outcome:9} [{mutant.kind}] {mutant.name}", flush=True)
    print(f"\n{'function':60} killed survived equivalent not run")
    for name, counts in outcomes.items():
        print(f"{name:60} {counts['killed']:6} {counts['survived']:8} {counts['equivalent']:10} {counts['not run']:7}")
    tried = total["killed"] + total["survived"] + total["not run"]
    print(f"\n{dict(total)}; noticed {total['killed']} of {tried}: {100 * total['killed'] / max(tried, 1):.1f} %")


if __name__ == "__main__":
    main()
