"""The same seed gives the same bits; threads, interrupts and time do no harm."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run
from test_contract_tools import EVERY, arguments
from test_environment import resident_kib
from torch import Tensor, nn

import fused_rnn
from layers import BEYOND, KINDS, flatten, make

each = pytest.mark.parametrize("kind", [*KINDS, *BEYOND])
# What draws masks in training; not every cell goes with each.
RANDOM: dict[str, dict[str, Any]] = {
    "nothing": {},
    "dropout": {"dropout": 0.4},
    "weight_dropout": {"weight_dropout": 0.3, "dropout": 0.4, "variational": True},
    "zoneout": {"zoneout": (0.2, 0.3)},
    "recurrent_dropout": {"recurrent_dropout": 0.3, "recompute": True},
}


def train(kind: str, options: dict[str, Any], B: int = 9) -> list[Tensor]:
    """Seeded: weights, input, masks; three steps of training, and what is left of them."""
    torch.manual_seed(3)
    layer = make(fused_rnn, kind, 12, 24, 2, bidirectional=True, **options)
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        found = flatten(layer(torch.randn(11, B, 12)))
        sum((t.square().sum() for t in found), start=torch.zeros(())).backward()
        optimizer.step()
    return [*(t.detach() for t in found), *(p.detach() for p in layer.parameters())]


@pytest.fixture
def any_number_of_threads() -> Iterator[None]:
    """Also on one core: what is forced is not first weighed."""
    yield
    fused_rnn.force_split(None)


@each
@pytest.mark.parametrize("random", RANDOM)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(
    kind: str, random: str, any_number_of_threads: None
) -> None:
    refused = {"zoneout": ("LSTMP", "PEEPHOLEP"), "recurrent_dropout": ("GRU_BEFORE", "INDRNN")}
    if kind.removesuffix("_TANH") in refused.get(random, ()):
        pytest.skip("they do not go together")
    expected = train(kind, RANDOM[random])
    for threads, split in ((1, None), (2, None), (3, None), (2, "rows"), (3, "rows")):
        torch.set_num_threads(threads)
        fused_rnn.force_split(split if split else None)
        assert all(map(torch.equal, train(kind, RANDOM[random]), expected)), (threads, split)
