"""Every check of the lift as a function that fails: what mutants are tried against, and which functions each one runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from itertools import product
from types import CodeType, FrameType

import torch

from lift import (
    programs,
    test_constants,
    test_flat,
    test_floats,
    test_meaning,
    test_refusals,
    test_scores,
    test_symtensor,
    test_view,
)
from lift.mutants import Mutant, definitions, mutants, target
from lift.rows import DYNAMIC, STATIC
from lift.rows_scores import LIFTED, REFUSED

Check = Callable[[], None]
LITERALS = test_constants.CLOSED | test_constants.OPEN
HANDLERS = tuple(
    f"trilithon.lift.handlers.{name}"
    for name in ("create", "floats", "identity", "index", "logic", "operand", "pointwise", "scan", "shape", "view")
)
OTHERS = (
    *(f"trilithon.lift.{name}" for name in ("constants", "lifter", "meaning", "registry", "scores", "symtensor")),
    "trilithon.spec.float_term",
)


def each(test: Callable[..., None], rows: Iterable[object], *more: object) -> dict[str, Check]:
    """A parametrized test as one check a row; a row of several parameters is a tuple."""
    named = {row: row if isinstance(row, tuple) else (row,) for row in rows}
    return {f"{test.__name__} {row}": partial(test, *parameters, *more) for row, parameters in named.items()}


@cache
def checks() -> dict[str, Check]:
    """Cheap ones first."""
    made = test_refusals.made()
    return (
        each(programs.check_fixed, STATIC | DYNAMIC)
        | each(test_refusals.test_refuses, test_refusals.REFUSALS, made)
        | each(test_refusals.test_what_must_be_proved, test_refusals.OBLIGED, made)
        | each(test_refusals.test_obligations_of_a_running_sum_speak_of_its_own_axis, [()], made)
        | each(test_refusals.test_two_handlers_for_one_op_are_refused, [()])
        | each(programs.check_undecomposed, programs.UNDECOMPOSED)
        | each(test_view.test_quotient_and_remainder, test_view.DIVISIONS)
        | each(test_view.test_axes_are_grouped_by_their_products, test_view.GROUPS)
        | each(test_view.test_other_products_are_refused, [()])
        | each(test_symtensor.test_what_is_known_to_be_nonnegative, test_symtensor.KNOWN)
        | each(test_symtensor.test_obligations_come_together, test_symtensor.REQUIRED)
        | each(test_floats.test_integers_compare_as_floats_do, product(test_floats.COMPARE, ("bfloat16", "float16", "float32")))
        | each(test_floats.test_integers_compare_with_numbers, product(test_floats.COMPARE, (2.0, -3.0, 0.5, torch.inf)))
        | each(test_floats.test_floats_lose_their_fraction, (2.75, -2.75, 2.0**53 - 1))
        | each(test_floats.test_floats_that_no_integer_may_hold_stay, (2.0**53, torch.nan))
        | each(test_floats.test_two_float_types_are_not_compared_as_integers, [()])
        | each(test_floats.test_integers_are_compared_as_integers, ("eq_ints", "lt_ints", "le_ints", "lt_bools", "le_bools"))
        | each(test_meaning.test_what_a_call_means, test_meaning.ROWS)
        | each(test_meaning.test_what_is_refused, test_meaning.REFUSED)
        | each(test_constants.test_closed_form_is_exact, test_constants.CLOSED)
        | each(test_constants.test_other_data_is_a_table, test_constants.OPEN)
        | each(test_scores.test_scores_are_put_together_again, LIFTED)
        | each(test_scores.test_other_scores_are_refused, REFUSED)
        | each(test_flat.test_flat_scores_are_put_together_again, test_flat.ROWS)
        | each(programs.check_dynamic, DYNAMIC)
        | {f"literal {name}": partial(test_constants.test_literal_index_gives_the_literal, x) for name, x in LITERALS.items()}
    )


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
