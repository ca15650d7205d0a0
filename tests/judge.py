"""The judge of accuracy: at most twice the error of plain PyTorch, against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# Errors are measured in two norms. The root mean square decides: over some dozens of elements its
# ratio between two equally good programs stays within 2, where that of the maxima does not. The
# maximum, with room for luck, finds the single element that a wrong edge leaves behind.
RMS_FACTOR = 2.0
MAX_FACTOR = 4.0


def unavoidable(dtype: torch.dtype) -> float:
    """The relative error that counts as none, so that torch's luck is not our fault.

    Half a unit in the last place: the result rounded once. In float64 more, since the oracle's own
    roundings are of that size, and often the very same as torch's.
    """
    return torch.finfo(dtype).eps * (4.0 if dtype == torch.float64 else 0.5)


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def _max(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def judge(fused: Tensors, plain: Tensors, exact: Tensors) -> None:
    """Fail unless each tensor of `fused` is at most twice as far from `exact` as its `plain` twin.

    `exact` is float64; `plain` is what torch makes of the same question in the dtype of `fused`.
    """
    assert fused.keys() == plain.keys() == exact.keys()
    complaints = []
    for name, ours in fused.items():
        theirs, truth = plain[name], exact[name]
        assert ours.shape == theirs.shape == truth.shape, f"{name}: shape {tuple(ours.shape)}"
        assert ours.dtype == theirs.dtype, f"{name}: dtype {ours.dtype}"
        assert truth.dtype == torch.float64
        assert truth.isfinite().all(), f"{name}: the question has no finite answer"
        for norm, factor in ((_rms, RMS_FACTOR), (_max, MAX_FACTOR)):
            error = norm(ours.double() - truth)
            accepted = max(norm(theirs.double() - truth), unavoidable(ours.dtype) * norm(truth))
            if not error <= factor * accepted:  # so written, NaN is caught
                size = f"{norm.__name__[1:]} error {error:.3g} > {factor:g} x {accepted:.3g}"
                complaints.append(f"{name}: {size}")
    assert not complaints, "\n".join(complaints)


def judge_draws(
    draw: Callable[[], tuple[Tensors, Tensors, Tensors]], counts: tuple[int, ...] = (1, 16, 128)
) -> None:
    """Judge one draw of (fused, plain, exact); while there are complaints, so many draws as one.

    Few numbers leave the ratio of two equally large errors to luck; with many it settles. What is
    wrong beyond luck in a single draw stands out of the pool.
    """
    draws: list[tuple[Tensors, Tensors, Tensors]] = []
    for count in counts:
        draws += [draw() for _ in range(count - len(draws))]
        try:
            return judge(*(pool(each) for each in zip(*draws, strict=True)))
        except AssertionError:
            if count == counts[-1]:
                raise


def pool(draws: Iterable[Tensors]) -> Tensors:
    """The tensors of several draws, end to end."""
    draws = list(draws)
    if len(draws) == 1:
        return draws[0]
    return {name: torch.cat([draw[name].flatten() for draw in draws]) for name in draws[0]}
