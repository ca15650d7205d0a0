"""A character-level language model of the Python reference, with an LSTM.

    python examples/char_lm.py                  # with fused_rnn
    python examples/char_lm.py --layer torch    # the same with torch.nn

The text is the help of the `pydoc` module, part of every Python. It is cut into parallel streams
and read window by window; the state is carried from one window to the next, the gradient is not
(truncated backpropagation through time).
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fused_rnn

LAYERS: dict[str, type[nn.Module]] = {"fused": fused_rnn.LSTM, "torch": nn.LSTM}
State = tuple[Tensor, Tensor]


class CharacterModel(nn.Module):
    """The distribution of the next character, from all the characters before it."""

    def __init__(self, layer: str, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 64)
        self.rnn = LAYERS[layer](64, hidden)
        self.head = nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """text [T, B] -> logits [T, B, characters] and the state after the last character."""
        output, state = self.rnn(self.embedding(text), state)
        return self.head(output), state


def python_reference() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def train(model: CharacterModel, text: Tensor, steps: int, batch: int, window: int) -> list[float]:
    """Trains on `text` [characters]; returns the loss of every step in bits per character."""
    length = len(text) // batch
    streams = text[: batch * length].view(batch, length).T  # [length, batch]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses: list[float] = []
    report = max(1, steps // 10)
    state, at = None, 0
    start = time.perf_counter()
    for step in range(1, steps + 1):
        if at + window >= length:  # the end of the text: start again
            state, at = None, 0
        inputs, targets = streams[at : at + window], streams[at + 1 : at + window + 1]
        at += window

        optimizer.zero_grad()
        logits, state = model(inputs, state)
        state = (state[0].detach(), state[1].detach())
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        losses.append(loss.item() / math.log(2))
        if step % report == 0:
            bits = sum(losses[-report:]) / report
            speed = step * batch * window / (time.perf_counter() - start)
            print(f"step {step:4d}  {bits:.2f} bits per character  {speed:,.0f} tokens/s")
    return losses


@torch.no_grad()
def sample(model: CharacterModel, prompt: Tensor, length: int) -> Tensor:
    """Continues `prompt` [T] by `length` characters: one call of the layer for each."""
    text = list(prompt)
    logits, state = model(prompt[:, None])
    for _ in range(length):
        probabilities = (logits[-1, 0] / 0.7).softmax(0)
        text.append(torch.multinomial(probabilities, 1)[0])
        logits, state = model(text[-1].view(1, 1), state)
    return torch.stack(text)


def main(argv: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layer", choices=LAYERS, default="fused")
    parser.add_argument("--text", type=Path, help="another text to learn")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="streams read side by side")
    parser.add_argument("--window", type=int, default=64, help="characters per step and stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("char_lm.txt"), help="for the sample")
    options = parser.parse_args(argv)

    torch.manual_seed(options.seed)
    source = options.text.read_text(encoding="utf-8") if options.text else python_reference()
    alphabet = sorted(set(source))
    index = {character: i for i, character in enumerate(alphabet)}
    text = torch.tensor([index[character] for character in source])
    print(f"{len(source):,} characters, {len(alphabet)} different ones")

    model = CharacterModel(options.layer, len(alphabet), options.hidden)
    losses = train(model, text, options.steps, options.batch, options.window)

    written = sample(model, text[:20], 500)
    options.out.write_text("".join(alphabet[i] for i in written), encoding="utf-8")
    print(f"\n{options.out.read_text(encoding='utf-8')}\n\nsample: {options.out}")
    return losses


if __name__ == "__main__":
    main()
