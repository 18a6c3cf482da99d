"""The order of the rewriting passes."""

from __future__ import annotations

from collections.abc import Callable

from torch.export import ExportedProgram
from torch.fx import GraphModule

from trilithon.passes import Outcome, Pass, run_passes
from trilithon.rewrite.assert_guards import AssertGuards
from trilithon.rewrite.drop_proved_asserts import DropProvedAsserts
from trilithon.rewrite.erase_dead_masks import EraseDeadMasks
from trilithon.rewrite.fold_grouped_heads import FoldGroupedHeads, Proves
from trilithon.rewrite.fuse_attention import FuseAttention, Proved
from trilithon.rewrite.program import seal, working_copy
from trilithon.rewrite.relax_views import RelaxViews
from trilithon.rewrite.restore_static_heads import RestoreStaticHeads
from trilithon.spec.assumption import Assumption

After = Callable[[Pass, GraphModule, Outcome], None]


def assert_guards(program: ExportedProgram, guards: tuple[Assumption, ...]) -> ExportedProgram:
    """The rewritten program, with the guards that it needs asserted at its head."""
    gm, _ = working_copy(program)
    run_passes(gm, (AssertGuards(guards),))
    return seal(gm, program)


def rewrite(
    program: ExportedProgram, sites: tuple[Proved, ...], proves: Proves, after: After | None = None
) -> tuple[ExportedProgram, dict[str, Outcome]]:
    """Rewrite every proved site; the result is an ordinary ExportedProgram.

    Args:
        program: a functional program; it is not changed.
        sites: what was proved.
        proves: the prover, for index equalities.
        after: called after each pass.
    """
    gm, nodes = working_copy(program)
    passes: tuple[Pass, ...] = (
        FuseAttention(sites, nodes),
        FoldGroupedHeads(program, proves),  # needs the canonical op's plain k and v
        RestoreStaticHeads(),
        RelaxViews(),  # after the passes that look for views
        DropProvedAsserts(proves),
        EraseDeadMasks(),  # last: a mask dies only when nobody reads it any more
    )
    outcomes = run_passes(gm, passes, after)
    return seal(gm, program), outcomes
