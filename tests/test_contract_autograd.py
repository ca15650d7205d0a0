"""Gradients: any subset of leaves, any subset of outputs, any order, and torch.func."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from layers import KINDS, flatten, make, state_for, twins
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import fused_rnn

each_kind = pytest.mark.parametrize("kind", KINDS)


def close(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs)


def leaves_of(layer: nn.RNNBase, B: int = 3) -> list[Tensor]:
    """Input and states, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        input = torch.randn(4, B, layer.input_size, dtype=layer.weight_ih_l0.dtype)
        return [t.requires_grad_() for t in (input, *flatten(state_for(layer, B)))]


def call(layer: nn.RNNBase, input: Tensor, *states: Tensor) -> list[Tensor]:
    return flatten(layer(input, states if len(states) == 2 else states[0]))


@each_kind
def test_any_subset_of_leaves_may_require_grad(kind: str) -> None:
    pair = twins(kind, 5, 7)
    count = len(leaves_of(pair[0])) + len(list(pair[0].parameters()))
    for wanted in itertools.chain(
        itertools.combinations(range(count), 1),
        itertools.combinations(range(count), count - 1),
        [(), (0, 1), (0, count - 1)],
    ):
        gradients = []
        for layer in pair:
            layer.zero_grad()
            leaves = leaves_of(layer)
            every = [*leaves, *layer.parameters()]
            for k, leaf in enumerate(every):
                leaf.requires_grad_(k in wanted)
            outputs = call(layer, *leaves)
            assert all(output.requires_grad == bool(wanted) for output in outputs)
            if wanted:
                sum(output.sin().sum() for output in outputs).backward()
            gradients.append([leaf.grad for leaf in every])
        for k, (mine, yours) in enumerate(zip(*gradients, strict=True)):
            assert (mine is None) == (yours is None) == (k not in wanted)
            if mine is not None:
                close(mine, yours)
                assert mine.is_contiguous()
                assert not mine.requires_grad


@each_kind
def test_gradients_from_any_subset_of_outputs(kind: str) -> None:
    pair = twins(kind, 5, 7, 2, bidirectional=True)
    count = 3 if pair[0].mode == "LSTM" else 2
    for k in range(1, count + 1):
        for chosen in itertools.combinations(range(count), k):
            gradients = []
            for layer in pair:
                leaves = leaves_of(layer)
                outputs = call(layer, *leaves)
                loss = sum(outputs[j].cos().sum() for j in chosen)
                gradients.append(torch.autograd.grad(loss, [*leaves, *layer.parameters()]))
            close(*gradients)


@each_kind
def test_gradient_of_one_step_only(kind: str) -> None:
    """Later steps do not contribute; the gradient of the output is strided and full of zeros."""
    gradients = []
    for layer in twins(kind, 5, 7):
        leaves = leaves_of(layer)
        output = call(layer, *leaves)[0]
        gradients.append(torch.autograd.grad(output[1, :, 2].sum(), leaves))
    close(*gradients)
    assert gradients[0][0][2:].count_nonzero() == 0


@each_kind
@pytest.mark.parametrize(
    "seed",
    [
        lambda output: torch.ones(()).expand_as(output),
        lambda output: torch.randn(output.shape[::-1]).permute(2, 1, 0),
        lambda output: torch.randn(*output.shape, 2)[..., 0],
    ],
    ids=["expanded", "transposed", "strided"],
)
def test_layout_of_the_incoming_gradient_does_not_matter(kind: str, seed: Any) -> None:
    layer = make(fused_rnn, kind, 5, 7, bidirectional=True)
    leaves = [*leaves_of(layer), *layer.parameters()]
    output = call(layer, *leaves[: -len(list(layer.parameters()))])[0]
    incoming = seed(output)
    strided = torch.autograd.grad(output, leaves, incoming, retain_graph=True)
    dense = torch.autograd.grad(output, leaves, incoming.contiguous())
    assert all(map(torch.equal, strided, dense))


@each_kind
@pytest.mark.parametrize("training", [True, False])
def test_backward_in_train_and_eval(kind: str, training: bool) -> None:
    gradients = []
    for layer in twins(kind, 5, 7, 2, dropout=0.0):
        leaves = leaves_of(layer.train(training))
        outputs = call(layer, *leaves)
        gradients.append(torch.autograd.grad(outputs[0].sum(), [*leaves, *layer.parameters()]))
    close(*gradients)


