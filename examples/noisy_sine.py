"""Predicts a noisy sine: one step ahead, and many steps ahead from its own predictions.

python examples/noisy_sine.py --cell GRU
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fused_rnn

POINTS = 400
END = 36.0
WINDOW = 10
TRAINING_POINTS = int(0.8 * POINTS)
HIDDEN = 12


class Forecaster(nn.Module):
    """The next value of a series, from a window of the last ones."""

    def __init__(self, cell: str) -> None:
        super().__init__()
        self.rnn = getattr(fused_rnn, cell)(1, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, windows: Tensor) -> Tensor:  # [B, WINDOW] -> [B]
        output, _ = self.rnn(windows.unsqueeze(-1))
        return self.head(output[:, -1]).squeeze(-1)


def train(model: Forecaster, series: Tensor, epochs: int) -> list[float]:
    windows, targets = series.unfold(0, WINDOW, 1)[:-1], series[WINDOW:]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses: list[float] = []
    for epoch in range(epochs):
        optimizer.zero_grad()
        loss = mse_loss(model(windows), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if epoch % max(1, epochs // 10) == 0 or epoch == epochs - 1:
            print(f"epoch {epoch:4d}  training loss {losses[-1]:.4f}")
    return losses


@torch.no_grad()
def predict_single_step(model: Forecaster, series: Tensor) -> Tensor:
    """Every point after the training part, each from the true points before it."""
    return model(series[TRAINING_POINTS - WINDOW : -1].unfold(0, WINDOW, 1))


@torch.no_grad()
def predict_multi_step(model: Forecaster, series: Tensor) -> Tensor:
    """The same points, from the training part alone: every prediction is fed back."""
    known = series[:TRAINING_POINTS]
    while len(known) < POINTS:
        known = torch.cat((known, model(known[None, -WINDOW:])))
    return known[TRAINING_POINTS:]


def plot(path: Path, title: str, x: Tensor, series: Tensor, single: Tensor, multi: Tensor) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: pip install matplotlib")
        return
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    ax = figure.subplots()
    ax.plot(x, series, ".", color="#999999", markersize=4, label="noisy sine")
    ax.plot(x, torch.sin(x), color="#cccccc", linewidth=1, label="without the noise")
    ax.plot(x[TRAINING_POINTS:], single, color="#1f77b4", label="prediction, one step ahead")
    ax.plot(x[TRAINING_POINTS:], multi, color="#e8710a", label="prediction, fed back to itself")
    ax.axvline(float(x[TRAINING_POINTS]), color="#222222", linewidth=1, linestyle=":")
    ax.text(float(x[TRAINING_POINTS]) - 0.3, 1.6, "training", ha="right", va="top")
    ax.text(float(x[TRAINING_POINTS]) + 0.3, 1.6, "test", ha="left", va="top")
    ax.set(title=title, xlabel="x", ylim=(-1.7, 1.7))
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM")
    parser.add_argument("--epochs", type=int, default=500)
    parser.add_argument("--noise", type=float, default=0.1, help="its standard deviation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("noisy_sine.png"))
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    x = torch.linspace(0, END, POINTS)
    series = torch.sin(x) + options.noise * torch.randn(POINTS)
    model = Forecaster(options.cell)
    training = train(model, series[:TRAINING_POINTS], options.epochs)

    truth = series[TRAINING_POINTS:]
    single, multi = predict_single_step(model, series), predict_multi_step(model, series)
    mean = series[:TRAINING_POINTS].mean()
    losses = {
        "before training": training[0],
        "training": training[-1],
        "single-step": mse_loss(single, truth).item(),
        "repeating the last value": mse_loss(series[TRAINING_POINTS - 1 : -1], truth).item(),
        "multi-step": mse_loss(multi, truth).item(),
        "the mean of the training part": mse_loss(mean.expand_as(truth), truth).item(),
    }
    print("\nmean squared errors")
    for name, loss in losses.items():
        print(f"{name:30} {loss:.4f}")
    print(f"{'(the noise alone)':30} {options.noise**2:.4f}")
    title = f"{options.cell} with {HIDDEN} hidden units, window of {WINDOW}"
    plot(options.plot, title, x, series, single, multi)
    return losses


if __name__ == "__main__":
    main()
