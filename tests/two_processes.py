"""Two processes of torchrun; each function here is a check. See test_distributed.py.

torchrun --nproc-per-node 2 tests/two_processes.py RESULTS
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layers import BEYOND, CELLS, KINDS, flatten, make
from test_beyond_torch import CELLS as CELLS_BEYOND
from test_beyond_torch import make_cell
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fused_rnn

I, H, T, B = 5, 8, 4, 6
EVERY: dict[str, Callable[[], Any]] = {
    **{kind: lambda kind=kind: make(fused_rnn, kind, I, H, 2) for kind in (*KINDS, *BEYOND)},
    **{name: lambda name=name: getattr(fused_rnn, name)(I, H) for name in CELLS},
    **{f"{kind} cell": lambda kind=kind: make_cell(kind, I, H) for kind in CELLS_BEYOND},
}
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


class All(nn.Module):
    """Every layer and cell over the same input [T, B, I]."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: build() for name, build in EVERY.items()})

    def forward(self, input: Tensor) -> Tensor:
        total = input.new_zeros(())
        for part in self.parts.values():
            x = input[0] if isinstance(part, nn.RNNCellBase) else input
            total = total + sum(t.float().square().sum() for t in flatten(part(x)))
        return total / input.shape[1]


def batch() -> Tensor:
    """The same in both processes."""
    return torch.randn(T, B, I, generator=torch.Generator().manual_seed(1))


def shard(whole: Tensor) -> Tensor:
    rank = dist.get_rank()
    return whole.chunk(2, 1)[rank]


def assert_same_everywhere(tensor: Tensor) -> None:
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor.contiguous())
    assert torch.equal(*both)


@check
def data_parallel_training_is_training_on_the_whole_batch() -> None:
    torch.manual_seed(dist.get_rank())  # DDP sends the weights of the first process
    model = DistributedDataParallel(All())
    alone = copy.deepcopy(model.module)
    steps = [(model, shard(batch())), (alone, batch())]
    for module, input in steps:
        optimizer = torch.optim.SGD(module.parameters(), 0.01)
        for _ in range(2):
            optimizer.zero_grad()
            module(input).backward()
            optimizer.step()
    for ours, whole in zip(model.module.parameters(), alone.parameters(), strict=True):
        assert_same_everywhere(ours.detach())
        torch.testing.assert_close(ours, whole)


