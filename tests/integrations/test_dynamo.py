"""torch.compile(backend="trilithon"): only what is proved of all inputs that Dynamo's guards let through is changed."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as sdpa

from models.configs import tiny
from trilithon.capture.dynamo import call_arguments, trace_calls
from trilithon.integrations import dynamo
from trilithon.prove.program import examine_program
from trilithon.report.report import Report, SiteReport
from trilithon.rewrite.drop_masks import droppable, guards

H, D = 2, 4
INF = float("inf")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dynamo.register()
    dynamo.clear_reports()
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class Attend(nn.Module):
    """Self-attention with the mask that `make(x, *given)` gives."""

    def __init__(self, make: Callable[..., Any], keys: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project, self.make, self.keys = nn.Linear(H * D, 3 * H * D), make, keys

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = self.project(x).view(b, s, 3, H, D).permute(2, 0, 3, 1, 4)
        q = q if self.keys is None else q[:, :, -self.keys :]
        return sdpa(q, k, v, attn_mask=self.make(x, *given)).transpose(1, 2).flatten(2)


class Seen:
    """A backend that keeps the graphs it is given, and runs them op by op."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return lookup_backend("aot_eager")(gm, inputs)

    @property
    def calls(self) -> list[dict[str, Any]]:
        return [call_arguments(n) for gm in self.graphs for n in gm.graph.find_nodes(op="call_function", target=sdpa)]

    @property
    def dropped(self) -> list[bool]:
        return [call.get("attn_mask") is None for call in self.calls]


def compiled(model: nn.Module, seen: Seen, **settings: Any) -> Any:
    return torch.compile(model, backend="trilithon", options={"trilithon.backend": seen}, **settings)


def x_of(b: int = 2, s: int = 7) -> Tensor:
    return torch.randn(b, s, H * D, generator=torch.Generator().manual_seed(s))


def check(model: nn.Module, *calls: tuple[Any, ...], **settings: Any) -> Seen:
    """The compiled model gives eager's numbers in each call, in this order."""
    seen = Seen()
    fast = compiled(model, seen, **settings)
    for given in calls:
        torch.testing.assert_close(fast(*given), model(*given))
    return seen


def only_site() -> SiteReport:
    (report,) = dynamo.reports()
    (site,) = report.sites
    return site


def note() -> str:
    (report,) = dynamo.reports()
    assert not report.sites
    return " ".join(report.notes)


# ------------------------------------------------------------ masks


def places(x: Tensor) -> tuple[Tensor, Tensor]:
    i = torch.arange(x.shape[1], device=x.device)
    return i[:, None], i[None, :]


def causal(x: Tensor) -> Tensor:
    q, k = places(x)
    return k <= q


def additive(x: Tensor, low: float = -INF) -> Tensor:
    return torch.full((x.shape[1], x.shape[1]), low).triu(1)


def written_causal(x: Tensor) -> Tensor:
    return torch.zeros(x.shape[1], x.shape[1]).masked_fill_(~causal(x), -INF)


def one_open(x: Tensor) -> Tensor:
    q, k = places(x)
    return (k <= q) | ((q == 2) & (k == 5))


def one_written(x: Tensor) -> Tensor:
    mask = causal(x).clone()
    mask[5, 2] = False
    return mask


def written_through_view(x: Tensor) -> Tensor:
    mask = causal(x).clone()
    mask.view(-1)[1:2].fill_(True)
    return mask


def window(x: Tensor) -> Tensor:
    q, k = places(x)
    return (k <= q) & (k > q - 3)


def padded(x: Tensor, allowed: Tensor) -> Tensor:
    return causal(x) & allowed.bool()[:, None, None, :]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (causal, True),
        (additive, True),
        (lambda x: additive(x, torch.finfo(x.dtype).min), True),
        (written_causal, True),
        (lambda x: causal(x) | True, False),  # every key
    ],
)
def test_a_proved_mask_goes(make, flag, dynamic):
    seen = check(Attend(make), (x_of(),), (x_of(3, 9),), (x_of(1, 9),), (x_of(2, 1),), dynamic=dynamic)
    assert seen.dropped and all(seen.dropped)
    flags = {call.get("is_causal") for call in seen.calls}
    assert (True in flags) is flag


