"""The judge is judged: it must see what is wrong and stay silent about what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from judge import Tensors, judge, judge_draws

import fused_rnn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def answers(dtype: torch.dtype, error: float, wrong_by: float) -> tuple[Tensors, Tensors, Tensors]:
    """Ours, theirs and the truth; `error` of theirs in eps, ours `wrong_by` times as far off."""
    truth = torch.randn(50, 3, dtype=torch.float64)
    unit = error * torch.finfo(dtype).eps
    theirs = truth + unit * torch.randn_like(truth)
    ours = truth + wrong_by * unit * torch.randn_like(truth)
    return {"x": ours.to(dtype)}, {"x": theirs.to(dtype)}, {"x": truth}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_equal_errors_pass(dtype: torch.dtype) -> None:
    judge(*answers(dtype, error=20, wrong_by=1.0))
    judge(*answers(dtype, error=20, wrong_by=1.5))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_three_times_the_error_is_caught(dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match="x: rms error"):
        judge(*answers(dtype, error=20, wrong_by=3.0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_wrong_element_among_many_is_caught(dtype: torch.dtype) -> None:
    ours, theirs, truth = answers(dtype, error=1, wrong_by=1.0)
    ours["x"][7, 2] += 20 * 16 * torch.finfo(dtype).eps
    with pytest.raises(AssertionError, match="x: max error"):
        judge(ours, theirs, truth)


def test_a_value_rounded_once_passes_where_torch_is_exact() -> None:
    truth = torch.tensor([1.0, -3.0, 0.1], dtype=torch.float64)
    theirs = truth.float()
    exact = {"x": theirs.double()}
    ours = torch.nextafter(theirs, torch.tensor(9.0))
    judge({"x": ours}, {"x": theirs}, exact)
    with pytest.raises(AssertionError, match="x: rms error"):
        judge({"x": theirs * (1 + 5e-7)}, {"x": theirs}, exact)


def test_zero_must_be_zero() -> None:
    zero = torch.zeros(4)
    judge({"x": zero}, {"x": zero}, {"x": zero.double()})
    with pytest.raises(AssertionError, match="x: rms error"):
        judge({"x": zero + 1e-30}, {"x": zero}, {"x": zero.double()})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_caught(bad: float) -> None:
    ours, theirs, truth = answers(torch.float32, error=1, wrong_by=1.0)
    ours["x"][0, 0] = bad
    with pytest.raises(AssertionError, match="x: rms error"):
        judge(ours, theirs, truth)


def test_a_question_without_finite_answer_is_refused() -> None:
    ours, theirs, truth = answers(torch.float32, error=1, wrong_by=1.0)
    truth["x"][0, 0] = float("nan")
    with pytest.raises(AssertionError, match="no finite answer"):
        judge(ours, theirs, truth)


def test_wrong_dtype_shape_or_name_is_caught() -> None:
    x = torch.ones(3)
    exact = {"x": x.double()}
    for ours in ({"x": x.double()}, {"x": x[:2]}, {"y": x}, {}):
        with pytest.raises(AssertionError):
            judge(ours, {"x": x}, exact)


def test_empty_tensors_pass() -> None:
    empty = torch.empty(2, 0)
    judge({"x": empty}, {"x": empty}, {"x": empty.double()})


def draws_of(*wrong_by: float) -> Callable[[], tuple[Tensors, Tensors, Tensors]]:
    each = iter(wrong_by)
    return lambda: answers(torch.float32, 20, next(each))


def test_one_good_draw_is_enough() -> None:
    judge_draws(draws_of(1.0))


def test_an_unlucky_draw_is_judged_among_others() -> None:
    judge_draws(draws_of(3.0, *[1.0] * 15))


def test_three_times_the_error_is_caught_in_many_draws() -> None:
    with pytest.raises(AssertionError, match="x: rms error"):
        judge_draws(draws_of(*[3.0] * 128))


def test_one_wrong_draw_is_not_hidden_by_the_others() -> None:
    with pytest.raises(AssertionError, match="x: max error"):
        judge_draws(draws_of(30.0, *[1.0] * 127))


def test_uninitialised_memory_is_poisoned() -> None:
    """The fixture in conftest.py on which the other files rely."""
    for dtype in FLOATS:
        assert torch.empty(5, dtype=dtype).isnan().all()
        assert torch.ones(5, dtype=dtype).new_empty(5).isnan().all()


def test_memory_of_the_kernels_is_poisoned() -> None:
    """With a projection, nobody writes the rest of the slot of h: what is there is the poison."""
    layer = fused_rnn.LSTM(4, 40, proj_size=3)
    weights = [parameter.detach() for parameter in layer.parameters()]
    for T in (2, 2000):  # torch's memory, and the cache's
        saved = torch.ops.fused_rnn.forward(
            "lstm", torch.randn(T, 1, 4), None, None, None, weights, 1, False, False
        )[3]
        slots = saved.view(T, -1, 48)
        assert slots[:, 0, 16:].isnan().all()
        assert slots[:, 0, :3].isfinite().all()
