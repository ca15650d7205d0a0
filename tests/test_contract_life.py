"""A layer's life: state dicts, pickles, copies, casts, hooks, parametrizations, old checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.utils.parametrize
from layers import CELLS, KINDS, assert_same_complaint, complaint, flatten, make, twins
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import fused_rnn

each_kind = pytest.mark.parametrize("kind", KINDS)
each_cell = pytest.mark.parametrize("name", CELLS)
INPUT = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(1))


def assert_whole(layer: nn.RNNBase) -> None:
    """The parameters are what a call uses, and the flat list holds them."""
    options: dict[str, Any] = {"proj_size": layer.proj_size} if layer.proj_size else {}
    if layer.mode.startswith("RNN"):
        options["nonlinearity"] = layer.nonlinearity
    plain = getattr(nn, layer.mode.partition("_")[0])
    dtype, device = layer.weight_hh_l0.dtype, layer.weight_hh_l0.device
    twin = plain(5, 7, layer.num_layers, dtype=dtype, device=device, **options)
    with torch.no_grad():
        for name in layer._flat_weights_names:
            getattr(twin, name).copy_(getattr(layer, name))
    input = INPUT.to(device, dtype)
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(layer(input), twin(input), **tolerance)
    for name, weight in zip(layer._flat_weights_names, layer._flat_weights, strict=True):
        assert weight is getattr(layer, name), name


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(map(torch.equal, flatten(ours(INPUT)), flatten(theirs(INPUT))))


@each_kind
def test_state_dicts_travel_both_ways(kind: str) -> None:
    ours = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    theirs = make(nn, kind, 5, 7, 2, bidirectional=True)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(INPUT), theirs(INPUT))
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, -0.3, 0.3)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(INPUT), theirs(INPUT))
    assert list(ours.state_dict()) == list(theirs.state_dict())


@each_cell
def test_state_dicts_of_cells_travel_both_ways(name: str) -> None:
    ours, theirs = getattr(fused_rnn, name)(5, 7), getattr(nn, name)(5, 7)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(INPUT[0]), theirs(INPUT[0]))
    nn.init.normal_(theirs.weight_hh)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(INPUT[0]), theirs(INPUT[0]))


@each_kind
def test_wrong_state_dicts_are_refused_as_torch_refuses(kind: str) -> None:
    state = make(nn, kind, 5, 7).state_dict()
    missing = {name: weight for name, weight in state.items() if "hh" not in name}
    longer = {**state, "foo": torch.zeros(1)}
    reshaped = {name: weight[:-1] for name, weight in state.items()}
    for wrong in (missing, longer, reshaped, {}):
        assert_same_complaint(lambda lib, wrong=wrong: make(lib, kind, 5, 7).load_state_dict(wrong))
    result = make(fused_rnn, kind, 5, 7).load_state_dict(missing, strict=False)
    assert result.missing_keys == [name for name in state if name not in missing]


@each_kind
def test_loading_by_assignment_and_from_other_dtypes(kind: str) -> None:
    ours, theirs = make(fused_rnn, kind, 5, 7), make(nn, kind, 5, 7)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert ours.weight_hh_l0.data_ptr() == theirs.weight_hh_l0.data_ptr()
    assert_whole(ours)
    ours.load_state_dict(make(nn, kind, 5, 7, dtype=torch.float64).state_dict())
    assert ours.weight_hh_l0.dtype == torch.float32
    assert_whole(ours)
    with torch.device("meta"):
        empty = make(fused_rnn, kind, 5, 7)
    empty.load_state_dict(theirs.state_dict(), assign=True)
    assert_whole(empty)


def through_pickle(protocol: int) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: pickle.loads(pickle.dumps(layer, protocol))


def through_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


COPIES = [*(through_pickle(k) for k in range(2, 6)), through_save, copy.deepcopy]
COPY_NAMES = [*(f"pickle{k}" for k in range(2, 6)), "torch.save", "deepcopy"]


@each_kind
@pytest.mark.parametrize("reproduce", COPIES, ids=COPY_NAMES)
def test_copies_are_whole_and_separate(kind: str, reproduce: Any) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2).eval()
    twin = reproduce(layer)
    assert type(twin) is type(layer)
    assert not twin.training
    assert same(layer, twin)
    assert_whole(twin)
    with torch.no_grad():
        twin.weight_hh_l1.mul_(2)
    assert not same(layer, twin)


@each_kind
def test_shallow_copies_share_the_parameters(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    twin = copy.copy(layer)
    assert twin.weight_hh_l0 is layer.weight_hh_l0
    assert same(layer, twin)
    assert_whole(twin)


@each_cell
@pytest.mark.parametrize("reproduce", [*COPIES, copy.copy], ids=[*COPY_NAMES, "copy"])
def test_copies_of_cells(name: str, reproduce: Any) -> None:
    cell = getattr(fused_rnn, name)(5, 7)
    assert all(map(torch.equal, flatten(cell(INPUT[0])), flatten(reproduce(cell)(INPUT[0]))))


@each_kind
def test_the_pickled_state_has_no_weak_references(kind: str) -> None:
    assert "_flat_weight_refs" not in make(fused_rnn, kind, 5, 7).__getstate__()


@each_kind
@pytest.mark.parametrize("age", ["no proj_size", "all_weights", "no names"])
def test_old_checkpoints(kind: str, age: str) -> None:
    layer = make(fused_rnn, kind, 5, 7, 2, bidirectional=True)
    names, state = layer._all_weights, copy.copy(layer.__getstate__())
    if age == "no proj_size":
        if kind == "LSTMP":
            pytest.skip("older than projections")
        del state["proj_size"]
    if age == "all_weights":
        state["all_weights"] = state.pop("_all_weights")
    if age == "no names":
        state["_all_weights"] = [[parameter] for parameter in layer.parameters()]
    state["_flat_weights"] = list(layer.parameters())  # where torch.nn's layers keep them
    restored = type(layer).__new__(type(layer))
    restored.__setstate__(state)
    assert "_flat_weights" not in vars(restored)  # they would live as long as the layer
    assert restored.proj_size == layer.proj_size
    assert restored._all_weights == names
    assert same(restored, layer)


CHANGES: dict[str, Callable[[nn.RNNBase], object]] = {
    "setattr": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(torch.randn_like(m.weight_hh_l0))),
    "del and set": lambda m: (
        delattr(m, "weight_ih_l0"),
        setattr(m, "weight_ih_l0", nn.Parameter(torch.randn(m.weight_hh_l0.shape[0], 5))),
    ),
    "register_parameter": lambda m: m.register_parameter(
        "weight_hh_l0", nn.Parameter(torch.randn_like(m.weight_hh_l0))
    ),
    ".data": lambda m: setattr(m.weight_hh_l0, "data", torch.randn_like(m.weight_hh_l0)),
    "copy_": lambda m: m.weight_hh_l0.data.copy_(torch.randn_like(m.weight_hh_l0)),
    ".to(float64)": lambda m: m.to(torch.float64),
    ".double()": lambda m: m.double(),
    ".bfloat16()": lambda m: m.bfloat16(),
    ".half()": lambda m: m.half(),
    ".type()": lambda m: m.type(torch.float64),
    "share_memory": lambda m: m.share_memory(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "flatten_parameters": lambda m: m.flatten_parameters(),
    "vector": lambda m: nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in m.parameters())), m.parameters()
    ),
    "meta and back": lambda m: (
        m.to("meta").to_empty(device="cpu"),
        m.reset_parameters(),
    ),
}  # fmt: skip


@each_kind
@pytest.mark.parametrize("change", CHANGES)
def test_the_flat_list_follows_the_parameters(kind: str, change: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    CHANGES[change](layer)
    assert_whole(layer)


@pytest.fixture
def swapping() -> Iterator[None]:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


@each_kind
@pytest.mark.parametrize("change", [".to(float64)", ".bfloat16()", "meta and back"])
@pytest.mark.usefixtures("swapping")
def test_parameters_may_be_swapped_on_conversion(kind: str, change: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    weight = layer.weight_hh_l0
    CHANGES[change](layer)
    assert layer.weight_hh_l0 is weight
    assert_whole(layer)


@each_kind
@pytest.mark.usefixtures("swapping")
def test_parameters_may_be_swapped_on_loading(kind: str) -> None:
    """torch's layers fail here, for their weak references to the parameters."""
    layer = make(fused_rnn, kind, 5, 7)
    layer.load_state_dict(make(nn, kind, 5, 7).state_dict())
    assert_whole(layer)


