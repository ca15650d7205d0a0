"""LSTMCell, GRUCell, RNNCell: one step, its gradients and its manners."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from judge import Tensors, judge_draws
from layers import CELLS, assert_same_complaint, flatten
from scans import FLOATS, name_outputs, seeds_like
from torch import Tensor, nn

import fused_rnn

VARIANTS = [
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("RNNCell", {}),
    ("RNNCell", {"nonlinearity": "relu"}),
]
each_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
each_name = pytest.mark.parametrize("name", CELLS)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def h(cell: nn.Module, *shape: int, **options: Any) -> Any:
    state = zeros(*shape, **options)
    return (state, state.clone()) if isinstance(cell, nn.LSTMCell | fused_rnn.LSTMCell) else state


def twins(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    ours, theirs = getattr(fused_rnn, name)(6, 19, **options), getattr(nn, name)(6, 19, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def run(cell: nn.Module, input: Tensor, hx: list[Tensor], dtype: torch.dtype) -> Tensors:
    leaves = [t.detach().clone().requires_grad_() for t in (input, *hx)]
    states = tuple(leaves[1:]) if len(hx) == 2 else leaves[1] if hx else None
    outputs = flatten(cell(leaves[0], states))
    parameters = dict(cell.named_parameters())
    names = [*("input", "h", "c")[: len(leaves)], *parameters]
    gradients = torch.autograd.grad(
        outputs, [*leaves, *parameters.values()], seeds_like(outputs, dtype)
    )
    named = {f"d_{name}": g for name, g in zip(names, gradients, strict=True)}
    return {name: t.detach() for name, t in (name_outputs(outputs) | named).items()}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("batch", [(5,), (1,), ()], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "nostate"])
@each_variant
def test_accuracy(
    name: str,
    options: dict[str, Any],
    with_state: bool,
    bias: bool,
    batch: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    ours, theirs = twins(name, bias=bias, dtype=dtype, **options)
    exact = copy.deepcopy(theirs).double()
    states = 0 if not with_state else 2 if name == "LSTMCell" else 1

    def draw() -> tuple[Tensors, Tensors, Tensors]:
        input, *hx = (torch.randn(*batch, n).to(dtype) for n in (6, 19, 19)[: 1 + states])
        wide = [state.double() for state in hx]
        return (
            run(ours, input, hx, dtype),
            run(theirs, input, hx, dtype),
            run(exact, input.double(), wide, dtype),
        )

    judge_draws(draw)


@each_variant
def test_a_loop_of_cells_is_a_layer(name: str, options: dict[str, Any]) -> None:
    cell = getattr(fused_rnn, name)(6, 19, **options)
    layer = getattr(fused_rnn, name.removesuffix("Cell"))(6, 19, **options)
    layer.load_state_dict({f"{key}_l0": value for key, value in cell.state_dict().items()})
    input, hx, outputs = torch.randn(7, 3, 6), None, []
    for step in input:
        hx = cell(step, hx)
        outputs.append(hx[0] if name == "LSTMCell" else hx)
    torch.testing.assert_close(torch.stack(outputs), layer(input)[0])


@each_variant
def test_what_is_returned(name: str, options: dict[str, Any]) -> None:
    ours, theirs = twins(name, **options)
    for shape in ((4, 6), (6,), (0, 6)):
        mine, yours = ours(torch.randn(shape)), theirs(torch.randn(shape))
        assert type(mine) is type(yours)
        for a, b in zip(flatten(mine), flatten(yours), strict=True):
            assert a.shape == b.shape
            assert a.is_contiguous()
            assert a.requires_grad
            assert type(a) is Tensor


REFUSED: list[Callable[[nn.Module], object]] = [
    lambda cell: cell(),
    lambda cell: cell(None),
    lambda cell: cell(zeros(4, 3, 5)),
    lambda cell: cell(zeros(())),
    lambda cell: cell(zeros(3, 6)),
    lambda cell: cell(zeros(6)),
    lambda cell: cell(zeros(3, 5), h(cell, 4, 7)),
    lambda cell: cell(zeros(3, 5), h(cell, 1, 7)),
    lambda cell: cell(zeros(3, 5), h(cell, 3, 8)),
    lambda cell: cell(zeros(3, 5), h(cell, 1, 3, 7)),
    lambda cell: cell(zeros(3, 5), h(cell)),
    lambda cell: cell(zeros(5), h(cell, 8)),
    lambda cell: cell(zeros(3, 6), h(cell, 4, 8)),
    lambda cell: cell(zeros(3, 5), "state"),
    lambda cell: cell(zeros(3, 5), 3.0),
    lambda cell: cell(zeros(3, 5, device="meta")),
]


def source(value: Callable[..., Any]) -> str:
    return inspect.getsource(value).strip().removeprefix("lambda cell: ")


@each_name
@pytest.mark.parametrize("call", REFUSED, ids=source)
def test_refused_as_torch_refuses(name: str, call: Callable[[nn.Module], object]) -> None:
    assert_same_complaint(lambda library: call(getattr(library, name)(5, 7)))


@pytest.mark.parametrize(
    "call",
    [
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), zeros(3, 7)),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), zeros(2, 3, 7)),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), (zeros(3, 7), zeros(4, 7))),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), (zeros(3, 7), zeros(3, 8))),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), (zeros(3, 7), zeros(1, 3, 7))),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), (zeros(3, 7),)),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), (zeros(3, 7),) * 3),
        lambda lib: lib.LSTMCell(5, 7)(zeros(3, 5), (None, None)),
        lambda lib: lib.GRUCell(5, 7)(zeros(3, 5), (zeros(3, 7),)),
        lambda lib: lib.RNNCell(5, 7)(zeros(3, 5), (zeros(3, 7),)),
        lambda lib: lib.RNNCell(5, 7, nonlinearity="x")(zeros(3, 5)),
    ],
    ids=lambda call: inspect.getsource(call).strip().removeprefix("lambda lib: "),
)
def test_refused_by_one_cell(call: Any) -> None:
    assert_same_complaint(call)


def test_lstm_cell_takes_lists_and_tuples() -> None:
    cell = fused_rnn.LSTMCell(5, 7)
    input, h0, c0 = torch.randn(3, 5), torch.randn(3, 7), torch.randn(3, 7)
    assert all(map(torch.equal, cell(input, [h0, c0]), cell(input, (h0, c0))))


@each_name
def test_no_state_means_zeros(name: str) -> None:
    cell = getattr(fused_rnn, name)(5, 7)
    input = torch.randn(3, 5)
    expected = flatten(cell(input, h(cell, 3, 7)))
    assert all(map(torch.equal, flatten(cell(input)), expected))


@each_name
@pytest.mark.parametrize("gone", ["bias_ih", "bias_hh"])
def test_one_bias_may_be_none(name: str, gone: str) -> None:
    ours, theirs = twins(name)
    setattr(ours, gone, None)
    setattr(theirs, gone, None)
    input = torch.randn(3, 6)
    torch.testing.assert_close(flatten(ours(input)), flatten(theirs(input)))


@each_variant
def test_outputs_may_be_changed_in_place(name: str, options: dict[str, Any]) -> None:
    """torch's RNNCell raises here, since it saved its output for backward."""
    ours, theirs = twins(name, **options)
    input = torch.randn(3, 6)
    flatten(ours(input))[0].mul_(2).sum().backward()
    (2 * flatten(theirs(input))[0]).sum().backward()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, yours.grad)