@pytest.mark.parametrize(
    ("make", "form"),
    [
        (one_open, "formula"),
        (one_written, "formula"),
        (written_through_view, "formula"),
        (window, "window(3)"),
        (lambda x: causal(x).to(x.dtype), None),  # a bias of 0 and 1
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_another_mask_stays(make, form, dynamic):
    seen = check(Attend(make), (x_of(),), dynamic=dynamic)
    assert seen.dropped == [False]
    mask = only_site().mask
    assert (None if mask is None else str(mask).partition("(k")[0]) == form


def test_a_bias_that_is_an_input_stays():
    bias = additive(x_of())
    for given in (bias, torch.randn(7, 7)):
        assert check(Attend(lambda x, b: b), (x_of(), given), (x_of(), torch.randn(7, 7))).dropped == [False]


def test_padding_may_come_after_a_batch_without():
    ones, padding = torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 7, dtype=torch.int64)
    padding[1, 4:] = 0
    seen = check(Attend(padded), (x_of(), ones), (x_of(), padding))
    assert seen.dropped == [False]
    site = only_site()
    assert str(site.mask) == "causal & padding(l_given_0_)"
    assert "all ones, which nobody checks" in site.runs_on


@pytest.mark.parametrize("keys", [1, 3])
def test_queries_at_the_end_are_not_torchs_causal(keys):
    def ends(x: Tensor) -> Tensor:
        return causal(x)[-keys:]

    assert check(Attend(ends, keys), (x_of(),), dynamic=False).dropped == [keys == 1]  # one query sees every key
    assert keys == 1 or str(only_site().mask) == "causal(lower_right)"


def test_fewer_queries_than_keys_from_the_start_are():
    seen = check(Attend(lambda x: causal(x)[:3], 3), (x_of(),))
    assert seen.dropped == [True] and seen.calls[0]["is_causal"] is True


# ------------------------------------------------------------ values are not guarded


class Buffer(Attend):
    def __init__(self) -> None:
        super().__init__(lambda x: self.allowed[: x.shape[1], : x.shape[1]])
        self.register_buffer("allowed", torch.ones(16, 16, dtype=torch.bool).tril())


def test_a_buffer_may_be_written_to():
    model, seen = Buffer(), Seen()
    fast = compiled(model, seen)
    torch.testing.assert_close(fast(x_of()), model(x_of()))
    model.allowed[:, 0] = False
    model.allowed[0, 0] = model.allowed[3, 6] = True
    torch.testing.assert_close(fast(x_of()), model(x_of()))
    assert seen.dropped == [False]


def test_weights_may_be_attributes_of_the_graph():
    """As Dynamo has them where it does not inline modules: still tensors of which nothing is known."""
    seen = Seen()
    compiled(Buffer(), seen)(x_of())
    (gm,) = seen.graphs
    for node in gm.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta["example_value"], nn.Parameter) or "allowed" in node.name:
            gm.register_buffer(node.name, torch.ones(16, 16, dtype=torch.bool).tril())
            with gm.graph.inserting_after(node):
                attribute = gm.graph.get_attr(node.name)
            attribute.meta = dict(node.meta)
            node.replace_all_uses_with(attribute)
            gm.graph.erase_node(node)
    traced = trace_calls(gm)
    (found,) = examine_program(traced.program)
    assert all(guards(proof) for proof in droppable(found))
    assert list(traced.calls.values()) == gm.graph.find_nodes(op="call_function", target=sdpa)


def test_a_graph_that_writes_to_its_inputs_keeps_its_masks():
    def make(x: Tensor, state: Tensor) -> Tensor:
        state.add_(1)
        return causal(x)

    model, seen = Attend(make), Seen()
    a, b = torch.zeros(3), torch.zeros(3)
    torch.testing.assert_close(compiled(model, seen)(x_of(), a), model(x_of(), b))
    assert seen.dropped == [False] and torch.equal(a, b)
    assert "writes to its inputs" in only_site().runs_on


def test_a_literal_is_part_of_the_program():
    def make(x: Tensor) -> Tensor:
        return torch.where(causal(x), torch.tensor(0.0), torch.tensor(-INF))

    assert check(Attend(make), (x_of(),)).dropped == [True]


def test_python_numbers_are_guarded():
    class Window(Attend):
        def __init__(self) -> None:
            super().__init__(self.mask)
            self.width = 100

        def mask(self, x: Tensor) -> Tensor:
            q, k = places(x)
            return (k <= q) & (k > q - self.width)

    model, seen = Window(), Seen()
    fast = compiled(model, seen)
    for width in (100, 2, 3, 50):
        model.width = width
        torch.testing.assert_close(fast(x_of()), model(x_of()))
    assert seen.dropped[0] is True and not seen.dropped[1]


@pytest.mark.parametrize("dynamic", [None, True])
def test_python_numbers_may_be_negative(dynamic):
    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: int) -> Tensor:
            q, k = places(x)
            y = x[:, None]
            return sdpa(y, y, y, attn_mask=(k <= q) | (k + shift < 0) | (k + shift > 1 << 40))

    check(Shifted(), *((x_of(), shift) for shift in (5, 9, -3, -6, 0, 1 << 41)), dynamic=dynamic)


# ------------------------------------------------------------ what goes on unchanged


def test_training_goes_on_unchanged():
    model, seen = Attend(causal), Seen()
    with torch.enable_grad():
        compiled(model, seen)(x_of()).sum().backward()
        ours = model.project.weight.grad.clone()
        model.zero_grad()
        model(x_of()).sum().backward()
    torch.testing.assert_close(ours, model.project.weight.grad)
    assert not any(seen.dropped) and "torch.no_grad()" in note()


def test_autocast_goes_on_unchanged():
    model, seen = Attend(causal), Seen()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(model, seen)(x_of()), model(x_of()), rtol=1e-2, atol=1e-2)
    assert seen.dropped == [False] and "autocast is on" in note()


