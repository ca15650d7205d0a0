"""`convert` and `to_torch`: what they change, what they leave, what they say."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layers import flatten
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_sequence

import fused_rnn
from fused_rnn import convert, to_torch

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True, dropout=0.3),
    "LSTMP": lambda: nn.LSTM(5, 7, proj_size=3, bias=False),
    "GRU": lambda: nn.GRU(5, 7, dtype=torch.float64),
    "RNN": lambda: nn.RNN(5, 7, nonlinearity="relu"),
    "LSTMCell": lambda: nn.LSTMCell(5, 7),
    "GRUCell": lambda: nn.GRUCell(5, 7, bias=False),
    "RNNCell": lambda: nn.RNNCell(5, 7, nonlinearity="relu"),
}
each_kind = pytest.mark.parametrize("kind", MAKERS)
each_layer = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])


def input_for(layer: nn.Module) -> Tensor:
    shape = (3, 5) if isinstance(layer, nn.RNNCellBase) else (4, 3, 5)
    return torch.randn(shape, dtype=next(layer.parameters()).dtype)


def assert_same_results(ours: nn.Module, theirs: nn.Module) -> None:
    input = input_for(theirs)
    torch.manual_seed(1)
    outputs = flatten(ours(input))
    torch.manual_seed(1)
    torch.testing.assert_close(outputs, flatten(theirs(input)))


def twin_of(layer: nn.Module) -> type:
    return getattr(fused_rnn, type(layer).__name__)


class Model(nn.Module):
    """Layers as attributes, in containers, shared, and two that must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.encoder = nn.LSTM(5, 5)
        self.tied = self.encoder
        self.stack = nn.ModuleList([nn.GRU(5, 5), nn.ModuleDict({"cell": nn.RNNCell(5, 5)})])
        self.own = Subclass(5, 5)
        self.unlisted = [self.encoder]

    def forward(self, input: Tensor) -> Tensor:
        x, _ = self.encoder(self.embed(input))
        x, _ = self.stack[0](x)
        x, _ = self.own(x)
        return self.stack[1]["cell"](x[-1])


class Subclass(nn.GRU):
    def forward(self, *args: Any) -> Any:
        output, state = super().forward(*args)
        return -output, state


@each_kind
def test_a_layer_itself(kind: str) -> None:
    layer = MAKERS[kind]()
    plain = copy.deepcopy(layer)
    twin = twin_of(layer)
    assert convert(layer) is layer
    assert type(layer) is twin
    assert repr(layer) == repr(plain)
    assert_same_results(layer, plain)


@each_kind
def test_there_and_back_leaves_no_trace(kind: str) -> None:
    layer = MAKERS[kind]()
    before, attributes = type(layer), dict(vars(layer))
    parameters = list(layer.parameters())
    assert to_torch(convert(layer)) is layer
    assert type(layer) is before
    assert vars(layer).keys() == attributes.keys()
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    if isinstance(layer, nn.RNNBase):
        assert all(a is b for a, b in zip(layer._flat_weights, parameters, strict=True))
    assert layer.__module__ == "torch.nn.modules.rnn"
    assert_same_results(layer, copy.deepcopy(layer))


def test_a_model_keeps_parameters_names_and_sharing() -> None:
    model = Model()
    plain = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    convert(model)
    assert type(model.encoder) is fused_rnn.LSTM
    assert model.tied is model.encoder
    assert model.unlisted == [model.encoder]
    assert type(model.stack[0]) is fused_rnn.GRU
    assert type(model.stack[1]["cell"]) is fused_rnn.RNNCell
    assert type(model.own) is Subclass
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is parameters[name] for name in parameters)
    assert list(model.state_dict()) == list(plain.state_dict())
    input = torch.randn(4, 2, 3)
    torch.testing.assert_close(model(input), plain(input))