@each_kind
def test_eval_after_dropout_training(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7, 2, dropout=0.5)
    input = torch.randn(4, 3, 5)
    for layer in (ours, theirs):
        layer.eval()
        layer(input)[0].sum().backward()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(mine.grad, yours.grad)


@each_kind
def test_frozen_weights_pass_gradients_to_the_input(kind: str) -> None:
    gradients = []
    for layer in twins(kind, 5, 7, 2):
        layer.requires_grad_(False)
        leaves = leaves_of(layer)
        call(layer, *leaves)[0].sum().backward()
        assert all(parameter.grad is None for parameter in layer.parameters())
        gradients.append([leaf.grad for leaf in leaves])
    close(*gradients)


@each_kind
def test_retained_graphs_accumulate(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2)
    loss = layer(torch.randn(4, 3, 5))[0].sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in layer.parameters()]
    loss.backward()
    for first, parameter in zip(once, layer.parameters(), strict=True):
        assert torch.equal(2 * first, parameter.grad)


@each_kind
def test_a_second_backward_raises(kind: str) -> None:
    loss = make(fused_rnn, kind, 5, 7)(torch.randn(4, 3, 5))[0].sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@each_kind
@pytest.mark.parametrize("which", ["input", "weight_hh_l0", "weight_ih_l0"])
def test_changing_what_backward_needs_raises(kind: str, which: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input = torch.randn(4, 3, 5)
    output = layer(input)[0]
    with torch.no_grad():
        (input if which == "input" else getattr(layer, which)).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@each_kind
def test_outputs_may_be_changed_in_place(kind: str) -> None:
    gradients = []
    for layer in twins(kind, 5, 7, 2, bidirectional=True):
        leaves = leaves_of(layer)
        outputs = call(layer, *leaves)
        for output in outputs:
            output.mul_(2).add_(1)
        loss = sum(output.square().sum() for output in outputs)
        gradients.append(torch.autograd.grad(loss, [*leaves, *layer.parameters()]))
    close(*gradients)


@each_kind
def test_hooks_on_tensors_and_parameters(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    seen = []
    input = torch.randn(4, 3, 5, requires_grad=True)
    output = layer(input)[0]
    output.register_hook(lambda gradient: seen.append("output"))
    input.register_hook(lambda gradient: gradient * 0)
    layer.weight_hh_l0.register_hook(lambda gradient: seen.append("weight"))
    layer.weight_ih_l0.register_post_accumulate_grad_hook(lambda p: seen.append("accumulated"))
    output.sum().backward()
    assert sorted(seen) == ["accumulated", "output", "weight"]
    assert input.grad.count_nonzero() == 0


def double(kind: str, **options: Any) -> tuple[nn.RNNBase, Any, list[Tensor]]:
    """A tiny float64 layer as a function of all its tensors, for numerical differentiation."""
    sizes = (2, 4) if kind == "LSTMP" else (2, 3)
    layer = make(fused_rnn, kind, *sizes, dtype=torch.float64, **options)
    names = [name for name, _ in layer.named_parameters()]
    states = 2 if layer.mode == "LSTM" else 1

    def function(input: Tensor, *rest: Tensor) -> list[Tensor]:
        hx, weights = rest[:states], dict(zip(names, rest[states:], strict=True))
        state = hx if states == 2 else hx[0]
        return tuple(flatten(torch.func.functional_call(layer, weights, (input, state))))

    leaves = [*leaves_of(layer, 2), *(p.detach().requires_grad_() for p in layer.parameters())]
    return layer, function, leaves


@each_kind
@pytest.mark.parametrize(
    "options",
    [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "num_layers": 2}],
    ids=str,
)
def test_gradcheck(kind: str, options: dict[str, Any]) -> None:
    """Number by number of one layer, and of stacks by random projections of the Jacobian."""
    _, function, leaves = double(kind, **options)
    how = {"check_forward_ad": True, "check_batched_grad": True, "fast_mode": bool(options)}
    assert torch.autograd.gradcheck(function, leaves, **how)


@each_kind
def test_batched_gradients(kind: str) -> None:
    """Many vector-Jacobian products at once, as `jacobian(vectorize=True)` takes them."""
    layer = make(fused_rnn, kind, 5, 7)
    leaves = [*leaves_of(layer), *layer.parameters()]
    output = call(layer, *leaves[: -len(list(layer.parameters()))])[0]
    seeds = torch.randn(3, *output.shape)
    found = torch.autograd.grad(output, leaves, seeds, is_grads_batched=True, retain_graph=True)
    for k, seed in enumerate(seeds):
        alone = torch.autograd.grad(output, leaves, seed, retain_graph=True)
        close([gradient[k] for gradient in found], list(alone))


@each_kind
def test_gradcheck_of_packed_sequences(kind: str) -> None:
    layer, _, _ = double(kind, bidirectional=True)
    packed = pack_sequence([torch.randn(n, 2).double() for n in (1, 3, 2)], enforce_sorted=False)

    def function(data: Tensor) -> Tensor:
        return tuple(flatten(layer(packed._replace(data=data))))

    assert torch.autograd.gradcheck(function, packed.data.requires_grad_())


@each_kind
def test_gradgradcheck(kind: str) -> None:
    """Number by number where there is most of it; by random projections where there is less."""
    _, function, leaves = double(kind)
    how = {"check_fwd_over_rev": True, "check_batched_grad": True}
    assert torch.autograd.gradgradcheck(
        function, leaves, fast_mode=kind not in ("LSTMP", "GRU"), **how
    )


@each_kind
def test_gradgradcheck_of_a_stack(kind: str) -> None:
    _, function, leaves = double(kind, num_layers=2, bidirectional=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@each_kind
def test_gradients_with_create_graph_are_the_same(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    leaves = leaves_of(layer)
    output = call(layer, *leaves)[0]
    plain = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    graph = torch.autograd.grad(output.sum(), leaves, create_graph=True)
    assert all(gradient.requires_grad for gradient in graph)
    close(plain, graph)


@each_kind
def test_a_penalty_on_the_gradient_trains(kind: str) -> None:
    """Double backward in float32 as in a gradient penalty, against torch.nn."""
    gradients = []
    for layer in twins(kind, 5, 7):
        leaves = leaves_of(layer)
        output = call(layer, *leaves)[0]
        (slope,) = torch.autograd.grad(output.sum(), leaves[0], create_graph=True)
        slope.square().sum().backward()
        gradients.append([parameter.grad for parameter in layer.parameters()])
    for mine, yours in zip(*gradients, strict=True):
        # A bias that the slope does not depend on has no gradient in one, zeros in the other.
        close(*(torch.zeros(()) if g is None else g for g in (mine, yours)))


@each_kind
def test_forward_mode(kind: str) -> None:
    _, function, leaves = double(kind)
    tangents = [torch.randn_like(leaf) for leaf in leaves]
    _, forward = torch.func.jvp(function, tuple(leaves), tuple(tangents))
    outputs = function(*leaves)
    for k, output in enumerate(outputs):
        cotangent = torch.randn_like(output)
        gradients = torch.autograd.grad(output, leaves, cotangent, retain_graph=True)
        reverse = sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True))
        close((forward[k] * cotangent).sum(), reverse)


@each_kind
def test_forward_mode_by_dual_tensors(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input, tangent = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        found = torch.autograd.forward_ad.unpack_dual(layer(dual)[0]).tangent
    close(found, torch.func.jvp(lambda x: layer(x)[0], (input,), (tangent,))[1])


@each_kind
def test_jacobians_and_hessians(kind: str) -> None:
    layer = make(fused_rnn, kind, 2, 4, dtype=torch.float64)
    twin = make(nn, kind, 2, 4, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    input = torch.randn(3, 2, dtype=torch.float64)

    def last(model: nn.Module) -> Any:
        return lambda x: model(x)[0][-1].sum()

    expected = torch.autograd.functional.jacobian(lambda x: twin(x)[0], input)
    close(torch.func.jacrev(lambda x: layer(x)[0])(input), expected)
    close(torch.func.jacfwd(lambda x: layer(x)[0])(input), expected)
    curvature = torch.autograd.functional.hessian(last(twin), input)
    close(torch.func.hessian(last(layer))(input), curvature)


@each_kind
def test_vmap_over_inputs(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    inputs = torch.randn(6, 4, 5)
    found = torch.vmap(lambda x: layer(x)[0])(inputs)
    close(found, torch.stack([layer(x)[0] for x in inputs]))


@each_kind
def test_gradients_per_sample(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    inputs = torch.randn(3, 4, 5)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, weights, (x,))[0].square().sum()

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, inputs)
    for k, x in enumerate(inputs):
        layer.zero_grad()
        layer(x)[0].square().sum().backward()
        for name, parameter in layer.named_parameters():
            close(found[name][k], parameter.grad)


@each_kind
def test_expanded_weights(kind: str) -> None:
    """torch's own per-sample gradients, which intercept torch.lstm and its kin."""
    # In float32 torch's LSTM is oneDNN's, which they cannot handle.
    layer = make(fused_rnn, kind, 5, 7, batch_first=True, dtype=torch.float64)
    inputs = torch.randn(3, 4, 5, dtype=torch.float64)
    call_for_per_sample_grads(layer)(inputs)[0].square().sum().backward()
    for k, x in enumerate(inputs):
        alone = copy.deepcopy(layer)
        alone.zero_grad()
        alone(x)[0].square().sum().backward()
        for mine, one in zip(layer.parameters(), alone.parameters(), strict=True):
            close(mine.grad_sample[k], one.grad)


@each_kind
def test_ensembles_by_vmap(kind: str) -> None:
    models = [make(fused_rnn, kind, 5, 7) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    input = torch.randn(4, 2, 5)

    def one(weights: Any, state: Any) -> Tensor:
        return torch.func.functional_call(models[0], (weights, state), (input,))[0]

    close(torch.vmap(one)(parameters, buffers), torch.stack([m(input)[0] for m in models]))


@each_kind
def test_functional_call_uses_and_differentiates_the_given_weights(kind: str) -> None:
    ours, theirs = twins(kind, 5, 7)
    other = make(nn, kind, 5, 7)
    input = torch.randn(4, 3, 5)
    gradients = []
    for layer in (ours, theirs):
        weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
        output = torch.func.functional_call(layer, weights, (input,))[0]
        gradients.append(torch.autograd.grad(output.sum(), list(weights.values())))
        assert all(parameter.grad is None for parameter in layer.parameters())
    close(*gradients)
    close(ours(input), theirs(input))


@contextlib.contextmanager
def packing_hooks() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy):
        yield


@each_kind
@pytest.mark.parametrize(
    "context",
    [packing_hooks, torch.autograd.graph.save_on_cpu, torch.autograd.detect_anomaly],
    ids=lambda context: context.__name__,
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_saved_tensors_pass_through_hooks(kind: str, context: Any) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    input = torch.randn(4, 3, 5)
    gradients = []
    for manager in (contextlib.nullcontext, context):
        with manager():
            loss = layer(input)[0].sum()
            gradients.append(torch.autograd.grad(loss, list(layer.parameters())))
    assert all(map(torch.equal, *gradients))


@each_kind
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(kind: str, use_reentrant: bool) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, dropout=0.5)
    input = torch.randn(4, 3, 5, requires_grad=True)
    torch.manual_seed(5)
    output = checkpoint(lambda x: layer(x)[0], input, use_reentrant=use_reentrant)
    found = torch.autograd.backward(output.sum()) or [p.grad for p in layer.parameters()]
    layer.zero_grad()
    torch.manual_seed(5)
    layer(input)[0].sum().backward()
    assert all(map(torch.equal, found, [p.grad for p in layer.parameters()]))


@each_kind
def test_inference_tensors_cannot_be_saved(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    with torch.inference_mode():
        input = torch.randn(4, 3, 5)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        layer(input)


@each_kind
def test_a_batch_of_none_has_zero_gradients(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    input = torch.randn(4, 0, 5, requires_grad=True)
    layer(input)[0].sum().backward()
    assert input.grad.shape == (4, 0, 5)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


class Nested(NamedTuple):
    actor: Any
    critic: Any


def test_detach_keeps_the_form_and_the_memory() -> None:
    h, c = (torch.randn(3, requires_grad=True) * 2 for _ in range(2))
    assert fused_rnn.detach(None) is None
    for hx in (h, (h, c), [h, None], Nested((h, c), h), ((h,), [c, (h, c)])):
        found = fused_rnn.detach(hx)
        assert type(found) is type(hx)
        assert [type(part) for part in found] == [type(part) for part in hx]
        for mine, given in zip(flatten(found), flatten(hx), strict=True):
            assert mine.data_ptr() == given.data_ptr()
            assert given.requires_grad
            assert not mine.requires_grad
    for wrong in (3.0, "h", (h, 1), {"h": h}):
        with pytest.raises(TypeError, match="hx must be a Tensor, or a tuple or list of Tensors"):
            fused_rnn.detach(wrong)


@each_kind
def test_truncated_backpropagation_through_time(kind: str) -> None:
    """A window learns from the state before it and nothing learns through it."""
    gradients = []
    for layer in twins(kind, 5, 7):
        windows = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(1))
        first, second = (window.requires_grad_() for window in windows.unbind())
        _, hx = layer(first)
        output, _ = layer(second, fused_rnn.detach(hx))
        output.square().sum().backward()
        assert first.grad is None
        gradients.append([second.grad, *(p.grad for p in layer.parameters())])
    close(*gradients)
