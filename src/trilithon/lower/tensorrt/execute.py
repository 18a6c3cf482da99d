"""Run an engine on the GPU, on PyTorch's tensors and current stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, cached_property
from mmap import ACCESS_READ, mmap
from typing import Any

import torch
from torch import Tensor

from trilithon.errors import CannotLower, InputError
from trilithon.lower.tensorrt.engine import Engine
from trilithon.lower.tensorrt.library import errors_since, library, logger, mark, torch_dtypes, warn_of_running


@cache
def _runtime() -> Any:
    """One for all engines, for as long as the process runs."""
    warn_of_running()
    return library().Runtime(logger())


class Executor:
    """An engine, loaded when first called; outputs that alias an input are written into its memory.

    Calls may be captured in a CUDA graph once one of the same shapes was made before.

    Args:
        weights: what the engine reads beside its inputs, by name.
        plan: the engine's file, if it is mapped already.
    """

    def __init__(self, engine: Engine, weights: Mapping[str, Tensor], plan: mmap | None = None) -> None:
        self.engine, self.weights, self._plan = engine, dict(weights), plan
        self._written = set(engine.aliases.values())
        self._shapes: tuple[torch.Size, ...] | None = None  # of the last call

    @property
    def _context(self) -> Any:
        return self._loaded[-1]

    @cached_property
    def _loaded(self) -> tuple[Any, ...]:
        """Engine, settings and context; a tuple lets go of its last first, as TensorRT asks for."""
        trt, place, runtime = library(), mark(), _runtime()
        if self._plan is not None:
            loaded = runtime.deserialize_cuda_engine(self._plan)
        else:
            with self.engine.plan.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as plan:
                loaded = runtime.deserialize_cuda_engine(plan)
        if loaded is None:
            raise CannotLower(
                f"cannot load the engine {self.engine.plan.name}, built for {self.engine.target}",
                why="; ".join(errors_since(place)) or "TensorRT says no more",
                todo="build it on this machine, with this TensorRT and for this GPU",
            )
        config = loaded.create_runtime_config() if hasattr(loaded, "create_runtime_config") else None
        if config is not None and hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER  # no kernel changes behind a captured graph
            config.dynamic_shapes_kernel_specialization_strategy = eager
        context = loaded.create_execution_context(config) if config is not None else loaded.create_execution_context()
        if context is None:
            raise CannotLower(
                f"cannot run the engine {self.engine.plan.name}",
                why="; ".join(errors_since(place)) or "TensorRT gives no context for it, and says no more",
                todo="free memory of the GPU, or compile with a smaller max_tokens or max_batch",
            )
        self._bind_weights(context)
        return loaded, config, context

    def _bind_weights(self, context: Any) -> None:
        """Give the context the addresses of the weights; those on the CPU are copied to the GPU first.

        Raises:
            CannotLower: one is missing, or is not what the engine was built for.
        """
        engine = context.engine
        for name in self.engine.weights:
            wanted = torch_dtypes()[engine.get_tensor_dtype(name)], tuple(engine.get_tensor_shape(name))
            given = self.weights.get(name)
            if given is None or (given.dtype, tuple(given.shape)) != wanted:
                found = "there is none" if given is None else f"there is one of {given.dtype} {list(given.shape)}"
                raise CannotLower(
                    f"cannot run the engine {self.engine.plan.name}",
                    why=f"it reads {name}, {wanted[0]} {list(wanted[1])}, and {found}",
                    todo="save it again, or compile it again",
                )
            self.weights[name] = given.to("cuda")
            context.set_tensor_address(name, self.weights[name].data_ptr())

    @cached_property
    def _used(self) -> set[str]:
        """Names of the tensors that the engine knows: an input that nothing reads is none of them."""
        engine = self._context.engine
        return {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs that alias no input, in order.

        Args:
            tensors: on the GPU, one for each input; their shapes within the engine's ranges.

        Raises:
            InputError: a size is outside the engine's range.
            CannotLower: the engine cannot be loaded or run.
        """
        context, place = self._context, mark()
        used = self._used
        held = [x.contiguous() for x in tensors]
        self._wait_for_other_shapes(tuple(x.shape for x in held))
        for spec, x, given in zip(self.engine.inputs, held, tensors, strict=True):
            if spec.name not in used:
                continue
            if not context.set_input_shape(spec.name, tuple(x.shape)):
                ranges = ", ".join(f"{a.low}..{a.high}" for a in spec.axes)
                raise InputError(
                    f"{spec.name} has shape {list(x.shape)}, which the engine does not take",
                    why=f"it was built for [{ranges}]",
                    todo="compile with a larger max_tokens or max_batch",
                )
            context.set_tensor_address(spec.name, x.data_ptr())
            if spec.name in self.engine.aliases:
                if x is not given:
                    raise InputError(f"{spec.name} must be contiguous", why="the engine writes into its memory")
                context.set_tensor_address(self.engine.aliases[spec.name], x.data_ptr())
        outputs = [self._output(context, name, held[0].device) for name in self.engine.outputs if name not in self._written]
        if not self._enqueue(context) or errors_since(place):
            raise CannotLower(
                f"the engine {self.engine.plan.name} did not run",
                why="; ".join(errors_since(place)) or "TensorRT says no more",
                todo="please report this with trilithon doctor",
            )
        return tuple(outputs)

    def _wait_for_other_shapes(self, shapes: tuple[torch.Size, ...]) -> None:
        """Before a context gets other shapes: it may keep on the host what a run still reads."""
        if self._shapes not in (None, shapes) and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        self._shapes = shapes

    def _enqueue(self, context: Any) -> bool:
        """Run behind what PyTorch's current stream holds; on the default stream TensorRT would wait for the GPU."""
        current = torch.cuda.current_stream()
        if current != torch.cuda.default_stream():
            return bool(context.execute_async_v3(current.cuda_stream))
        self._stream.wait_stream(current)
        done = context.execute_async_v3(self._stream.cuda_stream)
        current.wait_stream(self._stream)
        return bool(done)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def _output(self, context: Any, name: str, device: torch.device) -> Tensor:
        dtype = torch_dtypes()[context.engine.get_tensor_dtype(name)]
        made = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=device)
        context.set_tensor_address(name, made.data_ptr())
        return made