def test_an_optimizer_made_before_trains_the_converted_model() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = model.encoder.weight_hh_l0.detach().clone()
    convert(model)
    model(torch.randn(4, 2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.encoder.weight_hh_l0, before)


def test_what_was_set_on_a_layer_stays() -> None:
    layer = nn.LSTM(5, 7, 2, dropout=0.5, dtype=torch.bfloat16).eval().requires_grad_(False)
    layer.weight_hh_l0.requires_grad_()
    layer.note = "mine"
    convert(layer)
    assert not layer.training
    assert layer.note == "mine"
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight_hh_l0"]
    assert layer(torch.randn(4, 3, 5, dtype=torch.bfloat16))[0].dtype == torch.bfloat16
    assert convert(nn.GRU(5, 7, device="meta")).weight_ih_l0.is_meta


@each_kind
def test_hooks_stay(kind: str) -> None:
    layer = MAKERS[kind]()
    calls = []
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer._register_state_dict_hook(lambda *_: calls.append("state_dict"))
    layer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    convert(layer)
    outputs = flatten(layer(input_for(layer).requires_grad_()))
    sum(output.sum() for output in outputs).backward()
    layer.load_state_dict(layer.state_dict())
    assert calls == ["pre", "forward", "backward", "state_dict", "load"]


@each_layer
def test_parametrizations_stay_and_can_be_removed(kind: str) -> None:
    layer = MAKERS[kind]()
    twin = twin_of(layer)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    plain = copy.deepcopy(layer)
    convert(layer)
    assert isinstance(layer, twin)
    assert parametrize.type_before_parametrizations(layer) is twin
    assert_same_results(layer, plain)
    assert_same_results(copy.deepcopy(layer), plain)
    assert_same_results(to_torch(copy.deepcopy(layer)), plain)
    for each in (layer, plain):
        parametrize.remove_parametrizations(each, "weight_hh_l0")
    assert type(layer) is twin
    assert_same_results(layer, plain)


def test_two_parametrized_layers_do_not_share_a_class() -> None:
    first, second = nn.GRU(5, 7), nn.GRU(5, 7)
    parametrizations.weight_norm(first, "weight_hh_l0")
    parametrizations.weight_norm(second, "weight_ih_l0")
    convert(nn.ModuleList([first, second]))
    assert isinstance(vars(type(first))["weight_hh_l0"], property)
    assert "weight_hh_l0" not in vars(type(second))


@each_layer
def test_pruning_stays(kind: str) -> None:
    layer = MAKERS[kind]().eval()
    prune.l1_unstructured(layer, "weight_ih_l0", amount=0.5)
    input = input_for(layer)
    expected = flatten(layer(input))
    torch.testing.assert_close(flatten(convert(layer)(input)), expected)
    prune.remove(layer, "weight_ih_l0")
    torch.testing.assert_close(flatten(layer(input)), expected)


def test_a_converted_layer_is_whole() -> None:
    layer = convert(nn.LSTM(5, 7))
    assert "_flat_weights" not in vars(layer)
    layer.weight_ih_l0 = nn.Parameter(torch.zeros(28, 5))
    layer.bias_ih_l0.data.zero_()
    layer.bias_hh_l0.data.zero_()
    output, _ = layer(torch.randn(4, 3, 5))
    assert not output.any()
    assert_same_results(layer.double(), copy.deepcopy(layer))
    packed, _ = layer(pack_sequence([torch.randn(3, 5).double(), torch.randn(2, 5).double()]))
    assert packed.data.shape == (5, 7)


def test_filter_fn_gets_layer_and_name() -> None:
    model = Model()
    seen = []

    def only_grus(layer: nn.Module, name: str) -> bool:
        seen.append((name, layer))
        return isinstance(layer, nn.GRU)

    convert(model, filter_fn=only_grus)
    assert seen == [
        ("encoder", model.encoder),
        ("stack.0", model.stack[0]),
        ("stack.1.cell", model.stack[1]["cell"]),
    ]
    assert type(model.encoder) is nn.LSTM
    assert type(model.stack[0]) is fused_rnn.GRU


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_report_has_every_layer_and_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "fine": nn.GRU(5, 7),
            "refused": nn.LSTM(5, 7),
            "subclass": Subclass(5, 7),
            "quantised": nn.LSTM(5, 7),
            "patched": nn.RNN(5, 7),
            "scripted": torch.jit.script(nn.GRUCell(5, 7)),
            "linear": nn.Linear(5, 7),
            "done": fused_rnn.GRU(5, 7),
        }
    )
    model["quantised"].qconfig = object()
    model["patched"].forward = lambda input: input
    types = {name: type(module) for name, module in model.items()}
    outcomes: dict[str, str] = {}
    convert(model, filter_fn=lambda _, name: name != "refused", report=outcomes.__setitem__)
    assert outcomes == {
        "fine": "converted",
        "refused": "skipped: filter_fn said no",
        "subclass": "skipped: Subclass is a subclass",
        "quantised": "skipped: it has a qconfig, and torch quantises only its own classes",
        "patched": "skipped: its forward has been replaced",
        "scripted": "skipped: it is TorchScript",
    }
    types["fine"] = fused_rnn.GRU
    assert {name: type(module) for name, module in model.items()} == types


def test_outcomes_are_logged_without_a_report(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fused_rnn"):
        convert(nn.Sequential(nn.LSTM(5, 7), Subclass(7, 7)))
        convert(nn.GRU(5, 7))
    assert [record.getMessage() for record in caplog.records] == [
        "0: converted",
        "1: skipped: Subclass is a subclass",
        "the model: converted",
    ]


def test_converting_twice_and_back_twice_is_converting_once() -> None:
    model = nn.Sequential(nn.LSTM(5, 7))
    outcomes: dict[str, str] = {}
    convert(convert(model), report=outcomes.__setitem__)
    assert type(model[0]) is fused_rnn.LSTM
    to_torch(to_torch(model), report=outcomes.__setitem__)
    assert type(model[0]) is nn.LSTM
    assert not outcomes


def test_to_torch_leaves_subclasses_of_ours() -> None:
    class Mine(fused_rnn.GRU):
        pass

    outcomes: dict[str, str] = {}
    model = to_torch(nn.Sequential(Mine(5, 7)), report=outcomes.__setitem__)
    assert type(model[0]) is Mine
    assert list(outcomes) == ["0"]
    assert outcomes["0"].endswith("Mine is a subclass")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_to_torch_opens_the_way_to_quantisation() -> None:
    model = nn.Sequential(fused_rnn.LSTM(5, 7))
    kept = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert type(kept[0]) is fused_rnn.LSTM
    quantised = torch.ao.quantization.quantize_dynamic(to_torch(model), {nn.LSTM})
    assert type(quantised[0]) is torch.ao.nn.quantized.dynamic.LSTM


def test_a_converted_model_pickles_and_copies_as_ours(tmp_path: Any) -> None:
    model = convert(nn.Sequential(nn.LSTM(5, 7)))
    torch.save(model, tmp_path / "model.pt")
    for copied in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert type(copied[0]) is fused_rnn.LSTM
        assert_same_results(copied[0], model[0])


def test_a_converted_model_compiles_whole() -> None:
    model = nn.Sequential(nn.GRU(5, 7))
    input = torch.randn(4, 3, 5)
    expected = model(input)
    compiled = torch.compile(convert(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input), expected)
