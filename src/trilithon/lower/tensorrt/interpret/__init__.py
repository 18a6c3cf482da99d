"""The CPU reference interpreter of a TensorRT network: what a network means, without a GPU.

It sees the layers only. What the builder makes of them is another question: see `first_difference`, which also takes
tensors that an engine computed.
"""

from trilithon.lower.tensorrt.interpret import arithmetic, blocks, columns, indices, shapes
from trilithon.lower.tensorrt.interpret.compare import Difference, first_difference
from trilithon.lower.tensorrt.interpret.walk import interpret, tensors

__all__ = ["Difference", "arithmetic", "blocks", "columns", "first_difference", "indices", "interpret", "shapes", "tensors"]
