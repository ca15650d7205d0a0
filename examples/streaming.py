"""A causal denoiser that hears audio frame by frame, as it would from a microphone.

    python examples/streaming.py

A GRU is trained to take the noise off a melody. In training it reads windows of many frames and
carries its state from one to the next, without the gradient: truncated backpropagation through
time. Then it runs on a stream: one call per frame of 10 ms, the state goes in and comes out. That
gives what one call over the whole recording gives, and the example asserts it.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_rnn

RATE = 8000  # samples per second
FRAME = 80  # samples, 10 ms
NOTE = 25  # frames


class Denoiser(nn.Module):
    """The clean frame, from this noisy one and all before."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.rnn = fused_rnn.GRU(FRAME, hidden)
        self.head = nn.Linear(hidden, FRAME)

    def forward(self, frames: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """frames [T, B, FRAME] -> the same without noise, and the state after the last."""
        output, state = self.rnn(frames, state)
        return self.head(output), state


def melodies(batch: int, frames: int) -> Tensor:
    """[frames, batch, FRAME]: notes of a scale, a quarter of a second each."""
    notes = torch.randint(0, 12, (batch, math.ceil(frames / NOTE)))
    pitch = 220 * 2 ** (notes / 12)  # Hz
    phase = pitch.repeat_interleave(NOTE * FRAME, 1).cumsum(1) * (2 * math.pi / RATE)
    return torch.sin(phase[:, : frames * FRAME]).view(batch, frames, FRAME).transpose(0, 1)


def train(model: Denoiser, noise: float, steps: int, batch: int, window: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses: list[float] = []
    windows, state = 8, None
    for step in range(steps):
        if step % windows == 0:  # another recording
            clean, state = melodies(batch, windows * window), None
        at = step % windows * window
        target = clean[at : at + window]
        optimizer.zero_grad()
        output, state = model(target + noise * torch.randn_like(target), fused_rnn.detach(state))
        loss = mse_loss(output, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % max(1, steps // 8) == 0:
            print(f"step {step + 1:4d}  error {losses[-1]:.4f}")
    return losses


@torch.inference_mode()
def stream(model: Denoiser, frames: Tensor) -> tuple[Tensor, list[float]]:
    """frames [T, 1, FRAME], one call for each; the result and the milliseconds of every call."""
    outputs, times, state = [], [], None
    for frame in frames:
        begin = time.perf_counter()
        output, state = model(frame[None], state)
        times.append(1e3 * (time.perf_counter() - begin))
        outputs.append(output)
    return torch.cat(outputs), times


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--noise", type=float, default=0.5, help="its standard deviation")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=16, help="recordings side by side")
    parser.add_argument("--window", type=int, default=25, help="frames per step of training")
    parser.add_argument("--seconds", type=float, default=5, help="length of the stream")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    model = Denoiser(options.hidden)
    losses = train(model, options.noise, options.steps, options.batch, options.window)

    clean = melodies(1, round(options.seconds * RATE / FRAME))
    noisy = clean + options.noise * torch.randn_like(clean)
    output, times = stream(model, noisy)
    with torch.no_grad():
        torch.testing.assert_close(output, model(noisy)[0])
    results = {
        "before training": losses[0],
        "noisy": mse_loss(noisy, clean).item(),
        "denoised": mse_loss(output, clean).item(),
        "milliseconds": median(times),
    }
    print("\nmean squared error of the stream")
    for name in ("noisy", "denoised"):
        print(f"{name:10} {results[name]:.4f}")
    print(f"{len(times)} frames of 10 ms, each done in {results['milliseconds']:.3f} ms (median)")
    return results


if __name__ == "__main__":
    main()