def test_a_graph_without_attention_goes_on_unchanged():
    check(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), (torch.randn(3, 8),))
    assert "no call of scaled_dot_product_attention" in note()


def test_dropout_keeps_its_mask():
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sdpa(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril(), dropout_p=0.5)

    seen = Seen()
    compiled(Drops(), seen)(torch.randn(1, 2, 5, 4))
    assert seen.dropped == [False]


def test_sizes_that_depend_on_data_go_on_unchanged():
    def make(x: Tensor, chosen: Tensor) -> Tensor:
        return causal(x) & (chosen.nonzero().shape[0] >= 0)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        check(Attend(make), (x_of(), torch.tensor([0, 1, 1])), (x_of(), torch.tensor([1, 1, 1])))
    assert any("depends on data" in str(report.notes) or not report.passes for report in dynamo.reports())


# ------------------------------------------------------------ as with any backend


@pytest.mark.parametrize("dynamic", [None, True, False])
def test_as_many_graphs_as_without_us(dynamic):
    def count(backend: Any) -> int:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        chosen = {"backend": counter} if backend is None else {"backend": backend, "options": {"trilithon.backend": counter}}
        fast = torch.compile(Attend(padded), dynamic=dynamic, **chosen)
        for b, s in ((2, 7), (2, 9), (3, 9), (1, 9), (2, 11), (4, 16)):
            fast(x_of(b, s), torch.ones(b, s))
        return counter.frame_count

    assert count("trilithon") == count(None)


def test_marked_axes():
    model, seen = Attend(causal), Seen()
    fast = compiled(model, seen)
    x = x_of()
    torch._dynamo.mark_dynamic(x, 1, min=2, max=64)
    fast(x)
    torch.testing.assert_close(fast(x_of(2, 30)), model(x_of(2, 30)))
    assert seen.dropped == [True]


def test_inductor_takes_the_graph_and_its_options():
    model = Attend(causal)
    fast = torch.compile(model, backend="trilithon", options={"max_fusion_size": 8})
    torch.testing.assert_close(fast(x_of()), model(x_of()))
    assert only_site().runs_on == "attention, is_causal=True"
    wrong = torch.compile(model, backend="trilithon", options={"no_such_option": 1})
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="no_such_option"):
        wrong(x_of())


def test_unknown_options_of_ours_are_refused():
    wrong = torch.compile(Attend(causal), backend="trilithon", options={"trilithon.nothing": 1})
    with pytest.raises(BackendCompilerFailed, match=r"known are trilithon.solver_seconds, .*trilithon.backend"):
        wrong(x_of())


def test_the_entry_point_is_the_backend():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["torch_dynamo_backends"].items()
    assert name == "trilithon" and EntryPoint(name, value, "torch_dynamo_backends").load() is dynamo.trilithon
    dynamo.register()
    assert lookup_backend("trilithon") is dynamo.trilithon


# ------------------------------------------------------------ Hugging Face models


def run(name: str, masked: bool, **settings: Any) -> tuple[Seen, tuple[Report, ...]]:
    model, seen = tiny(name).eval(), Seen()
    fast = compiled(model, seen, **settings)
    for pad in (0, 3):
        ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(pad))
        given = {"input_ids": ids} | ({} if name == "bert" else {"use_cache": False})
        if masked:
            given["attention_mask"] = torch.ones_like(ids)
            given["attention_mask"][1, : 0 if name == "bert" else pad] = 0
            given["attention_mask"][1, 9 - (pad if name == "bert" else 0) :] = 0
        torch.testing.assert_close(fast(**given)[0], model(**given)[0])
    return seen, dynamo.reports()


@pytest.mark.parametrize(
    ("name", "masked", "form", "goes"),
    [
        ("llama-3.2", False, "causal", True),
        ("llama-3.2", True, "causal & padding(attention_mask)", False),
        ("gpt2", False, "causal", True),
        ("mistral", False, "window(6)", False),
        ("mistral", True, "padding(attention_mask) & window(6)", False),
        ("bert", True, "padding(attention_mask)", False),
    ],
)
def test_models(name, masked, form, goes):
    seen, (report,) = run(name, masked)
    assert seen.dropped == [goes] * 2
    assert [set(str(s.mask).split(" & ")) for s in report.sites] == [set(form.split(" & "))] * 2


def test_a_model_with_two_masks():
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = transformers.Gemma3TextConfig(
        vocab_size=300, num_hidden_layers=2, sliding_window=4, layer_types=["sliding_attention", "full_attention"], **sizes
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    seen, ids = Seen(), torch.randint(0, 300, (2, 9))
    fast = compiled(model, seen, dynamic=True)
    torch.testing.assert_close(fast(input_ids=ids, use_cache=False)[0], model(input_ids=ids, use_cache=False)[0])
    assert seen.dropped[-2:] == [False, True]
    assert [str(site.mask) for site in dynamo.reports()[-1].sites] == ["window(4)", "causal"]