@each_variant
def test_gradients_of_first_and_second_order(name: str, options: dict[str, Any]) -> None:
    cell = getattr(fused_rnn, name)(3, 4, dtype=torch.float64, **options)
    hx = [torch.randn(2, 4, dtype=torch.float64) for _ in range(2 if name == "LSTMCell" else 1)]
    names = [key for key, _ in cell.named_parameters()]

    def function(input: Tensor, *rest: Tensor) -> Any:
        states, weights = rest[: len(hx)], dict(zip(names, rest[len(hx) :], strict=True))
        state = states if len(states) == 2 else states[0]
        return torch.func.functional_call(cell, weights, (input, state))

    leaves = [torch.randn(2, 3, dtype=torch.float64), *hx, *cell.parameters()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@each_name
def test_complex_cells_run(name: str) -> None:
    ours, theirs = twins(name, dtype=torch.complex64)
    input = torch.randn(3, 6, dtype=torch.complex64)
    torch.testing.assert_close(ours(input), theirs(input))


@each_name
@pytest.mark.parametrize("odd", ["input", "state", "weight"])
@pytest.mark.parametrize("grad", [True, False])
def test_mixed_dtypes_are_refused(name: str, odd: str, grad: bool) -> None:
    """torch speaks of "mat1 and mat2" here; ours names the argument."""
    cell = getattr(fused_rnn, name)(5, 7)
    input, state = zeros(3, 5), h(cell, 3, 7)
    if odd == "input":
        input = input.double()
    elif odd == "state":
        state = h(cell, 3, 7, dtype=torch.float64)
    else:
        cell.weight_hh = nn.Parameter(cell.weight_hh.double())
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="dtype"):
        cell(input, state)


@each_name
def test_cells_can_be_scripted(name: str) -> None:
    ours, theirs = twins(name)
    input = torch.randn(3, 6)
    torch.testing.assert_close(torch.jit.script(ours)(input), theirs(input))