@each_kind
def test_a_tensor_is_no_parameter(kind: str) -> None:
    assert_same_complaint(
        lambda lib: setattr(make(lib, kind, 5, 7), "weight_hh_l0", torch.zeros(1))
    )


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_a_layer_without_bias_parameter_is_refused(name: str) -> None:
    def call(library: Any) -> None:
        layer = getattr(library, name)(5, 7)
        layer.bias_ih_l0 = None
        layer(INPUT)

    assert complaint(lambda: call(fused_rnn))[0] is complaint(lambda: call(nn))[0]


@each_kind
def test_tied_weights(kind: str) -> None:
    ours, theirs = twins(kind, 7, 7) if kind != "LSTMP" else twins(kind, 3, 7)
    input = torch.randn(4, 3, ours.input_size)
    for layer in (ours, theirs):
        layer.weight_ih_l0 = layer.weight_hh_l0
        layer.flatten_parameters()
        layer(input)[0].sum().backward()
    torch.testing.assert_close(ours(input), theirs(input))
    torch.testing.assert_close(ours.weight_hh_l0.grad, theirs.weight_hh_l0.grad)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def prune_some(layer: nn.RNNBase) -> object:
    mask = (torch.arange(layer.weight_hh_l0.numel()) % 3 > 0).view_as(layer.weight_hh_l0)
    return prune.custom_from_mask(layer, "weight_hh_l0", mask)


