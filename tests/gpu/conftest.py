"""Set-up of tests on a GPU."""

from __future__ import annotations

import os

os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT-RTX reads it once: without it float32 engines multiply in TF32
