"""torch's tools on every layer and cell: parametrizations, pruning, hooks, optimizers, averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import BEYOND, CELLS, KINDS, flatten, make
from test_beyond_torch import CELLS as CELLS_BEYOND
from test_beyond_torch import make_cell
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, stateless
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fused_rnn

I, H = 5, 7
INPUT = torch.randn(4, 3, I, generator=torch.Generator().manual_seed(1))
EVERY: dict[str, Callable[[], Any]] = {
    **{kind: lambda kind=kind: make(fused_rnn, kind, I, H, 2) for kind in (*KINDS, *BEYOND)},
    **{name: lambda name=name: getattr(fused_rnn, name)(I, H) for name in CELLS},
    **{f"{kind} cell": lambda kind=kind: make_cell(kind, I, H) for kind in CELLS_BEYOND},
}
each = pytest.mark.parametrize("kind", EVERY)


def arguments(module: nn.Module) -> tuple[Any, ...]:
    input = INPUT.to(next(module.parameters()).dtype)
    if not isinstance(module, nn.RNNCellBase):
        return (input,)
    state = input[1, :, :1] + input[2, :, :1] * torch.arange(H)  # or W_hh has no gradient
    return input[0], (state, state) if isinstance(module, fused_rnn.LSTMCell) else state


def outputs(module: nn.Module) -> list[Tensor]:
    return flatten(module(*arguments(module)))


def loss(module: nn.Module) -> Tensor:
    return sum((t.square().sum() for t in outputs(module)), start=torch.zeros(()))


def same(ours: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, outputs(ours), outputs(other)))


def test_every_layer_and_cell_is_asked() -> None:
    kinds = {type(build()).__name__ for build in EVERY.values()}
    ours = {
        name
        for name in fused_rnn.__all__
        if isinstance(getattr(fused_rnn, name), type)
        and issubclass(getattr(fused_rnn, name), (nn.RNNBase, nn.RNNCellBase))
        and not name.startswith("Frozen")  # without parameters
    }
    assert kinds == ours


def prune_some(module: nn.Module, name: str) -> object:
    weight = getattr(module, name)
    mask = (torch.arange(weight.numel()) % 3 > 0).view_as(weight)
    return prune.custom_from_mask(module, name, mask)


REPARAMETRIZATIONS: dict[str, Callable[[Any, str], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "prune": prune_some,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reparametrize", REPARAMETRIZATIONS)
@each
def test_a_reparametrized_weight_is_the_one_in_use(kind: str, reparametrize: str) -> None:
    """The gradient goes on to what it is made of, a copy is whole."""
    module, plain = EVERY[kind](), EVERY[kind]()
    # The last matrix of a layer, the recurrent one; IndRNN has a vector there.
    names = [name for name, p in plain.named_parameters() if p.dim() == 2]
    name = max(names, key=lambda n: "weight_hh" in n)
    REPARAMETRIZATIONS[reparametrize](module, name)
    own = {n for n, _ in module.named_parameters()}
    assert name not in own
    module.eval()  # spectral_norm goes on iterating in training
    found = outputs(module)
    with torch.no_grad():
        for n, parameter in plain.named_parameters():
            parameter.copy_(getattr(module, n))
    assert all(map(torch.equal, found, outputs(plain)))
    loss(module).backward()
    loss(plain).backward()
    for n, parameter in module.named_parameters():
        assert parameter.grad.any(), n
        if n in dict(plain.named_parameters()):
            assert torch.equal(parameter.grad, plain.get_parameter(n).grad), n
    if reparametrize in vars(parametrizations):  # the others keep a tensor that cannot be copied
        assert same(copy.deepcopy(module), module)


@each
def test_hooks_see_the_call_and_the_state(kind: str) -> None:
    module = EVERY[kind]()
    seen: list[str] = []

    def note(word: str) -> Callable[..., None]:
        return lambda *_: seen.append(word)

    module.register_forward_pre_hook(note("pre"))
    module.register_forward_hook(note("forward"))
    module.register_full_backward_pre_hook(note("backward pre"))
    module.register_full_backward_hook(note("backward"))
    module.register_state_dict_pre_hook(note("state"))
    module.register_state_dict_post_hook(note("state after"))
    module.register_load_state_dict_pre_hook(note("load"))
    module.register_load_state_dict_post_hook(note("load after"))
    input, *states = arguments(module)
    flatten(module(input.clone().requires_grad_(), *states))[0].sum().backward()
    module.load_state_dict(module.state_dict())
    assert seen == [
        *("pre", "forward", "backward pre", "backward"),
        *("state", "state after", "load", "load after"),
    ]


@pytest.mark.parametrize("how", ["foreach", "fused"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad"])
@each
def test_optimizers_that_take_all_parameters_at_once(kind: str, optimizer: str, how: str) -> None:
    module = EVERY[kind]().double()  # Adam divides by gradients, however small
    plain = copy.deepcopy(module)
    for each_module, options in ((module, {how: True}), (plain, {how: False})):
        steps = getattr(torch.optim, optimizer)(each_module.parameters(), 0.1, **options)
        for _ in range(2):
            steps.zero_grad()
            loss(each_module).backward()
            steps.step()
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
    torch.testing.assert_close(outputs(module), outputs(plain))


@each
def test_parameters_as_one_vector(kind: str) -> None:
    module, other = EVERY[kind](), EVERY[kind]()
    vector = nn.utils.parameters_to_vector(other.parameters())
    nn.utils.vector_to_parameters(vector.detach().clone(), module.parameters())
    assert same(module, other)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("call", [torch.func.functional_call, stateless.functional_call])
@each
def test_functional_call(kind: str, call: Callable[..., Any]) -> None:
    module, other = EVERY[kind](), EVERY[kind]()
    weights = {name: p.detach().requires_grad_() for name, p in other.named_parameters()}
    found = flatten(call(module, weights, arguments(module)))
    assert all(map(torch.equal, found, outputs(other)))
    total = sum((t.square().sum() for t in found), start=torch.zeros(()))
    gradients = torch.autograd.grad(total, list(weights.values()))
    loss(other).backward()
    assert all(map(torch.equal, gradients, [p.grad for p in other.parameters()]))


@each
def test_moving_averages(kind: str) -> None:
    module, target = EVERY[kind](), EVERY[kind]()
    average = AveragedModel(target, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(module)  # the first is taken as it is
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(-1)
    average.update_parameters(module)  # 0.75 w - 0.25 w
    expected = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(-0.5)
    torch.testing.assert_close(outputs(average.module), outputs(expected))


@each
def test_ensembles_by_stack_module_state(kind: str) -> None:
    models = [EVERY[kind]() for _ in range(2)]
    stacked, _ = torch.func.stack_module_state(models)

    def run(weights: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(flatten(torch.func.functional_call(models[0], weights, arguments(models[0]))))

    for found, *single in zip(torch.vmap(run)(stacked), *map(outputs, models), strict=True):
        torch.testing.assert_close(found, torch.stack(single))
