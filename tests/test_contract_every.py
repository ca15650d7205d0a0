"""Every layer with every control, and every cell, under what autograd and torch.func offer.

Tiny and in float64. test_contract_autograd.py goes deeper, for the layers that torch.nn has.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from layers import BEYOND, CELLS, KINDS, flatten, make, state_for
from test_beyond_torch import CELLS as CELLS_BEYOND
from test_beyond_torch import make_cell
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fused_rnn

T, B, I, H = 3, 2, 2, 4

CONTROLS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "lengths": lambda: {"lengths": torch.tensor((1, 3))},
    "reset": lambda: {"reset": torch.tensor([[0, 1], [1, 0], [0, 0]])},
    "to initial": lambda: CONTROLS["reset"]() | {"reset_to_initial": True},
    "states": lambda: {"return_all_states": True},
    "recompute": dict,
}
# What can go with what: (kind, control). Cells have no controls.
SUBJECTS = [
    *((kind, control) for kind in (*KINDS, *BEYOND) for control in CONTROLS),
    *((name, "cell") for name in (*CELLS, *CELLS_BEYOND)),
]
PLAIN_SUBJECTS = [subject for subject in SUBJECTS if subject[1] in ("plain", "cell")]


class Subject(NamedTuple):
    """A layer or cell, and the tensors of a call."""

    module: Any
    input: Tensor
    states: list[Tensor]
    controls: dict[str, Any]

    def call(self, input: Tensor, states: list[Tensor], weights: Any = None) -> tuple[Tensor, ...]:
        hx = tuple(states) if len(states) > 1 else states[0] if states else None
        given = self.weights() if weights is None else weights
        return tuple(flatten(functional_call(self.module, given, (input, hx), self.controls)))

    def weights(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())

    def leaves(self) -> list[Tensor]:
        every = [self.input, *self.states, *self.weights().values()]
        return [leaf.detach().clone().requires_grad_() for leaf in every]

    def of_leaves(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        count = 1 + len(self.states)
        weights = dict(zip(self.weights(), leaves[count:], strict=True))
        return self.call(leaves[0], list(leaves[1:count]), weights)


def build(kind: str, control: str, **options: Any) -> Any:
    options = {"dtype": torch.float64, **options}
    if control == "cell":
        if kind in CELLS:
            return getattr(fused_rnn, kind)(I, H, **options)
        return make_cell(kind, I, H, **options)
    return make(fused_rnn, kind, I, H, recompute=control == "recompute", **options)


def subject(kind: str, control: str, **options: Any) -> Subject:
    module = build(kind, control, **options)
    dtype = next(module.parameters()).dtype
    if control == "cell":
        count = 2 if isinstance(module, fused_rnn.LSTMCell) else 1
        states = [torch.randn(B, H, dtype=dtype) for _ in range(count)]
        return Subject(module, torch.randn(B, I, dtype=dtype), states, {})
    input = torch.randn(T, B, I, dtype=dtype)
    return Subject(module, input, flatten(state_for(module, B)), CONTROLS[control]())


each = pytest.mark.parametrize(("kind", "control"), SUBJECTS)
each_plain = pytest.mark.parametrize(("kind", "control"), PLAIN_SUBJECTS)
close = torch.testing.assert_close


def loss_of(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([output.square().sum() for output in outputs]).sum()


@each
def test_derivatives_of_first_and_second_order(kind: str, control: str) -> None:
    s = subject(kind, control)
    assert torch.autograd.gradcheck(s.of_leaves, s.leaves(), fast_mode=True)
    assert torch.autograd.gradgradcheck(s.of_leaves, s.leaves(), fast_mode=True)


@each
def test_forward_mode_is_the_transpose_of_backward(kind: str, control: str) -> None:
    s = subject(kind, control)
    leaves = s.leaves()
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    outputs = s.of_leaves(*leaves)
    _, by_jvp = jvp(s.of_leaves, tuple(leaves), tuple(tangents))
    with fwAD.dual_level():
        duals = [fwAD.make_dual(leaf, t) for leaf, t in zip(leaves, tangents, strict=True)]
        by_duals = [fwAD.unpack_dual(output).tangent for output in s.of_leaves(*duals)]
    cotangents = [torch.randn_like(output) for output in outputs]
    gradients = torch.autograd.grad(outputs, leaves, cotangents)
    backward = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
    for forward in (by_jvp, by_duals):
        close(sum((f * c).sum() for f, c in zip(forward, cotangents, strict=True)), backward)


@each
def test_gradients_per_sample_and_of_functions(kind: str, control: str) -> None:
    """vmap(grad) over further batches, against one backward after the other."""
    s = subject(kind, control)
    weights = {name: p.detach() for name, p in s.weights().items()}
    inputs = torch.randn(3, *s.input.shape, dtype=s.input.dtype)

    def loss(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return loss_of(s.call(input, s.states, weights))

    found = vmap(grad(loss), in_dims=(None, 0))(weights, inputs)
    for k, input in enumerate(inputs):
        expected = torch.autograd.grad(loss_of(s.call(input, s.states)), [*s.weights().values()])
        close([gradient[k] for gradient in found.values()], list(expected))


@each
def test_ensembles(kind: str, control: str) -> None:
    members = [build(kind, control) for _ in range(3)]
    s = subject(kind, control)._replace(module=members[0])
    parameters, _ = stack_module_state(members)
    found = vmap(lambda weights: s.call(s.input, s.states, weights))(parameters)
    alone = [s._replace(module=member).call(s.input, s.states) for member in members]
    close(found, tuple(map(torch.stack, zip(*alone, strict=True))))


@each
def test_jacobians_and_hessians(kind: str, control: str) -> None:
    s = subject(kind, control)

    def last(input: Tensor) -> Tensor:
        return s.call(input, s.states)[0][-1]

    expected = torch.autograd.functional.jacobian(last, s.input)
    close(jacrev(last)(s.input), expected)
    close(jacfwd(last)(s.input), expected)
    if control in ("plain", "cell"):
        curvature = torch.autograd.functional.hessian(lambda x: last(x).sum(), s.input)
        close(hessian(lambda x: last(x).sum())(s.input), curvature)


@each
def test_saved_tensors_pass_through_hooks(kind: str, control: str) -> None:
    """Nothing that backward needs is kept beside autograd; the bits are the same."""
    s = subject(kind, control)
    originals: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        originals.append(tensor)
        return tensor.detach().clone()

    def gradients(context: Any) -> list[Tensor]:
        leaves = s.leaves()
        with context:
            loss = loss_of(s.of_leaves(*leaves))
        for tensor in originals:  # lost: backward has the copies
            tensor.data.fill_(float("nan") if tensor.is_floating_point() else 0)
        return list(torch.autograd.grad(loss, leaves))

    expected = gradients(contextlib.nullcontext())
    assert all(map(torch.equal, gradients(torch.autograd.graph.save_on_cpu()), expected))
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    assert all(map(torch.equal, gradients(hooks), expected))
    assert originals


MASKED = [
    *(("LSTM", {f"{where}_dropout": 0.3}) for where in ("weight", "recurrent", "candidate")),
    *((kind, {"zoneout": 0.3}) for kind in (*KINDS, *BEYOND)),
    *((kind, {"dropout": 0.5, "num_layers": 2}) for kind in (*KINDS, *BEYOND)),
    ("GRU", {"dropout": 0.5, "num_layers": 2, "variational": True}),
]


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(("kind", "options"), MASKED, ids=str)
def test_checkpoints_run_again_to_the_bit(
    kind: str, options: dict[str, Any], control: str, use_reentrant: bool
) -> None:
    """With the same masks of dropout and zoneout."""
    s = subject(kind, control, **options)
    layers = options.get("num_layers", 1)
    states = [state.repeat_interleave(layers, 0)[:layers] for state in s.states]

    def run(context: Callable[..., Any]) -> list[Tensor]:
        torch.manual_seed(5)
        s.module.zero_grad()
        input = s.input.clone().requires_grad_()
        loss_of(context(lambda x: s.call(x, states), input)).backward()
        return [input.grad, *(p.grad for p in s.module.parameters())]

    again = run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant))
    assert all(map(torch.equal, again, run(lambda f, x: f(x))))


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
@each_plain
def test_anomaly_mode_names_the_nan(kind: str, control: str) -> None:
    s = subject(kind, control)
    input = s.input.clone().requires_grad_()
    with torch.autograd.detect_anomaly():
        outputs = s.call(input, s.states)
        loss_of(outputs).backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"RNNFunctionBackward.* returned nan"):
            outputs[0].backward(torch.full_like(outputs[0], float("nan")))


@each_plain
def test_the_log_says_where_the_reference_serves(
    kind: str, control: str, caplog: pytest.LogCaptureFixture
) -> None:
    s = subject(kind, control)
    leaves = s.leaves()
    name = s.module._cell
    output = s.of_leaves(*leaves)[0]
    cases = {
        f"{name}: reference, because a torch.func transform is active": lambda: grad(
            lambda x: loss_of(s.call(x, s.states))
        )(s.input),
        f"{name}: reference, because forward-mode AD is active": lambda: by_duals(s),
        f"{name} backward: reference, because its gradients are to be differentiated": (
            lambda: torch.autograd.grad(output.sum(), leaves, create_graph=True)
        ),
        f"{name} backward: reference, because they come in batches": lambda: torch.autograd.grad(
            output,
            leaves,
            torch.ones(2, *output.shape, dtype=output.dtype),
            is_grads_batched=True,
            retain_graph=True,
        ),
    }
    for words, call in cases.items():
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "fused_rnn"):
            call()
        assert words in [record.getMessage() for record in caplog.records]


def by_duals(s: Subject) -> None:
    with fwAD.dual_level():
        s.call(fwAD.make_dual(s.input, torch.ones_like(s.input)), s.states)


@each_plain
def test_mixed_dtypes_raise(kind: str, control: str) -> None:
    s = subject(kind, control, dtype=torch.float32)
    for odd in (torch.float64, torch.bfloat16):
        with pytest.raises((RuntimeError, ValueError), match="dtype"):
            s.call(s.input.to(odd), s.states)
        for k in range(len(s.states)):
            states = [state.to(odd) if j == k else state for j, state in enumerate(s.states)]
            with pytest.raises((RuntimeError, ValueError), match="dtype"):
                s.call(s.input, states)
        for name, weight in s.weights().items():
            with pytest.raises((RuntimeError, ValueError), match="dtype"):
                s.call(s.input, s.states, s.weights() | {name: weight.to(odd)})


CASTS: dict[torch.dtype, Callable[[nn.Module], nn.Module]] = {
    torch.float16: nn.Module.half,
    torch.bfloat16: nn.Module.bfloat16,
    torch.float32: nn.Module.float,
    torch.float64: nn.Module.double,
}


@each_plain
def test_dtypes_devices_and_memory(kind: str, control: str) -> None:
    s = subject(kind, control)
    expected = s.call(s.input, s.states)
    torch.set_default_dtype(torch.float64)  # put back by the fixture of conftest.py
    born = build(kind, control, dtype=None)
    assert {p.dtype for p in born.parameters()} == {torch.float64}
    torch.set_default_dtype(torch.float32)
    shared = s.module.share_memory()
    assert all(p.is_shared() for p in shared.parameters())
    assert all(map(torch.equal, s.call(s.input, s.states), expected))
    for dtype, cast in CASTS.items():
        cast(s.module)
        outputs = s.call(s.input.to(dtype), [state.to(dtype) for state in s.states])
        assert {output.dtype for output in outputs} == {dtype}
        # Weights were rounded to half precision on the way.
        close([output.double() for output in outputs], list(expected), rtol=0.03, atol=0.03)
    meta = s.module.to("meta")
    outputs = s._replace(module=meta).call(
        s.input.to("meta", torch.float64), [state.to("meta", torch.float64) for state in s.states]
    )
    assert [(o.shape, o.device.type) for o in outputs] == [(e.shape, "meta") for e in expected]
    empty = meta.to_empty(device="cpu")
    empty.load_state_dict(subject(kind, control).module.state_dict())
    assert all(output.isfinite().all() for output in s.call(s.input, s.states))
