"""Weights that engines read as inputs, and products of one vector made into one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

import trilithon
from artefacts import file_of
from models.configs import tiny
from trilithon import CannotLower, Compiled, InputError, Options
from trilithon.lower.inputs import Axis, Input, fixed
from trilithon.lower.products import merge_products
from trilithon.lower.tensorrt import weights as module
from trilithon.lower.tensorrt.convert import convert
from trilithon.lower.tensorrt.converters import matmul
from trilithon.lower.tensorrt.engine import Engine, build
from trilithon.lower.tensorrt.execute import Executor
from trilithon.lower.tensorrt.interpret import columns, interpret
from trilithon.lower.tensorrt.interpret.columns import together
from trilithon.lower.tensorrt.interpret.read import Mode, layers_of
from trilithon.lower.tensorrt.library import dtypes
from trilithon.lower.tensorrt.weights import LINEAR, is_bound
from trilithon.runtime.verify import relative_error

aten = torch.ops.aten


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of tiny models are large ones."""
    monkeypatch.setattr(module, "LEAST_BYTES", 1)


@pytest.fixture(scope="module")
def llama() -> Iterator[tuple[nn.Module, Compiled]]:
    """A model in halves, and its engines, which read its matrices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LEAST_BYTES", 1)
        model = halves("llama-3.2", torch.float16)
        yield model, compiled(model, verify=False)


def halves(name: str, dtype: torch.dtype, layers: int = 2) -> nn.Module:
    return tiny(name, layers=layers).to(dtype)


def compiled(model: nn.Module, **options: Any) -> Compiled:
    return trilithon.compile(model, max_tokens=32, backend="tensorrt", options=Options(gpu="sm80", **options))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("name", "dtype", "layers"), [("llama-3.2", torch.float16, 2), ("qwen2.5", torch.bfloat16, 1), ("qwen3", torch.float16, 1)]
)
def test_a_model_reads_its_own_matrices(name: str, dtype: torch.dtype, layers: int) -> None:
    """Of each layer four are read, and one of embeddings; prompts and steps read the same."""
    model = halves(name, dtype, layers)
    llm = compiled(model)  # compared with eager
    prefill, decode = (getattr(llm.decoder.modules, x) for x in ("prefill", "decode"))
    tied = model.config.tie_word_embeddings  # type: ignore[union-attr]
    assert len(prefill.weights) == 4 * layers + (1 if tied else 2)
    assert [x.data_ptr() for x in prefill.weights.values()] == [x.data_ptr() for x in decode.weights.values()]
    own = {p.data_ptr() for p in model.parameters()}  # a merged matrix begins where its first part does
    assert all(x.data_ptr() in own for x in prefill.weights.values())
    assert prefill.engine.weights == tuple(prefill.weights)
    assert "weights.0" not in {spec.name for spec in prefill.engine.inputs}
    ids = torch.arange(1, 12)[None]
    wide = tiny(name, layers=layers).double()
    wide.load_state_dict({key: value.double() for key, value in model.state_dict().items()})
    with torch.no_grad():
        exact, eager = wide(ids).logits[:, -1], model(ids).logits[:, -1]
    got = llm.decoder.prefill(ids, torch.tensor([0]))
    assert relative_error(got, exact) <= 2 * relative_error(eager, exact)


def test_a_change_of_the_model_is_seen(llama: tuple[nn.Module, Compiled]) -> None:
    """Engines hold no copy: what is changed in place is read, merged matrices too."""
    (model, llm), ids = llama, torch.arange(1, 12)[None]
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    before = llm.decoder.prefill(ids, torch.tensor([0]))
    for factor in (8, 1 / 8):
        with torch.no_grad():
            weight *= factor
            want = model(ids).logits[:, -1]
        assert (relative_error(want, before) > 5e-2) == (factor == 8)
        assert relative_error(llm.decoder.prefill(ids, torch.tensor([0])), want) < 1e-2


def test_weights_are_saved_once(llama: tuple[nn.Module, Compiled], tmp_path: Path) -> None:
    model, llm = llama
    folder = llm.save(tmp_path / "saved")
    modes = {file.stat().st_mode for file in folder.iterdir()}
    assert len(modes) == 1
    kept = load_file(file_of(folder, "weights.safetensors"))
    assert len(kept) == len(llm.decoder.modules.prefill.weights)  # type: ignore[attr-defined]
    large = sum(p.nbytes for p in model.parameters() if p.dim() == 2)
    assert large == sum(x.nbytes for x in kept.values())
    again = trilithon.load(folder, device="cpu")
    for name in ("prefill", "decode"):
        mine, theirs = (getattr(x.decoder.modules, name).weights for x in (again, llm))
        assert list(mine) == list(theirs) and all(torch.equal(mine[x], theirs[x]) for x in mine)
    again.save(folder)  # over the file that its weights are mapped from
    mapped = again.decoder.modules.prefill.weights["weights.0"]  # type: ignore[attr-defined]
    assert torch.equal(mapped, llm.decoder.modules.prefill.weights["weights.0"])  # type: ignore[attr-defined]
    shared = [getattr(again.decoder.modules, name).weights["weights.0"] for name in ("prefill", "decode")]
    assert shared[0].data_ptr() == shared[1].data_ptr()
    path = file_of(folder, "weights.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="is damaged or was changed"):
        trilithon.load(folder, device="cpu")


def test_a_model_with_merged_matrices_is_saved_as_before(llama: tuple[Any, Compiled], tmp_path: Path) -> None:
    """transformers and safetensors tell views of one memory from shared weights."""
    model, _ = llama
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float16).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())
    large = sum(p.nbytes for p in model.parameters())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < large + 10_000


def test_a_step_has_one_product_of_matrices_a_layer(llama: tuple[nn.Module, Compiled]) -> None:
    """That behind the activation; all others are kernels with what stands in front of them."""
    model, llm = llama
    net = llm.decoder.modules.decode.network  # type: ignore[attr-defined]
    assert kinds(net).count("MATRIX_MULTIPLY") == model.config.num_hidden_layers  # type: ignore[union-attr]


@pytest.mark.usefixtures("small")
def test_engines_of_other_matrices_are_found_again(tmp_path: Path) -> None:
    """They hold no more than the vectors: of those, others make another engine."""
    model = halves("llama-3.2", torch.float16, layers=1)
    for change, plans in ((None, 2), ("lm_head.weight", 2), ("model.norm.weight", 4)):
        if change is not None:
            model.get_parameter(change).data[5] += 1.0
        llm = compiled(model, engine_cache=str(tmp_path))
        assert len(list(tmp_path.glob("*.plan"))) == plans
        assert llm.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2).shape == (1, 6)


# ------------------------------------------------------------ graphs


def products(*weights: Tensor, biases: tuple[Tensor | None, ...] = (), reads: Any = None) -> GraphModule:
    """The sum of products of one vector, and what `reads` makes of the first matrix."""
    holder, graph = nn.Module(), Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(2, 3, weights[0].shape[1], dtype=weights[0].dtype, device="meta")
    outputs, matrices = [], []
    for i, weight in enumerate(weights):
        holder.register_buffer(f"w{i}", weight)
        matrices.append(graph.get_attr(f"w{i}"))
        arguments = [x, matrices[i]]
        if biases and biases[i] is not None:
            holder.register_buffer(f"b{i}", biases[i])
            arguments.append(graph.get_attr(f"b{i}"))
        outputs.append(graph.call_function(LINEAR, tuple(arguments)))
        outputs[-1].meta["val"] = torch.empty(2, 3, weight.shape[0], dtype=weight.dtype, device="meta")
    if reads is not None:
        outputs.append(graph.call_function(reads, (matrices[0],)))
    graph.output(tuple(outputs))
    return GraphModule(holder, graph)


def random(*sizes: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(sum(sizes))).to(dtype)


def linears(gm: GraphModule) -> int:
    return len(gm.graph.find_nodes(op="call_function", target=LINEAR))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("biases", "expected"), [((), 1), ((5, 6, 7), 1), ((5, None, 7), 3)], ids=["none", "all", "some: apart"]
)
def test_products_of_one_vector(biases: tuple[int | None, ...], expected: int) -> None:
    weights = [random(n, 8) for n in (5, 6, 7)]
    gm = products(*weights, biases=tuple(None if n is None else random(n) for n in biases))
    x = random(2, 3, 8)
    want = gm(x)
    merge_products(gm, is_bound)
    assert linears(gm) == expected
    for mine, theirs in zip(gm(x), want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)
    sizes = [node.meta["val"].shape[-1] for node in gm.graph.find_nodes(op="call_function", target=LINEAR)]
    assert sizes == ([18] if expected == 1 else [5, 6, 7])
    inputs = [Input("x", torch.float16, (fixed(2), Axis(1, 3, 4), fixed(8)))]
    net = convert(gm, inputs)
    assert len(net.weights) == expected
    got = interpret(net, {"x": x})
    for i, theirs in enumerate(want):
        torch.testing.assert_close(got[f"output_{i}"], theirs, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(("least", "dtype"), [(1 << 20, torch.float16), (1, torch.float32)], ids=["small", "wide"])
def test_small_and_wide_weights_are_part_of_the_engine(least: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_BYTES", least)
    gm = merge_products(products(random(5, 8, dtype=dtype), random(6, 8, dtype=dtype)), is_bound)
    assert linears(gm) == 2
    assert convert(gm, [Input("x", dtype, (fixed(2), fixed(3), fixed(8)))]).weights == {}


@pytest.mark.usefixtures("small")
def test_what_another_operation_reads_is_no_input() -> None:
    """A sum over a matrix asks for its numbers when the network is built, as far as its converter knows."""
    gm = products(random(5, 8), random(6, 8), reads=aten.sum.default)
    merge_products(gm, is_bound)
    assert linears(gm) == 2
    net = convert(gm, [Input("x", torch.float16, (fixed(2), fixed(3), fixed(8)))])
    assert [tuple(x.shape) for x in net.weights.values()] == [(6, 8)]


@pytest.mark.usefixtures("small")
def test_what_is_merged_takes_the_place_of_its_parts() -> None:
    """The parts are views of it, so that a change of one is seen; the next program of the model uses the same."""
    parts = [nn.Parameter(random(n, 8)) for n in (5, 6, 7)]
    kept = [part.detach().clone() for part in parts]
    first = merge_products(products(*parts), is_bound).merged_0_1
    assert first.untyped_storage().nbytes() == sum(part.nbytes for part in parts)
    assert all(torch.equal(part, before) for part, before in zip(parts, kept, strict=True))
    again = merge_products(products(*parts), is_bound).merged_0_1
    assert again.data_ptr() == first.data_ptr() and torch.equal(again, first)  # type: ignore[arg-type, operator]
    with torch.no_grad():
        parts[1] += 1
    assert torch.equal(first[5:11], parts[1])  # type: ignore[index]
    assert linears(merge_products(products(parts[0], nn.Parameter(random(6, 8))), is_bound)) == 2  # it is part of another


@pytest.mark.usefixtures("small")
def test_parts_that_do_not_lie_in_rows() -> None:
    """One behind the other in one memory, and yet no matrix below another; what else is kept there is not known."""
    memory = random(2, 6, 6)
    parts = [nn.Parameter(memory[i].T) for i in range(2)]
    assert linears(merge_products(products(*parts), is_bound)) == 2
    parts = [nn.Parameter(random(6, 6).T), nn.Parameter(random(5, 6))]
    want = torch.cat([part.detach() for part in parts])
    assert torch.equal(merge_products(products(*parts), is_bound).merged_0_1, want)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{}, {"weights.0": random(6, 7)}, {"weights.0": random(6, 8).float()}])
def test_weights_that_an_engine_does_not_take(given: dict[str, Tensor], tmp_path: Path) -> None:
    """An engine would read beyond a tensor that is too small."""
    engine = Engine(tmp_path / "a.plan", (), (), {}, ("weights.0",), "sm80", (), (), 0.0)
    own = SimpleNamespace(get_tensor_dtype=lambda name: dtypes()[torch.float16], get_tensor_shape=lambda name: (6, 8))
    with pytest.raises(CannotLower, match=r"reads weights.0, torch.float16 \[6, 8\], and there is"):
        Executor(engine, given)._bind_weights(SimpleNamespace(engine=own))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("transposed", [True, False], ids=["n k", "k n"])
def test_parts_of_a_long_product(transposed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The exact form reads the matrix in parts, and the matrix itself no more."""
    monkeypatch.setattr(matmul, "PARTS", (0, 64, 16))
    weight = random(6, 64) if transposed else random(64, 6)
    holder, graph = nn.Module(), Graph()
    holder.register_buffer("w", weight)
    x = graph.placeholder("x")
    target = LINEAR if transposed else aten.mm.default
    graph.output((graph.call_function(target, (x, graph.get_attr("w"))),))
    gm, given = GraphModule(holder, graph), random(5, 64)
    inputs = [Input("x", torch.float16, (fixed(5), fixed(64)))]
    net = convert(gm, inputs, exact=2)
    got = interpret(net, {"x": given})["output_0"]
    want = given.double() @ (weight.T if transposed else weight).double()
    assert relative_error(got, want) < 1e-3
    engine = build(net, inputs, "sm80", tmp_path / "parts.plan")
    assert engine.weights == ("weights.1",) and net.weights["weights.1"].shape == (4, 6, 16)


