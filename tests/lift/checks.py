"""Every check of the lift as a function that fails: what mutants are tried against, and which functions each one runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FrameType

import torch

from lift import programs, test_constants, test_floats, test_meaning, test_refusals, test_scores, test_symtensor, test_view
from lift.mutants import Mutant, definitions, mutants, target
from lift.rows import DYNAMIC, STATIC
from lift.rows_scores import LIFTED, REFUSED

Check = Callable[[], None]
HANDLERS = tuple(
    f"trilithon.lift.handlers.{name}"
    for name in ("create", "floats", "identity", "index", "logic", "operand", "pointwise", "scan", "shape", "view")
)
OTHERS = (
    *(f"trilithon.lift.{name}" for name in ("constants", "lifter", "meaning", "registry", "scores", "symtensor")),
    "trilithon.spec.float_term",
)


@cache
def checks() -> dict[str, Check]:
    """Cheap ones first."""
    made = test_refusals.made()
    literals = test_constants.CLOSED | test_constants.OPEN
    return {
        **{f"row {name}": partial(programs.check_fixed, name) for name in STATIC | DYNAMIC},
        **{f"refusal {name}": partial(test_refusals.test_refuses, name, made) for name in test_refusals.REFUSALS},
        **{f"obliged {name}": partial(test_refusals.test_what_must_be_proved, name, made) for name in test_refusals.OBLIGED},
        "inside its axis": partial(test_refusals.test_obligations_of_a_running_sum_speak_of_its_own_axis, made),
        **{f"undecomposed {name}": partial(programs.check_undecomposed, name) for name in programs.UNDECOMPOSED},
        "unequal products": test_view.test_other_products_are_refused,
        **{
            f"known {name}": partial(test_symtensor.test_what_is_known_to_be_nonnegative, name) for name in test_symtensor.KNOWN
        },
        **{
            f"required {name}": partial(test_symtensor.test_obligations_come_together, name) for name in test_symtensor.REQUIRED
        },
        "two handlers": test_refusals.test_two_handlers_for_one_op_are_refused,
        **{f"quotient {name}": partial(test_view.test_quotient_and_remainder, name) for name in test_view.DIVISIONS},
        **{f"groups {name}": partial(test_view.test_axes_are_grouped_by_their_products, name) for name in test_view.GROUPS},
        **{
            f"floats {name} {dtype}": partial(test_floats.test_integers_compare_as_floats_do, name, dtype)
            for name in test_floats.COMPARE
            for dtype in ("bfloat16", "float16", "float32")
        },
        **{
            f"number {name} {number}": partial(test_floats.test_integers_compare_with_numbers, name, number)
            for name in test_floats.COMPARE
            for number in (2.0, -3.0, 0.5, torch.inf, torch.nan)
        },
        **{f"fraction {x}": partial(test_floats.test_floats_lose_their_fraction, x) for x in (2.75, -2.75, 2.0**53 - 1)},
        **{f"stays {x}": partial(test_floats.test_floats_that_no_integer_may_hold_stay, x) for x in (2.0**53, torch.nan)},
        "two floats": test_floats.test_two_float_types_are_not_compared_as_integers,
        **{
            f"integers {op}_{kind}": partial(test_floats.test_integers_are_compared_as_integers, f"{op}_{kind}")
            for op in ("eq", "lt", "le")
            for kind in ("ints", "bools")
        },
        **{f"literal {name}": partial(test_constants.test_literal_index_gives_the_literal, x) for name, x in literals.items()},
        **{f"call {name}": partial(test_meaning.test_what_a_call_means, name) for name in test_meaning.ROWS},
        **{f"odd call {name}": partial(test_meaning.test_what_is_refused, name) for name in test_meaning.REFUSED},
        **{f"closed {name}": partial(test_constants.test_closed_form_is_exact, name) for name in test_constants.CLOSED},
        **{f"open {name}": partial(test_constants.test_other_data_is_a_table, name) for name in test_constants.OPEN},
        **{f"scores {name}": partial(test_scores.test_scores_are_put_together_again, name) for name in LIFTED},
        **{f"odd scores {name}": partial(test_scores.test_other_scores_are_refused, name) for name in REFUSED},
        **{f"dynamic {name}": partial(programs.check_dynamic, name) for name in DYNAMIC},
    }


@cache
def checks_of() -> dict[tuple[str, str], list[str]]:
    """For each function of the modules above, the checks that run it."""
    places: dict[CodeType, tuple[str, str]] = {}
    for module in (*HANDLERS, *OTHERS):
        for name, _ in definitions(sys.modules[module]):
            places[target(module, name).__code__] = (module, name)
    for export in (
        programs.fixed_sizes,
        programs.dynamic_sizes,
        programs.undecomposed,
        test_scores.program,
        test_meaning.program,
    ):
        export()  # not while calls are looked at: that makes it many times slower
    found: dict[tuple[str, str], list[str]] = {place: [] for place in places.values()}
    for name, check in checks().items():
        for code in called(check):
            if code in places:
                found[places[code]].append(name)
    return found


def called(check: Check) -> set[CodeType]:
    """The code of all functions that a check calls."""
    codes: set[CodeType] = set()

    def seen(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            codes.add(frame.f_code)

    sys.setprofile(seen)
    try:
        check()
    finally:
        sys.setprofile(None)
    return codes


def relevant(mutant: Mutant) -> list[tuple[str, Check]]:
    return [(name, checks()[name]) for name in checks_of()[mutant.place]]


def all_mutants(modules: tuple[str, ...] = (*HANDLERS, *OTHERS)) -> list[Mutant]:
    return [mutant for module in modules for mutant in mutants(module)]
