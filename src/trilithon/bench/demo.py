"""`trilithon demo`: take real models apart, generate with one and compare with eager, and measure. Nothing is prepared."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import nn

from trilithon.bench.live import print_tokens
from trilithon.bench.measure import measure_model
from trilithon.bench.plot import save_plot
from trilithon.bench.table import Table
from trilithon.capture import hf
from trilithon.compiled import Compiled
from trilithon.compiler import compile as compile_model
from trilithon.compiler import explain
from trilithon.errors import TrilithonError
from trilithon.prove.verdict import Verdict
from trilithon.report.report import Report
from trilithon.report.text import render
from trilithon.spec.masks import Mask

PROMPTS = ("The for statement is used to", "A class definition is")
MEASURED_PROMPT = (
    "The import statement combines two operations; it searches for the named module, then it binds the results of that "
    "search to a name in the local scope. The search operation of the import statement is defined as a call."
)
PROMPT_TOKENS, NEW_TOKENS, REPEATS = 128, 64, 2
GENERATED_TOKENS = 96
THREADS = 1  # byte-llama is too small for more to help, and on a busy machine they wait for each other


@dataclass(frozen=True)
class Exhibit:
    """A model and a call to explain.

    Attributes:
        shows: what to look for.
        weights: load them; otherwise the architecture alone is explained.
    """

    model: str
    inputs: tuple[str, ...]
    shows: str
    weights: bool = False

    @property
    def name(self) -> str:
        return f"{self.model} ({', '.join(self.inputs)})"


EXHIBITS = (
    Exhibit("byte-llama", ("input_ids",), "token ids alone: the mask is causal for every length"),
    Exhibit("byte-llama", ("input_ids", "position_ids"), "positions may restart, so causal needs a check at run time"),
    Exhibit("byte-llama", ("input_ids", "attention_mask"), "a batch with padding: causal, and no padding key"),
    Exhibit("minilm", ("input_ids", "attention_mask"), "an encoder with real weights: padding, and never causal", weights=True),
    Exhibit("llama-3.2-1b", ("input_ids",), "full size, from its configuration: none of its weights is made"),
)


@dataclass
class Demo:
    """One run of the demo: where it saves and prints, the lines of its summary, and the masks drawn so far."""

    out: Path
    console: Console
    summary: list[str] = field(default_factory=list)
    drawn: set[Mask] = field(default_factory=set)

    def run(self) -> bool:
        """All parts; True if nothing failed."""
        started = time.perf_counter()
        self.out.mkdir(parents=True, exist_ok=True)
        with self.section("1. Explain: what each attention mask means, proved for every size"):
            for exhibit in EXHIBITS:
                self.explain(exhibit)
        with self.section("2. Generate: byte-llama with a static KV cache, compared with eager"):
            model, compiled = self.compile()
            same = self.generate(model, compiled)
        with self.section(f"3. Measure: {PROMPT_TOKENS} tokens in, {NEW_TOKENS} out, on this machine"):
            table = self.measure(model, compiled)
        self.finish(time.perf_counter() - started)
        return same and not any(row.error for row in table.rows)

    @contextmanager
    def section(self, title: str) -> Iterator[None]:
        started = time.perf_counter()
        self.console.print()
        self.console.rule(Text(title, style="bold"), align="left")
        yield
        self.console.print(f"[dim]{time.perf_counter() - started:.0f} s[/]", highlight=False)

    def explain(self, exhibit: Exhibit) -> None:
        self.console.print(Text.assemble("\n", (exhibit.name, "bold cyan"), f"  {exhibit.shows}\n"))
        try:
            model = hf.load_model(exhibit.model, device="cpu" if exhibit.weights else "meta")
        except TrilithonError as error:
            self.console.print(Text(str(error), style="yellow"))
            self.summary.append(f"{exhibit.name}: left out, {error.what}")
            return
        report = explain(model, *hf.example_for(model, exhibit.inputs))
        render(report, self.console, self.drawn)
        report.save(self.out / f"{exhibit.model}-{'-'.join(exhibit.inputs)}.html")
        self.summary.append(f"{exhibit.name}: {_outcome(report)}")

    def compile(self) -> tuple[nn.Module, Compiled]:
        started = time.perf_counter()
        model = hf.load_model("byte-llama")
        compiled = compile_model(model, max_tokens=PROMPT_TOKENS + NEW_TOKENS)
        seconds = time.perf_counter() - started
        changed = ", ".join(f"{name} {count}" for name, count in compiled.report.passes.items() if count)
        self.console.print(f"compiled and verified against eager in {seconds:.1f} s; rewritten: {changed}", highlight=False)
        for note in compiled.report.notes:
            self.console.print(note, highlight=False)
        compiled.report.save(self.out / "byte-llama-compiled.html")
        compiled.report.save(self.out / "byte-llama-compiled.json")
        return model, compiled

    def generate(self, model: nn.Module, compiled: Compiled) -> bool:
        """Stream each prompt, and compare its greedy tokens with those of Hugging Face's eager attention."""
        tokenizer = hf.load_tokenizer("byte-llama")
        eager = hf.load_model("byte-llama", attention="eager")
        equal = []
        for prompt in PROMPTS:
            ids = _ids(tokenizer, prompt)
            self.console.print()
            self.write(prompt)
            steps = partial(compiled.stream, ids, max_new_tokens=GENERATED_TOKENS)
            new, speed = print_tokens(steps, tokenizer, self.write)
            want = eager.generate(ids, max_new_tokens=GENERATED_TOKENS, do_sample=False)  # type: ignore[operator]
            equal.append(new == want[0, ids.shape[1] :].tolist())
            self.console.print(f"\n[dim]{speed}[/]\nsame tokens as eager: {_yes(equal[-1])}", highlight=False)
        self.summary.append(f"byte-llama: {sum(equal)} of {len(equal)} generations equal Hugging Face eager's, token by token")
        return all(equal)

    def measure(self, model: nn.Module, compiled: Compiled) -> Table:
        ids = _ids(hf.load_tokenizer("byte-llama"), MEASURED_PROMPT)[:, :PROMPT_TOKENS]
        table = measure_model(
            model,
            "byte-llama",
            ids,
            NEW_TOKENS,
            repeats=REPEATS,
            compiled=compiled,
            command="trilithon demo",
            console=self.console,
        )
        self.console.print(table.to_rich())
        (self.out / "bench.json").write_text(table.to_json(), encoding="utf-8")
        save_plot(table, self.out / "bench.png")
        self.summary += [_result(row) for row in table.rows[1:]]
        return table

    def write(self, text: str) -> None:
        self.console.file.write(text)
        self.console.file.flush()

    def finish(self, seconds: float) -> None:
        saved = sorted(path.name for path in self.out.iterdir() if path.is_file())
        lines = [*self.summary, "", f"saved in {self.out}/: {', '.join(saved)}", f"total time: {seconds:.0f} s"]
        self.console.print()
        self.console.print(Panel(Text("\n".join(lines)), title="Summary", title_align="left"))


def run_demo(out: Path, console: Console) -> bool:
    """Run the demo and save its reports, table and chart in `out`; True if nothing failed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        return Demo(out, console).run()
    finally:
        torch.set_num_threads(threads)


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(text, return_tensors="pt").input_ids
    return ids


def _yes(equal: bool) -> str:
    return "[green]yes[/]" if equal else "[red]no[/]"


def _outcome(report: Report) -> str:
    proved = [s for s in report.sites if s.verdict is Verdict.PROVED]
    forms = " / ".join(dict.fromkeys(str(s.mask) for s in proved))
    guards = f", if {' and '.join(g.text for g in report.guards)}" if report.guards else ""
    return f"{len(proved)} of {len(report.sites)} masks proved" + (f": {forms}{guards}" if proved else "")


def _result(row: Any) -> str:
    if row.error:
        return f"{row.name}: failed, {row.error.splitlines()[0]}"
    same = "same tokens" if row.tokens_equal_baseline else "other tokens"
    return f"{row.name}: {row.ratio_to_baseline:.2f}x as fast as PyTorch without a cache, {same}"
