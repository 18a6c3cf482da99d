#!/usr/bin/env python3
"""Examine every family of the zoo in every mode and write docs/coverage.md: what is proved, and what is not and why.

scripts/coverage.py [--family NAME ...] [--workers N]
"""

from __future__ import annotations

import logging
import statistics
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from zoo.families import FAMILIES  # noqa: E402
from zoo.run import Case, Outcome, cases, examine_case  # noqa: E402

FOUND = """## Found on the way

- Falcon with ALiBi and eager attention (transformers 5.23) adds the bias twice: eager and SDPA logits of a tiny model
  differ by 0.5 %, without ALiBi by 3e-7. The report shows the sum of two biases.
- Llama 4 cuts its chunks by `position_ids` in transformers 5.23 and by token index in 5.17: the same for positions from 0 on.
- PaliGemma's mask is causal for tokens of type 1 alone; tokens of type 0 see each other (`tests/zoo/test_modules.py`).
- With torch 2.11 torch.export cannot capture DeBERTa ("Could not extract specialized integer from data-dependent expression").
  An earlier run with torch 2.11 and transformers 5.17 proved 1207 of 1214 sites (99.4 %; two layers a model).
""".splitlines()


def examine(case: Case) -> tuple[Case, list[Outcome], str]:
    """The outcomes of a case, or why it could not be examined."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        return case, examine_case(case), ""
    except Exception as error:  # an export that fails is a row of the table, not the end of it
        return case, [], " ".join(str(error).split())[:200]


def main(
    family: Annotated[list[str] | None, typer.Option(help="Only these families; docs/coverage.md is then left alone.")] = None,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
) -> None:
    """Run the zoo."""
    wanted = [case for case in cases() if family is None or case.family in family]
    results = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for done, (case, outcomes, error) in enumerate(pool.map(examine, wanted), 1):
            results.append((case, outcomes, error))
            bad = [o for o in outcomes if not o.exact]
            note = error or "; ".join(f"{o.site}: {o.found} ({o.reason})" for o in bad) or ("" if outcomes else "no site")
            print(f"{done}/{len(wanted)} {case} {note}", file=sys.stderr, flush=True)
    text = page(results)
    print(text)
    if family is None:
        (ROOT / "docs" / "coverage.md").write_text(text)


def page(results: list[tuple[Case, list[Outcome], str]]) -> str:
    """The page as Markdown."""
    sites = [o for _, outcomes, _ in results for o in outcomes]
    exact = sum(o.exact for o in sites)
    seconds = sorted(o.seconds for o in sites if o.seconds)
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "z3-solver"))
    return "\n".join(
        [
            "# Coverage",
            "",
            f"Written by `scripts/coverage.py` ({versions}): tiny models of {len(FAMILIES)} families with random weights,",
            "exported on a CPU with dynamic lengths, in every mode that each takes.",
            "",
            f"**{exact} of {len(sites)} attention sites ({100 * exact / max(len(sites), 1):.1f} %) are proved to be exactly",
            f"what they are**, in {len(results)} exports. Solver time of a site: median "
            f"{1000 * statistics.median(seconds):.0f} ms, worst {1000 * seconds[-1]:.0f} ms.",
            "",
            "| family | kind | proved as | under a guard on inputs | sites proved |",
            "| --- | --- | --- | --- | ---: |",
            *rows(results),
            "",
            "## Not proved, or not as expected",
            "",
            *(misses(results) or ["None."]),
            "",
            "## Modes left out",
            "",
            "The model's own code stands in the way:",
            "",
            *left_out(),
            "",
            *FOUND,
        ]
    )


def rows(results: Iterable[tuple[Case, list[Outcome], str]]) -> list[str]:
    """A row a family."""
    by_family: dict[str, list[Outcome]] = defaultdict(list)
    for _, outcomes, _ in results:
        for o in outcomes:
            by_family[o.case.family].append(o)
    lines = []
    for name, outcomes in by_family.items():
        forms = Counter(o.found.split("(computed")[0].split("(p_")[0] for o in outcomes if o.exact)
        guards = Counter(g for o in outcomes for g in o.guards)
        cells = (
            name,
            FAMILIES[name].kind,
            ", ".join(f"`{form}`" for form, _ in forms.most_common()),
            "; ".join(text for text, _ in guards.most_common()),
            f"{sum(o.exact for o in outcomes)}/{len(outcomes)}",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def left_out() -> list[str]:
    """A line for each reason: the modes that it keeps from being exported, and the families."""
    reasons: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, family in FAMILIES.items():
        for why in dict.fromkeys(family.skip.values()):
            reasons[why, *(mode for mode, reason in family.skip.items() if reason == why)].append(name)
    return [f"- {why}: {', '.join(modes)} of {', '.join(names)}" for (why, *modes), names in reasons.items()]


def misses(results: Iterable[tuple[Case, list[Outcome], str]]) -> list[str]:
    """A line for each site that is not what it should be, and each export that failed."""
    lines = []
    for case, outcomes, error in results:
        if error or not outcomes:
            lines.append(f"- {case}: {error or 'no attention site was found'}")
        reasons = Counter((o.expected, o.found, o.reason) for o in outcomes if not o.exact)
        lines += [f"- {case}, {n} sites: expected `{e}`, found `{f}`: {why}" for (e, f, why), n in reasons.items()]
    return lines


if __name__ == "__main__":
    typer.run(main)