# ------------------------------------------------------------ one row


def one_row(*, rows: int = 1, costly: bool = False, twice: bool = False, dtype: torch.dtype = torch.float16) -> GraphModule:
    """A row times a matrix; of a vector that an activation made, or whose products something else reads too."""
    holder, graph = nn.Module(), Graph()
    holder.register_buffer("w", random(6, 64, dtype=dtype))
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(1, rows, 64, dtype=dtype, device="meta")
    vector = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.silu.default, (x,)), x)) if costly else x
    result = graph.call_function(LINEAR, (vector, graph.get_attr("w")))
    outputs = (result, graph.call_function(LINEAR, (x, graph.get_attr("w")))) if twice else (result,)
    graph.output(outputs)
    return GraphModule(holder, graph)


def kinds(net: Any) -> list[str]:
    return [net.definition.get_layer(i).type.name for i in range(net.definition.num_layers)]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "costly", "products"), [(1, False, 0), (1, True, 1), (2, False, 1)])
def test_one_row_is_added_up_by_columns(rows: int, costly: bool, products: int, dtype: torch.dtype) -> None:
    gm = one_row(rows=rows, costly=costly, dtype=dtype)
    net = convert(gm, [Input("x", dtype, (fixed(1), fixed(rows), fixed(64)))])
    assert kinds(net).count("MATRIX_MULTIPLY") == products
    x = random(1, rows, 64, dtype=dtype)
    got, exact = interpret(net, {"x": x})["output_0"], gm.double()(x.double())[0]
    assert got.shape == (1, rows, 6) and got.dtype == dtype
    assert relative_error(got, exact) <= 2 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("small")
