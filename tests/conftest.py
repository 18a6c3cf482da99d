"""Shared test set-up."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # the table of masks is shared by several folders
torch.set_num_threads(1)  # tiny models: threads cost more than they bring
