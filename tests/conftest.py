"""The conditions of every test: a fixed seed, poisoned memory, torch's settings put back."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from fused_rnn import ops

hypothesis.settings.register_profile(
    "default", max_examples=30, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def conditions() -> Iterator[None]:
    """Seed 0; new memory, torch's and ours, is NaN, so that what a kernel leaves unwritten is seen.

    One thread unless a test wants more: on a busy machine OpenMP's waiting takes minutes.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    if ops.available:
        ops._C.poison_new_memory(True)
    yield
    if ops.available:
        ops._C.poison_new_memory(False)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