def test_rows_of_any_number_are_a_product() -> None:
    net = convert(one_row(), [Input("x", torch.float16, (Axis(1, 1, 4), fixed(1), fixed(64)))])
    assert kinds(net).count("MATRIX_MULTIPLY") == 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("twice", [False, True], ids=["alone", "read twice"])
def test_columns_are_interpreted_without_the_wide_matrix(twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cast, the products and their sums are one step, and give what the three give."""
    gm, x = one_row(twice=twice), random(1, 1, 64)
    net = convert(gm, [Input("x", torch.float16, (fixed(1), fixed(1), fixed(64)))])
    before = interpret(net, {"x": x})
    monkeypatch.setattr(columns, "BLOCK", 1)
    layers = layers_of(net, {}, Mode(None, 0.0))
    steps = together(layers)
    assert [layer.kind for layer in steps].count(columns.COLUMNS) == (2 if twice else 1)
    assert "PROD" not in {layer.own.op.name for layer in steps if layer.kind == "ELEMENTWISE"}
    for name, value in interpret(net, {"x": x}).items():
        torch.testing.assert_close(value, before[name])
    made = next(x for x in layers if x.kind == "ELEMENTWISE" and x.own.op.name == "PROD").results[0]
    net.output(net.cast(made, torch.float16), "seen")  # something else reads the products now
    again = [layer.kind for layer in together(layers_of(net, {}, Mode(None, 0.0)))]
    assert again.count(columns.COLUMNS) == (1 if twice else 0)
