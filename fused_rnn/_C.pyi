from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .strategy import Persistent, Plan

Values = NDArray[np.float32] | NDArray[np.float64]

def cells() -> dict[str, dict[str, int]]: ...
def isa() -> str: ...
def compiled_isas() -> list[str]: ...
def build_info() -> dict[str, str]: ...
def cuda() -> tuple[str, str]: ...
def cell_forward(
    cell: str, x: Values, h: Values, w: Values, m: Values, prev: Values
) -> tuple[Values, Values]: ...
def cell_backward(
    cell: str,
    saved: Values,
    w: Values,
    m: Values,
    prev: Values,
    state: Values,
    d_state: Values,
) -> tuple[Values, Values, Values, Values]: ...
def math(name: str, x: Values) -> Values: ...
def packed_bytes(cell: str, I: int, H: int, R: int, *, projected: bool, dtype: str) -> int: ...
def cached_bytes() -> int: ...
def empty_cache() -> None: ...
def poison_new_memory(on: bool) -> None: ...
def tile_rate(threads: int) -> float: ...
def stream_rate(bytes: int, threads: int) -> float: ...
def strategy(
    cell: str,
    T: int,
    B: int,
    I: int,
    H: int,
    *,
    proj: int = 0,
    layers: int = 1,
    directions: int = 1,
    rows: int = 0,
    threads: int = 1,
    backward: bool = False,
    busy: bool = False,
    l2: int = 0,
    weight_bytes: int = 4,
) -> Plan: ...
def busy() -> bool: ...

class Pressure:
    def __init__(self) -> None: ...
    def high(self, now: int) -> bool: ...
    def report(self, now: int, total: int, lost: int) -> None: ...

def force_split(split: str | None) -> str | None: ...
def schedule(
    cell: str,
    B: int,
    H: int,
    dtype: str,
    *,
    sms: int,
    shared_per_block: int,
    backward: bool = False,
    projected: bool = False,
    ragged: bool = False,
    controlled: bool = False,
) -> Persistent: ...
def force_schedule(schedule: str | None) -> str | None: ...
def forced_schedule() -> str | None: ...

# None where only the op can answer: csrc/bindings/direct.cpp.
def call(
    cell: str,
    input: Any,
    hx: Any,
    dim: int,
    parameters: Any,
    names: list[str] | tuple[str, ...],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any,
    reset: Any,
    reset_to_initial: bool,
    /,
) -> Any: ...
def call_frozen(
    cell: str,
    input: Any,
    hx: Any,
    dim: int,
    packed: list[Any],
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any,
    reset: Any,
    reset_to_initial: bool,
    /,
) -> Any: ...
def backward(
    needs: tuple[bool, ...],
    d_output: Any,
    d_h_n: Any,
    d_c_n: Any,
    cell: str,
    input: Any,
    h0: Any,
    c0: Any,
    weights: list[Any] | tuple[Any, ...],
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    lengths: Any,
    reset: Any,
    reset_to_initial: bool,
    saved: Any,
    /,
) -> Any: ...
def allow_direct(
    tensor: type,
    parameter: type,
    exchange: object,
    is_neg: Callable[[Any], bool],
    probes: tuple[Callable[[], object], ...],
    forward_ad: object,
    record: Callable[..., Any],
    /,
) -> bool: ...
