"""Recurrent PPO: episodes that start inside a batch, one call instead of one per step.

    python examples/recurrent_ppo.py

A rollout is n_steps x n_envs observations, and in every environment episodes begin at steps of
their own, from a state of zeros. RecurrentPPO of sb3-contrib therefore walks through a batch step
by step and multiplies the states by (1 - episode_start) before each call. With
`reset=episode_starts` the batch is one call. This runs both, asserts that outputs, states and
gradients agree, and shows how long each takes.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor, nn

import fused_rnn

State = tuple[Tensor, Tensor]
Rollout = tuple[Tensor, State, Tensor]
Forward = Callable[[Tensor, State, Tensor], tuple[Tensor, State]]


def step_by_step(lstm: nn.LSTM) -> Forward:
    """As RecurrentPPO does it."""

    def forward(features: Tensor, state: State, episode_starts: Tensor) -> tuple[Tensor, State]:
        outputs = []
        for x, start in zip(features, episode_starts, strict=True):
            going_on = (1.0 - start).view(1, -1, 1)
            output, state = lstm(x.unsqueeze(0), (going_on * state[0], going_on * state[1]))
            outputs.append(output)
        return torch.cat(outputs), state

    return forward


def in_one_call(lstm: fused_rnn.LSTM) -> Forward:
    return lambda features, state, episode_starts: lstm(features, state, reset=episode_starts)


def gradients(lstm: nn.Module, forward: Forward, rollout: Rollout) -> Tensor:
    """Of a loss on outputs and last states, all in one vector."""
    output, state = forward(*rollout)
    loss = output.square().sum() + state[0].sum() + state[1].sum()
    return nn.utils.parameters_to_vector(torch.autograd.grad(loss, list(lstm.parameters())))


def assert_same(plain: nn.LSTM, fused: fused_rnn.LSTM, rollout: Rollout) -> None:
    """In float64, where rounding hides nothing."""
    plain, fused = copy.deepcopy(plain).double(), copy.deepcopy(fused).double()
    features, (h, c), starts = rollout
    rollout = features.double(), (h.double(), c.double()), starts.double()
    loop, one = step_by_step(plain), in_one_call(fused)
    torch.testing.assert_close(one(*rollout), loop(*rollout))
    torch.testing.assert_close(gradients(fused, one, rollout), gradients(plain, loop, rollout))


def medians(calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Milliseconds of each call; they take turns, so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, own in zip(calls, times, strict=True):
            begin = time.perf_counter()
            call()
            if repeat:  # the first is for warming up
                own.append(1e3 * (time.perf_counter() - begin))
    return [median(own) for own in times]


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[float, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--envs", type=int, default=8)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--episode", type=float, default=50, help="mean length of an episode")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    plain = nn.LSTM(options.features, options.hidden)
    fused = fused_rnn.LSTM(options.features, options.hidden)
    fused.load_state_dict(plain.state_dict())
    features = torch.randn(options.steps, options.envs, options.features)
    state = torch.randn(2, 1, options.envs, options.hidden).unbind()
    starts = (torch.rand(options.steps, options.envs) < 1 / options.episode).float()
    rollout = features, state, starts
    assert_same(plain, fused, rollout)
    print(
        f"{options.steps} steps x {options.envs} environments, {int(starts.sum())} episodes start; "
        f"{options.features} features, {options.hidden} units, {torch.get_num_threads()} threads\n"
        "outputs, states and gradients agree"
    )

    both = [(plain, step_by_step(plain)), (fused, in_one_call(fused))]
    with torch.no_grad():
        inference = medians([lambda f=f: f(*rollout) for _, f in both], options.repeats)
    calls = [lambda m=m, f=f: gradients(m, f, rollout) for m, f in both]
    training = medians(calls, options.repeats)
    times = {"inference": tuple(inference), "training": tuple(training)}
    print(
        f"{'median of ' + str(options.repeats):14}{'torch.nn, a call a step':>25}{'one call':>14}"
    )
    for mode, (loop, one) in times.items():
        print(f"{mode:14}{loop:22.2f} ms{one:11.2f} ms   {loop / one:.1f} times as fast")
    return times


if __name__ == "__main__":
    main()