@check
def data_parallel_of_ragged_batches() -> None:
    """`lengths=` and packed sequences go through DDP's forward."""

    class Ragged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = fused_rnn.GRU(I, H, bidirectional=True)

        def forward(self, input: Tensor, lengths: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(input, lengths, enforce_sorted=False)
            a, b = self.gru(input, lengths=lengths)[0], self.gru(packed)[0].data
            return a.square().sum() + b.square().sum()

    torch.manual_seed(0)
    model = DistributedDataParallel(Ragged())
    alone = copy.deepcopy(model.module)
    lengths = torch.tensor([4, 1, 3, 2, 4, 1])
    model(shard(batch()), lengths.chunk(2)[dist.get_rank()]).backward()
    (alone(batch(), lengths) / 2).backward()
    for ours, whole in zip(model.module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, whole.grad)


@check
def fully_sharded_training_is_training_on_the_whole_batch() -> None:
    torch.manual_seed(0)
    alone = All()
    model = copy.deepcopy(alone)
    for part in model.parts.values():
        fully_shard(part)
    fully_shard(model)
    for module, input in ((model, shard(batch())), (alone, batch())):
        optimizer = torch.optim.Adam(module.parameters(), 0.01)
        module(input).backward()
        optimizer.step()
        module(input).backward()
    for (name, ours), whole in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert ours.to_local().shape[0] < whole.shape[0], name
        torch.testing.assert_close(ours.full_tensor(), whole, msg=name)


@check
def fully_sharded_in_bfloat16() -> None:
    """The parameters are float32 shards, what is gathered and computed is bfloat16."""
    torch.manual_seed(0)
    alone = All()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = copy.deepcopy(alone)
    seen: list[torch.dtype] = []
    for part in model.parts.values():
        part.register_forward_hook(
            lambda m, x, y: seen.extend(t.dtype for t in (*flatten(y), *m.parameters()))
        )
        fully_shard(part, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    model(shard(batch())).backward()
    assert set(seen) == {torch.bfloat16}
    low, bfloat16 = alone.to(torch.bfloat16), batch().to(torch.bfloat16)
    halves = [
        torch.autograd.grad(low(half), list(low.parameters())) for half in bfloat16.chunk(2, 1)
    ]
    for (name, ours), *both in zip(model.named_parameters(), *halves, strict=True):
        expected = (both[0].float() + both[1].float()) / 2
        torch.testing.assert_close(ours.grad.full_tensor(), expected, msg=name)


@check
def made_on_meta_then_sharded_then_given_weights() -> None:
    with torch.device("meta"):
        model = All()
    for part in model.parts.values():
        fully_shard(part)
    fully_shard(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.to_local().detach().fill_(torch.nan)
    torch.manual_seed(0)
    for part in model.parts.values():
        part.reset_parameters()
    for name, parameter in model.named_parameters():
        whole = parameter.full_tensor()
        assert whole.isfinite().all(), name
        if ".norm" in name:
            gains = 9 * H if len(whole) == 10 * H else 6 * H
            assert torch.equal(whole, (torch.arange(len(whole)) < gains).to(whole)), name
            continue
        assert whole.abs().max() <= (1.0 if "weight_hh" in name else H**-0.5), name
    assert model(shard(batch())).isfinite()


@check
def checkpoints_travel_between_sharded_ours_and_plain_torch() -> None:
    """Saved by two processes from shards of ours, loaded into torch.nn, and the way back."""
    folder = Path(sys.argv[1]).parent
    kinds = {"LSTM": (nn.LSTM, fused_rnn.LSTM), "GRU": (nn.GRU, fused_rnn.GRU)}
    for kind, (theirs, ours) in kinds.items():
        torch.manual_seed(3)
        first = fully_shard(ours(I, H, 2))
        dcp.save(get_model_state_dict(first), checkpoint_id=folder / kind)
        plain = theirs(I, H, 2)
        state = plain.state_dict()
        dcp.load(state, checkpoint_id=folder / kind)
        plain.load_state_dict(state)
        torch.testing.assert_close(flatten(first(batch())), flatten(plain(batch())))

        torch.manual_seed(4)
        other = theirs(I, H, 2)
        dist.broadcast(other.weight_ih_l0.data, 0)
        dcp.save(other.state_dict(), checkpoint_id=folder / f"{kind} of torch.nn")
        second = fully_shard(ours(I, H, 2))
        state = get_model_state_dict(second)
        dcp.load(state, checkpoint_id=folder / f"{kind} of torch.nn")
        set_model_state_dict(second, state)
        torch.testing.assert_close(flatten(second(batch())), flatten(other(batch())))


@check
def outputs_are_sent_as_they_are() -> None:
    """A pipeline: the first process has the first layer, gradients come back."""
    torch.manual_seed(0)
    first = fused_rnn.GRU(I, H, bidirectional=True, batch_first=True)
    second = fused_rnn.LSTM(2 * H, H, batch_first=True)
    input = batch().transpose(0, 1)
    expected = second(first(input)[0])[0].sum()
    gradients = torch.autograd.grad(expected, list(first.parameters()))
    if dist.get_rank() == 0:
        output, _ = first(input)
        assert output.is_contiguous()
        dist.send(output.detach(), 1)
        d_output = torch.empty_like(output)
        dist.recv(d_output, 1)
        output.backward(d_output)
        torch.testing.assert_close([p.grad for p in first.parameters()], list(gradients))
    else:
        received = torch.empty(B, T, 2 * H)
        dist.recv(received, 0)
        received.requires_grad_()
        total = second(received)[0].sum()
        torch.testing.assert_close(total, expected)
        total.backward()
        dist.send(received.grad, 0)


@check
def dropout_differs_between_processes_and_repeats_in_each() -> None:
    layer = fused_rnn.LSTM(I, H, 2, dropout=0.5, zoneout=0.2, weight_dropout=0.2)
    torch.manual_seed(0)
    weights = [torch.randn(p.shape) * 0.3 for p in layer.parameters()]
    with torch.no_grad():
        for parameter, weight in zip(layer.parameters(), weights, strict=True):
            parameter.copy_(weight)
    outputs = []
    for _ in range(2):
        torch.manual_seed(100 + dist.get_rank())
        outputs.append(layer(torch.ones(T, B, I))[0].detach())
    assert torch.equal(*outputs)
    both = [torch.empty_like(outputs[0]) for _ in range(2)]
    dist.all_gather(both, outputs[0])
    assert not torch.equal(*both)


def main(path: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    for name, function in CHECKS.items():
        outcome = ""
        try:
            function()
        except Exception:
            outcome = traceback.format_exc()
        (path / f"{name}.{rank}").write_text(outcome)
    dist.barrier()
    os._exit(
        0
    )  # torch may hang when a gloo group ends: its thread and the interpreter wait for each other


if __name__ == "__main__":
    main(Path(sys.argv[1]))