REPARAMETRIZATIONS: dict[str, Callable[[nn.RNNBase], object]] = {
    "custom": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Double()),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m.eval(), "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "two": lambda m: (
        parametrizations.weight_norm(m, "weight_hh_l0"),
        parametrizations.weight_norm(m, "weight_ih_l0"),
    ),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m.eval(), "weight_hh_l0"),
    "prune": prune_some,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each_kind
@pytest.mark.parametrize("reparametrize", REPARAMETRIZATIONS)
def test_reparametrized_layers_train(kind: str, reparametrize: str) -> None:
    """The weight in use is computed from others; two steps of SGD against torch.nn."""
    ours, theirs = twins(kind, 5, 7)
    for layer in (ours, theirs):
        torch.manual_seed(2)
        REPARAMETRIZATIONS[reparametrize](layer)
    theirs.load_state_dict(ours.state_dict())
    for layer in (ours, theirs):
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            layer(INPUT)[0].square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours(INPUT), theirs(INPUT))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


@each_kind
def test_cached_and_removed_parametrizations(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.weight_hh_l0.mul_(2)
    parametrize.register_parametrization(layer, "weight_hh_l0", Double())
    with parametrize.cached():
        assert same(layer, expected)
        assert same(layer, expected)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert same(layer, expected)
    assert_whole(layer)


@each_kind
def test_hooks_see_and_replace(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    layer.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(f"pre {sorted(kwargs)}"), with_kwargs=True
    )
    layer.register_forward_hook(lambda m, args, result: (result[0] * 2, result[1]))
    layer.register_full_backward_hook(lambda m, into, out: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda m, out: seen.append("backward pre"))
    plain = make(fused_rnn, kind, 5, 7)
    plain.load_state_dict(layer.state_dict())
    input = INPUT.clone().requires_grad_()
    output = layer(input, hx=None)[0]
    assert torch.equal(output, plain(INPUT)[0] * 2)
    output.sum().backward()
    assert seen == ["pre", "pre ['hx']", "backward pre", "backward"]


@each_kind
def test_subclasses_that_wrap_forward(kind: str) -> None:
    base = type(make(fused_rnn, kind, 5, 7))

    class Louder(base):  # type: ignore[misc, valid-type]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            output, ends = super().forward(input, hx)
            return 2 * output, ends

    torch.manual_seed(4)
    louder = Louder(5, 7, **KINDS[kind][1])
    torch.manual_seed(4)
    plain = make(fused_rnn, kind, 5, 7)
    assert torch.equal(louder(INPUT)[0], 2 * plain(INPUT)[0])
    assert repr(louder).startswith("Louder(5, 7")


@each_kind
def test_averaged_models(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(3)
    averaged.update_parameters(layer)
    averaged.update_parameters(layer)
    assert averaged.module(INPUT)[0].shape == layer(INPUT)[0].shape
    assert_whole(averaged.module)


@each_kind
def test_replicas_use_the_tensors_they_are_given(kind: str) -> None:
    """As torch.nn.parallel.replicate does: plain tensors where the parameters were."""
    layer = make(fused_rnn, kind, 5, 7)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 2)
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    assert same(replica, doubled)
    replica(INPUT)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert_whole(layer)


@each_kind
def test_flatten_parameters_returns_nothing(kind: str) -> None:
    layer = make(fused_rnn, kind, 5, 7)
    before = [parameter.data_ptr() for parameter in layer.parameters()]
    assert layer.flatten_parameters() is None
    assert before == [parameter.data_ptr() for parameter in layer.parameters()]


@each_kind
def test_an_optimizer_brings_the_loss_down(kind: str) -> None:
    layer, head = make(fused_rnn, kind, 1, 12, 2), nn.Linear(3 if kind == "LSTMP" else 12, 1)
    wave = torch.sin(torch.linspace(0, 12, 61)).view(-1, 1, 1)
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (head(layer(wave[:-1])[0]) - wave[1:]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
