"""From torch.nn's layers to ours and back, in models that exist."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import modules

Model = TypeVar("Model", bound=nn.Module)
Report = Callable[[str, str], object]

_log = logging.getLogger("fused_rnn")
NAMES = ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")
TO_FUSED: dict[type, type[nn.Module]] = {getattr(nn, n): getattr(modules, n) for n in NAMES}
_TO_TORCH: dict[type, type[nn.Module]] = {ours: plain for plain, ours in TO_FUSED.items()}


def convert(
    model: Model,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    report: Report | None = None,
) -> Model:
    """Turn every torch.nn.LSTM, GRU, RNN and cell in `model` into ours, in place.

    A layer changes its class and stays the object it was: its parameters, hooks, parametrizations,
    mode and attributes are untouched, and whoever holds it (an optimizer, a second place in the
    model, a variable) holds the converted one. `model` itself may be a layer.

    Skipped are subclasses, layers with a `forward` of their own, layers under quantisation (torch
    knows what to quantise by its class) and TorchScript.

    Args:
        model: the model, which is also returned.
        filter_fn: called with a layer and its name in the model; False skips it.
        report: called with the name of each recurrent layer and its outcome, "converted" or
            "skipped: " and why. `report=print` shows them; with `outcomes = {}`,
            `report=outcomes.__setitem__` keeps them. By default they are logged at level INFO to
            `logging.getLogger("fused_rnn")`.
    """

    def objection(layer: nn.Module, name: str) -> str | None:
        if getattr(layer, "qconfig", None) is not None:
            return "it has a qconfig, and torch quantises only its own classes"
        if "forward" in vars(layer):
            return "its forward has been replaced"
        if filter_fn is not None and not filter_fn(layer, name):
            return "filter_fn said no"
        return None

    return _change_classes(model, TO_FUSED, objection, report)


def to_torch(model: Model, *, report: Report | None = None) -> Model:
    """Turn our layers in `model` back into those of torch.nn, in place, as `convert` does.

    For tools that ask for the exact class: quantisation, structured pruning. Layers that torch.nn
    does not have are skipped: PeepholeLSTM and its like, and a GRU with `reset_after=False`.
    """
    return _change_classes(model, _TO_TORCH, lambda layer, name: _beyond_torch(layer), report)


def has_twin(layer: nn.Module) -> bool:
    """Whether torch.nn has the layer."""
    source = parametrize.type_before_parametrizations(layer)
    return source in _TO_TORCH and _beyond_torch(layer) is None


def _beyond_torch(layer: nn.Module) -> str | None:
    if not getattr(layer, "reset_after", True):
        return "torch.nn has no GRU whose reset gate acts before the product"
    return None


def _change_classes(
    model: Model,
    table: dict[type, type[nn.Module]],
    objection: Callable[[nn.Module, str], str | None],
    report: Report | None,
) -> Model:
    report = report or (lambda name, outcome: _log.info("%s: %s", name or "the model", outcome))
    for name, layer in list(model.named_modules()):
        source = parametrize.type_before_parametrizations(layer)
        if source in table:
            reason = objection(layer, name)
            if reason is None:
                _change_class(layer, table[source])
        elif isinstance(layer, tuple(table)):
            ours = source.__module__ == modules.__name__
            name_of_it = source.__qualname__
            reason = f"torch.nn has no {name_of_it}" if ours else f"{name_of_it} is a subclass"
        elif isinstance(layer, torch.jit.ScriptModule) and layer.original_name in NAMES:
            reason = "it is TorchScript"
        else:
            continue
        report(name, "converted" if reason is None else f"skipped: {reason}")
    return model


def _change_class(layer: nn.Module, target: type[nn.Module]) -> None:
    if parametrize.is_parametrized(layer):
        # Its class was made for it, with a property for each parametrized tensor.
        own = {k: v for k, v in vars(type(layer)).items() if k not in ("__dict__", "__weakref__")}
        layer.__class__ = type(f"Parametrized{target.__name__}", (target,), own)
    else:
        layer.__class__ = target
    # RNNBase keeps its parameters a second time, in our layers they are computed.
    vars(layer).pop("_flat_weights", None)
    if target in _TO_TORCH:
        modules.mark_as_leaf(layer)
    else:
        vars(layer).pop("__module__", None)
    if isinstance(layer, nn.RNNBase):
        layer._init_flat_weights()
