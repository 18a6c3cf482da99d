"""Draw a mask small: its cells, per head where heads differ, and the witness; with half blocks for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from torch import Tensor

from trilithon.report.examples import example_tables, use_of, uses
from trilithon.report.frame import Frame, frame_at, sizes_near
from trilithon.report.names import ranges
from trilithon.spec.masks import Mask, S, T
from trilithon.spec.term import Term, linear
from trilithon.spec.traverse import free_vars, walk

CELLS = 16  # queries and keys of a picture
MOST_PICTURES = 4  # of heads that differ
SEEDS = (None, *range(8))  # of tables in which a witness is looked for, the telling ones first


@dataclass(frozen=True)
class Subject:
    """A mask to draw.

    Attributes:
        keep: may query q attend to key k?
        sizes: numbers of queries and of keys.
        heads: how many there are, where the mask depends on the head.
        tables: those with given values; for others a telling example is made.
        claim: the mask that it is not, with `witness`: indices `b h q k` and sizes `s t` where they differ.
    """

    keep: Term
    sizes: tuple[Term, Term] = (S, T)
    heads: int = MOST_PICTURES
    tables: Mapping[str, Tensor] = field(default_factory=dict)
    claim: Term | None = None
    witness: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawing:
    """What one picture shows.

    Attributes:
        cells: bool `[queries, keys]`, True = may attend.
        every: one cell stands for the first of so many queries and keys.
        first: query and key of the upper left cell.
        below: name -> a number for each key, of the tables that were made up.
        notes: what else has to be said, a line each.
        heads: "head 2" or "heads 0..1,3", where heads differ.
        witness: row and column of the witness, with `differs`, bool like `cells`: where the claim says otherwise.
    """

    cells: Tensor
    every: int = 1
    first: tuple[int, int] = (0, 0)
    below: dict[str, list[int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    heads: str = ""
    witness: tuple[int, int] | None = None
    differs: Tensor | None = None


def draw(
    mask: Mask | Subject, s: int = CELLS, t: int = CELLS, inputs: Mapping[str, Tensor] | None = None
) -> tuple[Drawing, ...] | str:
    """Pictures of `s` queries and `t` keys, one for each set of equal heads, or why there is none.

    A window or a chunk that would not show at that size is sampled at every n-th query and key. With a witness, the
    part around it is drawn.

    Args:
        inputs: tables the mask reads, by name; for those left out a telling example is made.
    """
    subject = Subject(mask.term()) if isinstance(mask, Mask) else mask
    subject = replace(subject, tables={**subject.tables, **(inputs or {})})
    try:
        return _witnessed(subject, s, t) or _heads(subject, s, t)
    except (RuntimeError, IndexError) as error:  # an example may divide by zero, or fit the mask badly
        return f"no picture: {str(error).splitlines()[0]}"


def picture(drawing: Drawing) -> str:
    """A drawing in half blocks, two queries a line.

    Below it stand the tables that were made up for it, the last digit of each value below its key.

            keys ->
            ┌────┐
    queries │█▄  │
            │███▄│ ◄ q=3
            └────┘
              ▲ k=2
    """
    rows = drawing.cells.tolist()
    width = drawing.cells.shape[1]
    pairs = zip(rows[::2], [*rows[1::2], [False] * width], strict=False)
    bars = ["".join(_BLOCKS[bool(upper), bool(lower)] for upper, lower in zip(*pair, strict=True)) for pair in pairs]
    body = [f"{'' if i else 'queries':<8}│{bar}│" for i, bar in enumerate(bars)]
    below = [f"{'':9}{''.join(str(value % 10) for value in row)}  {name}" for name, row in drawing.below.items()]
    if drawing.witness is not None:
        row, column = drawing.witness
        body[row // 2] += f" ◄ q={drawing.first[0] + row}"
        below.insert(0, f"{'':9}{'':{column}}▲ k={drawing.first[1] + column}")
    edge = "─" * width
    lines = [f"{'':8}keys ->", f"{'':8}┌{edge}┐", *body, f"{'':8}└{edge}┘", *below, *drawing.notes]
    return "\n".join([f"{'':8}{drawing.heads}", *lines] if drawing.heads else lines)


_BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def _heads(subject: Subject, s: int, t: int) -> tuple[Drawing, ...]:
    """The mask from its first query and key on; equal heads are one picture."""
    every = _stride(subject.keep, min(s, t))
    heads = range(subject.heads if "h" in free_vars(subject.keep) else 1)
    sizes = sizes_near([subject.keep], subject.sizes, (s * every, t * every))
    frame = frame_at(sizes, (s, t), every=every, heads=heads)
    examples = example_tables([subject.keep], frame.env(), subject.tables, frame.keys, every)
    cells = frame.evaluate(subject.keep, {**subject.tables, **examples})
    equal: dict[bytes, list[int]] = {}
    for head in heads:
        equal.setdefault(cells[head].numpy().tobytes(), []).append(head)
    below, notes = _described(subject, frame, examples)
    scale = (f"one cell for {every} queries and keys",) if every > 1 else ()
    more = (f"{len(equal) - MOST_PICTURES} more kinds of heads are not drawn",) if len(equal) > MOST_PICTURES else ()
    drawn = [
        Drawing(cells[same[0]], every, below=below, heads=_head_names(same) if len(equal) > 1 else "")
        for same in list(equal.values())[:MOST_PICTURES]
    ]
    return (*drawn[:-1], replace(drawn[-1], notes=(*notes, *scale, *frame.cropped(), *more)))


def _head_names(heads: list[int]) -> str:
    return f"head{'s' if len(heads) > 1 else ''} {ranges(heads)}"


def _witnessed(subject: Subject, s: int, t: int) -> tuple[Drawing, ...]:
    """The mask around its witness, at sizes and with tables where mask and claim differ there; none if none is found."""
    if subject.claim is None or not subject.witness:
        return ()
    at, terms = subject.witness, [subject.keep, subject.claim]
    first = (_first(at["q"], at["s"], s), _first(at["k"], at["t"], t))
    spot = (at["q"] - first[0], at["k"] - first[1])
    for wanted in ((max(s, at["s"]), max(t, at["t"])), (at["s"], at["t"])):
        frame = frame_at(sizes_near(terms, subject.sizes, wanted), (s, t), first, heads=(at["h"],), row=at["b"])
        for seed in SEEDS:
            examples = example_tables(terms, frame.env(), subject.tables, frame.keys, seed=seed)
            cells, claimed = (frame.evaluate(term, {**subject.tables, **examples})[0] for term in terms)
            if bool(cells[spot] != claimed[spot]):
                below, notes = _described(subject, frame, examples)
                heads = f"head {at['h']}" if "h" in free_vars(subject.keep) else ""
                return (Drawing(cells, 1, first, below, (*notes, *frame.cropped()), heads, spot, cells != claimed),)
            if not examples:
                break
    return ()


def _first(index: int, size: int, cells: int) -> int:
    """The first index to show, so that `index` is among the cells."""
    return 0 if index < cells else max(0, min(index - cells // 2, size - cells))


def _described(subject: Subject, frame: Frame, examples: Mapping[str, Tensor]) -> tuple[dict[str, list[int]], list[str]]:
    """The tables that were made up: those that have a number for each key, and the others in words."""
    below: dict[str, list[int]] = {}
    notes: list[str] = []
    terms = [x for x in (subject.keep, subject.claim) if x is not None]
    reads = uses(terms)
    for name, table in examples.items():
        use = use_of(name, reads[name], terms)
        row = table.movedim(use.axis, -1) if table.dim() else table[None]
        row = (row[min(frame.row, len(row) - 1)] if row.dim() == 2 else row.reshape(-1, row.shape[-1])[0]).long()
        if use.is_by_key and int(frame.columns.max()) < len(row):
            shown = row[frame.columns]
            scaled = frame.every > 1 and int(shown.max()) > 9
            below[f"{name} / {frame.every}" if scaled else name] = (shown // frame.every if scaled else shown).tolist()
        elif use.dense:
            notes.append(f"for random values of {name}")
        else:
            numbers = row[:: frame.every].tolist()
            rising = all(a < b for a, b in pairwise(numbers))
            notes.append(f"for {name} = {ranges(numbers) if rising else ' '.join(map(str, numbers[:CELLS]))}")
    return below, notes


def _stride(keep: Term, cells: int) -> int:
    """1, or the power of 2 with which twice the widest distance that the mask speaks of fits the cells."""
    widest = max(_distances(keep), default=0)
    every = 1
    while widest >= cells and every * cells < 2 * widest:
        every *= 2
    return every


def _distances(keep: Term) -> Iterator[int]:
    """How far apart a query and a key are where the mask changes, and the lengths of chunks."""
    for x in walk([keep]):
        if x.op == "read" and {"q", "k"} <= free_vars(x):
            return  # a table of cells shows nothing when sampled
        if x.op == "le0":
            coefficients, constant = linear(x.args[0])
            kinds = {part.op for part in coefficients}
            if kinds == {"var"} or (kinds <= {"var", "read"} and len(coefficients) > 1):
                yield abs(constant) + 1
        elif x.op in ("floor_div", "mod") and x.args[1].op == "int":
            yield int(x.args[1].value)
