"""A decoder from its programs, compiled here or read from a file."""

from __future__ import annotations

import torch
from torch.fx import Graph

from trilithon.capture.collectives import group_of, is_gathered
from trilithon.lower.backend import Blueprint
from trilithon.lower.native.step import NativeStep
from trilithon.options import Options
from trilithon.rewrite.cache_shape import CacheShape
from trilithon.runtime.context import HeldContext
from trilithon.runtime.decoder import CachedDecoder, CachedModules
from trilithon.runtime.prompt import PromptGraphs
from trilithon.runtime.step import AT_ONCE


def assemble(
    modules: CachedModules,
    shapes: list[CacheShape],
    cache_tokens: int,
    options: Options,
    device: torch.device,
    first_tokens: int | None,
    context: HeldContext | None,
    blueprints: dict[str, Blueprint],
    graph: Graph | None = None,
) -> CachedDecoder:
    """A decoder with CUDA graphs where the options and the device say so.

    Args:
        first_tokens: None for engines, which are built for one size of cache; their graphs of prompts would be void once they
            have run at another length.
        context: of an encoder-decoder.
        blueprints: what the programs were lowered from, by name; empty for engines.
        graph: that they were made of, which says whether several ranks run them; None = one process does.
    """
    graphs = device.type == "cuda" if options.cuda_graphs is None else options.cuda_graphs
    decoder = CachedDecoder(modules, shapes, cache_tokens, options.max_batch, device, graphs, first_tokens)
    decoder.blueprints = blueprints
    if graph is not None:
        decoder.group = group_of(graph)
        decoder.same_logits = decoder.group is None or is_gathered(graph)
    if graphs and decoder.same_logits and isinstance(modules.decode, NativeStep):
        decoder.at_once = AT_ONCE
    if context is not None:
        context.moved, decoder.context = decoder.drop_graphs, context
    elif graphs and first_tokens is not None:
        decoder.prompts = PromptGraphs(modules.prefill)
    return decoder
