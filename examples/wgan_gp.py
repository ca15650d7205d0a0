"""The critic of a Wasserstein GAN that reads sequences, trained with a gradient penalty.

    python examples/wgan_gp.py

It tells waves from the same waves lifted by a constant, and so measures how far apart the two are.
For that its slope must be 1 between them, which its loss asks for (Gulrajani et al. 2017): a loss
with a gradient in it, whose own gradient is a second derivative of the recurrent layer. The example
asserts that it is the one of torch.nn's layer, and prints the distance that the critic finds beside
the true one: everything has moved by the same vector, and the distance is the length of it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

import fused_rnn

LENGTH = 12


class Critic(nn.Module):
    """How high each wave is: [LENGTH, B, 1] -> [B]."""

    def __init__(self, library: ModuleType, hidden: int) -> None:
        super().__init__()
        self.rnn = library.LSTM(1, hidden)
        self.head = nn.Linear(hidden, 1)

    def forward(self, waves: Tensor) -> Tensor:
        output, _ = self.rnn(waves)
        return self.head(output).sum((0, 2))


def make_waves(batch: int) -> Tensor:
    """[LENGTH, batch, 1]: one period of a sine, beginning anywhere."""
    phase = 2 * math.pi * (torch.arange(LENGTH)[:, None] / LENGTH + torch.rand(batch))
    return torch.sin(phase).unsqueeze(-1)


def slopes(critic: nn.Module, high: Tensor, low: Tensor) -> Tensor:
    """[B]: the length of the critic's gradient somewhere between each two waves."""
    share = torch.rand(high.shape[1], 1)
    between = (share * high + (1 - share) * low).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return slope.square().sum((0, 2)).sqrt()


def penalty_of(slope: Tensor) -> Tensor:
    return (slope - 1).square().mean()


def agrees_with_torch(critic: Critic, hidden: int) -> None:
    """The gradients of the penalty, by our layer and by torch.nn's."""
    twin = Critic(nn, hidden)
    twin.load_state_dict(critic.state_dict())
    high, low = make_waves(8) + 1, make_waves(8)
    gradients = []
    for each in (critic, twin):
        torch.manual_seed(1)
        penalty = penalty_of(slopes(each, high, low))
        gradients.append(torch.autograd.grad(penalty, list(each.rnn.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--lift", type=float, default=1.0, help="by how much at every point")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--penalty", type=float, default=10.0, help="weight of the penalty")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    critic = Critic(fused_rnn, options.hidden)
    agrees_with_torch(critic, options.hidden)

    def found() -> float:
        """What a critic of slope 1 would say: a steeper one says more."""
        low, high = make_waves(512), make_waves(512) + options.lift
        with torch.no_grad():
            distance = critic(high).mean() - critic(low).mean()
        return (distance / slopes(critic, high, low).mean()).item()

    results = {"before training": found()}
    optimizer = torch.optim.Adam(critic.parameters(), lr=0.01, betas=(0.5, 0.9))
    for step in range(options.steps):
        low, high = make_waves(options.batch), make_waves(options.batch) + options.lift
        slope = slopes(critic, high, low)
        distance = critic(high).mean() - critic(low).mean()
        optimizer.zero_grad()
        (options.penalty * penalty_of(slope) - distance).backward()
        optimizer.step()
        if (step + 1) % max(1, options.steps // 10) == 0:
            print(f"step {step + 1:4d}  distance {distance:.3f}  slope {slope.mean():.3f}")
    results["found"] = found()
    results["true"] = options.lift * math.sqrt(LENGTH)
    print("\ndistance between the waves and the lifted ones")
    for name, value in results.items():
        print(f"{name:16} {value:.3f}")
    return results


if __name__ == "__main__":
    main()
