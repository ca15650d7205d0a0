"""Tells the frequency of noisy waves of any length, trained by several processes.

torchrun --nproc-per-node 2 examples/data_parallel.py
torchrun --nproc-per-node 2 examples/data_parallel.py --sharded

Without torchrun it is one process.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fused_rnn

CLASSES = 4
LONGEST = 60


class Listener(nn.Module):
    """Which of the frequencies a wave has."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = fused_rnn.GRU(1, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, CLASSES)

    def forward(self, waves: Tensor, lengths: Tensor) -> Tensor:  # [T, B, 1], [B] -> [B, CLASSES]
        output, _ = self.gru(waves, lengths=lengths)  # zero beyond the lengths
        return self.head(output.sum(0) / lengths.unsqueeze(-1))


def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Waves [T, B, 1], their lengths and classes [B]; each process draws others."""
    classes = torch.randint(CLASSES, (batch,), generator=generator)
    lengths = torch.randint(LONGEST // 2, LONGEST + 1, (batch,), generator=generator)
    phase = 2 * math.pi * torch.rand(batch, generator=generator)
    time = torch.arange(LONGEST).unsqueeze(1)
    waves = torch.sin(0.2 * (1 + classes) * time + phase)
    waves += 0.3 * torch.randn(waves.shape, generator=generator)
    return waves.unsqueeze(-1), lengths, classes


@contextmanager
def processes() -> Any:
    """The rank of this process and how many there are; torchrun says so in the environment."""
    if "RANK" not in os.environ:
        yield 0, 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_rank(), dist.get_world_size()
    finally:
        dist.destroy_process_group()


def mean_over_processes(value: float) -> float:
    total = torch.tensor(value)
    if dist.is_initialized():
        dist.all_reduce(total)
        total /= dist.get_world_size()
    return total.item()


def train(options: argparse.Namespace, rank: int, count: int) -> dict[str, float]:
    """Losses and accuracy. A function, so that the model is gone before the process group is."""
    torch.manual_seed(options.seed)  # the same weights everywhere
    model: Any = Listener(options.hidden)
    if count > 1 and options.sharded:
        fully_shard(model)
    elif count > 1:
        model = DistributedDataParallel(model)
    if rank == 0:
        kept = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        print(f"{count} processes, {kept} weights kept in the first of them")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(1000 * options.seed + rank)
    losses: list[float] = []
    for step in range(options.steps):
        waves, lengths, classes = draw(options.batch // count, generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(waves, lengths), classes)
        loss.backward()  # the gradients are the mean over the processes
        optimizer.step()
        losses.append(mean_over_processes(loss.item()))
        if rank == 0 and (step % max(1, options.steps // 10) == 0):
            print(f"step {step:4d}  training loss {losses[-1]:.4f}")
    with torch.no_grad():
        waves, lengths, classes = draw(512, generator)
        right = (model(waves, lengths).argmax(-1) == classes).float().mean().item()
    accuracy = mean_over_processes(right)
    if rank == 0:
        print(f"right in {100 * accuracy:.1f} % of new waves (by chance {100 / CLASSES:.0f} %)")
    return {"before training": losses[0], "training": losses[-1], "accuracy": accuracy}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=64, help="of all processes together")
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sharded", action="store_true", help="each process keeps a part of the weights (FSDP2)"
    )
    options = parser.parse_args(argv)

    with processes() as (rank, count):
        return train(options, rank, count)


if __name__ == "__main__":
    main()
