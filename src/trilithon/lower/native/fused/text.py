"""The Triton source of the step's kernels: prologues and epilogues come from the graph, what stands between is written here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from trilithon.lower.native.fused.expressions import Emitter, Frame
from trilithon.lower.native.fused.operations import VIEWS, extent, numel, padded, refuse

HEADER = '''"""Made by Trilithon of one region of a decode step."""

import triton
import triton.language as tl

from trilithon.lower.native.fused import attention_kernels as attention
from trilithon.lower.native.fused.step_kernels import let_next_start, wait
from trilithon.lower.native.split_kv_kernels import tanh


@triton.jit(do_not_specialize={plain})
def {name}({parameters}):
'''
LARGE = 1 << 31
MOST_VALUES = 1 << 16  # numbers that one program makes
FEW_QUERIES = 8  # of a key head; they are made one by one, since few rows of a tile would be theirs
NAMES = re.compile(r"[A-Za-z_]\w*")
PLAIN = re.compile(r"\b(?:t|splits|c\d+_slots)\b")  # numbers whose factors help no kernel: Triton compiles it once for all


@dataclass(frozen=True)
class Text:
    """A kernel: its source, what it reads (`p0, p1, ...`) and what it makes (`o0, o1, ...`)."""

    name: str
    source: str
    reads: tuple[Node, ...]
    makes: tuple[Node, ...]


@dataclass(frozen=True)
class Segment:
    """Products of one vector with matrices of as many rows, and the value that is made of them, element by element.

    A segment of one product may give it as it is: then `end` is the product.
    """

    linears: tuple[Node, ...]
    end: Node

    @property
    def width(self) -> int:
        return numel(self.end)


def text_of_products(x: Node, segments: Sequence[Segment], is_stored: Callable[[Node], bool]) -> Text:
    """Matrix-vector products; the vector is made of what is stored in each program anew.

    Values on the way to the vector that others need too are stored by the first program.

    Raises:
        CannotFuse: a value has no expression.
    """
    leaves: list[Node] = []
    sides: list[Node] = []
    lines = ["pid = tl.program_id(0)", "let_next_start(PDL)"]
    begin = "0"
    for number, segment in enumerate(segments):
        emitter = Emitter(leaves, is_stored)
        _products(emitter, x, segment, begin)
        if number == 0:
            own = {n for group in segments for n in group.linears}
            sides = needed_by_others(emitter, emitter.whole(extent(x)[1]), own)
            for i, node in enumerate(sides):
                frame = emitter.whole(extent(x)[1])
                inside = f"(pid == 0) & ({frame.column_inside or f'{frame.column} >= 0'})"
                emitter.lines.append(
                    f"tl.store(o{len(segments) + i} + {frame.column}, {emitter.made[node, frame]}, mask={inside})"
                )
        made = emitter.value(segment.end, _of_columns(segment.width))
        emitter.lines.append(f"tl.store(o{number} + n, {made}, mask=n < {segment.width})")
        end = f"{begin} + tl.cdiv({segment.width}, ROWS)"
        if len(segments) > 1:
            word = "if" if number == 0 else "elif"
            lines.append(f"{word} pid < {end}:" if number + 1 < len(segments) else "else:")
        lines += [f"    {line}" if len(segments) > 1 else line for line in arranged(emitter)]
        begin = end
    makes = (*(s.end for s in segments), *sides)
    name = "_".join(("products", str(extent(x)[1]), *(str(s.width) for s in segments)))
    return kernel_text(name, leaves, makes, lines, "PDL: tl.constexpr, ROWS: tl.constexpr")


def arranged(emitter: Emitter) -> list[str]:
    """Statements with the wait for other kernels among them: as few as can be stand behind it, and of these loads are first.

    What is loaded before it comes while other kernels end: matrices, and weights of norms and biases, which nobody has read
    since the last token.
    """
    written = {f"p{i}" for i, leaf in enumerate(emitter.leaves) if leaf.op != "get_attr"}
    early, late = _apart(emitter.lines, written)
    loads, others = _apart(late, {line.partition(" = ")[0] for line in late})
    return [*early, "wait(PDL)", *loads, *others]


def _apart(lines: Sequence[str], late: set[str]) -> tuple[list[str], list[str]]:
    """Assignments that need none of these names, and all other statements; each in order."""
    free, others = list[str](), list[str]()
    for line in lines:
        name, is_assignment, expression = line.partition(" = ")
        if is_assignment and late.isdisjoint(NAMES.findall(expression)):
            free.append(line)
        else:
            late = late | {name}
            others.append(line)
    return free, others


def _of_columns(width: int) -> Frame:
    return Frame(column="n", column_inside=f"n < {width}")


def _products(emitter: Emitter, x: Node, segment: Segment, begin: str) -> None:
    """Load the matrices, make the vector, and multiply."""
    k = extent(x)[1]
    wide = ".to(tl.int64)" if k * segment.width >= LARGE else ""
    emitter.lines.append(f"n = (pid - ({begin})) * ROWS + tl.arange(0, ROWS)[:, None]")
    frame = emitter.whole(k)
    inside = " & ".join(x for x in (f"(n < {segment.width})", frame.column_inside and f"({frame.column_inside})") if x)
    tiles = []
    for linear in segment.linears:
        place = f"{emitter.pointer(linear.args[1])} + n{wide} * {k} + {frame.column}"  # type: ignore[arg-type]
        tiles.append(emitter.assign(f'tl.load({place}, mask={inside}, other=0.0, eviction_policy="evict_first")'))
    vector = emitter.assign(f"{emitter.value(x, frame)}.to(tl.float32)")
    for linear, tile in zip(segment.linears, tiles, strict=True):
        made = f"tl.sum({tile}.to(tl.float32) * {vector}, 1)[:, None]"
        bias = linear.args[2] if len(linear.args) > 2 else None
        if isinstance(bias, Node):
            held = emitter.assign(f"tl.load({emitter.pointer(bias)} + n, mask=n < {segment.width}, other=0.0)")
            made += f" + {held}.to(tl.float32)"
        dtype = str(linear.meta["val"].dtype).replace("torch.", "tl.")
        emitter.made[linear, _of_columns(segment.width)] = emitter.assign(f"({made}).to({dtype})")


def needed_by_others(emitter: Emitter, frame: Frame, own: set[Node]) -> list[Node]:
    """Values along the whole vector that are read elsewhere; views of them are not stored beside them."""
    closure = {node for node, _ in emitter.made if not emitter.is_stored(node)} | own
    return [
        node
        for node, place in emitter.made
        if place == frame and node not in own and not emitter.is_stored(node) and node.target not in VIEWS
        and any(user not in closure for user in node.users)
    ]  # fmt: skip


def text_of_values(nodes: Sequence[Node], is_stored: Callable[[Node], bool]) -> Text:
    """Values as they are, each made by one program.

    Raises:
        CannotFuse: one has no expression.
    """
    leaves: list[Node] = []
    lines = ["pid = tl.program_id(0)", "let_next_start(PDL)", "wait(PDL)"]
    for number, node in enumerate(nodes):
        emitter = Emitter(leaves, is_stored)
        rows, width = extent(node)
        if padded(rows) * padded(width) > MOST_VALUES:
            raise refuse(node, f"{rows} x {width} numbers do not fit one program")
        frame = emitter.whole(width)
        place = frame.column
        if rows > 1:
            emitter.lines.append(f"r = tl.arange(0, {padded(rows)})[:, None]")
            frame = Frame("r", frame.column, f"r < {rows}", frame.column_inside)
            place = f"r * {width} + {frame.column}"
        made = emitter.value(node, frame)
        emitter.lines.append(f"tl.store(o{number} + {place}, {made}{f', mask={frame.inside}' if frame.inside else ''})")
        lines += [f"if pid == {number}:", *(f"    {line}" for line in emitter.lines)]
    return kernel_text("values", leaves, nodes, lines, "PDL: tl.constexpr")


@dataclass(frozen=True)
class Site:
    """Attention of one token over a cache.

    Attributes:
        q, k, v: `[1 h 1 d]`, `[1 g 1 d]`, `[1 g 1 e]`, those of the token at hand.
        k_cache, v_cache: `[1 g t d]`, `[1 g t e]`, without them.
        start: `[1]`.
        window, chunk: keys that it sees at most, and keys of a chunk; 0 = all.
        ring: slots are used again.
    """

    q: Node
    k: Node
    v: Node
    k_cache: Node
    v_cache: Node
    start: Node
    window: int
    chunk: int
    ring: bool
    scale: float
    softcap: float

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """`g`, query heads of a key head, `d`, `e`."""
        (_, h, _, d), (_, g, _, e) = self.q.meta["val"].shape, self.v.meta["val"].shape
        return g, h // g, d, e


def text_of_attention(site: Site, result: Node, is_stored: Callable[[Node], bool]) -> Text:
    """Attention of one token; its query, key and value are made of what is stored, e.g. normed and rotated.

    Programs of one key head attend over a part of its keys each, and one over the token itself, which it writes into the
    caches. Another kernel puts together what they have found.

    Raises:
        CannotFuse: one has no expression.
    """
    leaves: list[Node] = []
    g, n, d, e = site.sizes
    width_d, width_e = max(16, padded(d)), max(16, padded(e))
    head, of_part, of_token = (Emitter(leaves, is_stored, least=16, prefix=x) for x in ("h", "x", "y"))
    start = head.value(site.start, Frame())
    sizes = f"D={d}, E={e}, BLOCK_D={width_d}, BLOCK_E={width_e}"
    mask = f"WINDOW={site.window}, CHUNK={site.chunk}, RING={site.ring}"
    scores = f"{site.scale!r}, {site.softcap!r}, CAPPED={bool(site.softcap)}"
    strides = "k_g, k_t, v_g, v_t"

    of_part.lines.append(
        f"tile_k, tile_v = attention.load_tile(k_cache, v_cache, group, begin, stop, {strides}, {sizes}, BLOCK_N=BLOCK_N)"
    )
    q = _joined(_queries(site, of_part), of_part)
    of_part.lines.append(
        f"attention.attend_part({q}, tile_k, tile_v, k_cache, v_cache, {start}, begin, stop, group, part, sums, marks, "
        f"{strides}, t, splits, {scores}, N={n}, {sizes}, BLOCK_N=BLOCK_N, {mask}, BLOCK_M={max(16, padded(n))})"
    )
    queries = _queries(site, of_token)
    k, v = (of_token.value(x, _of_head("group", of_token, width)) for x, width in ((site.k, d), (site.v, e)))
    of_token.lines.append(f"attention.write_token({k}, {v}, k_cache, v_cache, group, {start}, t, {strides}, {sizes})")
    for q, row, inside in queries:
        held = f"{row}, {inside}, splits, sums, marks, splits, {scores}, E={e}, BLOCK_E={width_e}"
        of_token.lines.append(f"attention.attend_token({q}, {k}, {v}, {held})")

    lines = ["pid = tl.program_id(0)", f"group, part = pid % {g}, pid // {g}", "let_next_start(PDL)", *head.lines]
    lines.append(f"begin, stop, active = attention.own_part({start}, part, t, splits, {mask}, BLOCK_N=BLOCK_N)")
    lines += ["if part < splits:", "    if part < active:", *(f"        {line}" for line in arranged(of_part))]
    lines += ["else:", *(f"    {line}" for line in arranged(of_token))]
    more = f"k_cache, v_cache, sums, marks, {strides}, t, splits, PDL: tl.constexpr, BLOCK_N: tl.constexpr"
    return replace(kernel_text(f"attention_{n}_{d}", leaves, (), lines, more), makes=(result,))


def _queries(site: Site, emitter: Emitter) -> list[tuple[str, str, str]]:
    """Those of a key head: `[1 d]` each if they are few, else all `[m d]`; with their head, and which are asked for."""
    _, n, d, _ = site.sizes
    if n <= FEW_QUERIES:
        rows = [emitter.assign(f"group * {n} + {i}") for i in range(n)]
        return [(emitter.value(site.q, _of_head(row, emitter, d)), row, f"{row} >= 0") for row in rows]
    emitter.lines += [f"m = tl.arange(0, {max(16, padded(n))})[:, None]", f"head = group * {n} + m"]
    frame = _of_head("head", emitter, d, f"m < {n}")
    return [(emitter.value(site.q, frame), "head", frame.row_inside)]


def _joined(queries: Sequence[tuple[str, str, str]], emitter: Emitter) -> str:
    """`[m d]`; a matrix unit takes 16 rows at least."""
    made, *_ = queries[0]
    if len(queries) == 1 and queries[0][1] == "head":
        return made
    emitter.lines.append("m = tl.arange(0, 16)[:, None]")
    made = emitter.assign(f"tl.where(m == 0, {made}, 0.0)")
    for i, (q, _, _) in enumerate(queries[1:], 1):
        made = emitter.assign(f"tl.where(m == {i}, {q}, {made})")
    return made


def _of_head(row: str, emitter: Emitter, width: int, inside: str = "") -> Frame:
    column = emitter.whole(width)
    return Frame(row, column.column, inside, column.column_inside)


def kernel_text(name: str, leaves: Sequence[Node], makes: Sequence[Node], lines: Sequence[str], more: str) -> Text:
    names = ", ".join([f"p{i}" for i in range(len(leaves))] + [f"o{i}" for i in range(len(makes))] + [more])
    body = "".join(f"    {line}\n" for line in lines)
    header = HEADER.format(name=name, parameters=names, plain=PLAIN.findall(more))
    return Text(name, header + body, tuple(leaves), tuple(makes))
