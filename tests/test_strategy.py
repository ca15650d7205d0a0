"""How threads share a call: the choice as a function of sizes, its reasons, and forcing another."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from processes import output_of
from scans import assert_same, everything, make_arguments

import fused_rnn
from fused_rnn import functional, strategy
from fused_rnn.reference import Controls
from fused_rnn.strategy import Plan, describe_schedule, forced_schedule

_C = pytest.importorskip("fused_rnn._C")
SPLITS = ("none", "rows", "units", "layers")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log speaks of a quiet machine, whatever this one is."""
    monkeypatch.setattr(_C, "busy", lambda: False)


def plan(T: int, B: int, H: int, **options: Any) -> Plan:
    return _C.strategy("lstm", T, B, H, H, **{"threads": 2, "l2": MIB // 2} | options)


@pytest.mark.parametrize(
    ("split", "sizes", "options"),
    [
        ("none", (1, 1, 8), {}),
        ("none", (1, 1, 8), {"directions": 2}),
        ("none", (100, 1, 64), {"threads": 1}),
        ("none", (100, 1, 32), {}),
        ("rows", (50, 16, 128), {}),
        ("rows", (100, 2, 32), {}),
        ("rows", (50, 3, 512), {"proj": 64}),
        ("units", (50, 1, 256), {}),
        ("units", (50, 1, 96), {}),
        ("units", (50, 5, 256), {}),
        ("units", (50, 5, 256), {"directions": 2, "threads": 4}),
        ("rows", (50, 6, 256), {}),
        ("units", (50, 8, 256), {"rows": 200}),  # ragged: four at a step
        ("rows", (50, 8, 64), {"rows": 200}),
        ("units", (1, 1, 1024), {}),
        ("layers", (500, 1, 64), {"layers": 2}),
        ("rows", (500, 32, 64), {"layers": 2}),
        ("units", (20, 1, 96), {"layers": 2}),
        ("none", (20, 1, 32), {"layers": 2}),
        ("none", (500, 1, 64), {"layers": 2, "directions": 2}),
    ],
)
@pytest.mark.parametrize("backward", [False, True])
def test_the_split_that_is_chosen(
    split: str, sizes: tuple[int, int, int], options: dict[str, Any], backward: bool
) -> None:
    chosen = plan(*sizes, **options, backward=backward)
    assert chosen["split"] == split
    assert chosen["possible"]
    assert chosen["reason"]
    # The others have a reason against them; against one thread there is none but that a split pays.
    others = {"rows", "units", "layers"} - {split}
    assert set(chosen["against"]) - {"none"} == others
    assert split in strategy.describe(chosen)


def test_barriers_are_weighed_against_what_else_there_is() -> None:
    assert plan(50, 2, 96)["split"] == "rows"
    assert plan(50, 1, 96, layers=2)["split"] == "layers"
    # A step with norms has three of them.
    assert _C.strategy("layer_norm_lstm", 50, 1, 96, 96, threads=2)["split"] == "none"
    assert _C.strategy("layer_norm_lstm", 50, 1, 256, 256, threads=2)["split"] == "units"
    assert _C.strategy("layer_norm_lstm", 50, 4, 128, 128, threads=2)["split"] == "rows"
    assert plan(50, 4, 128)["split"] == "units"


def test_two_directions_have_a_thread_each_where_the_call_is_worth_it() -> None:
    assert plan(100, 1, 32, directions=2)["threads"] == 2
    assert plan(1, 1, 8, directions=2)["threads"] == 1
    assert plan(100, 1, 32, directions=2, threads=1)["threads"] == 1
    assert plan(50, 64, 128, directions=2, threads=8)["threads"] == 8
    assert plan(50, 64, 128, directions=2, threads=7)["threads"] == 6


@pytest.mark.parametrize("position", range(4))
def test_sizes_of_nothing_raise(position: int) -> None:
    sizes = [3, 3, 3, 3]
    sizes[position] = 0
    with pytest.raises(ValueError, match="must be at least 1"):
        _C.strategy("lstm", *sizes)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_no_more_threads_than_there_are_parts(threads: int) -> None:
    for sizes, options in (((9, 3, 20), {}), ((50, 1, 256), {}), ((500, 1, 64), {"layers": 3})):
        for split in SPLITS:
            with fused_rnn.force_split(split):
                chosen = plan(*sizes, threads=threads, **options)
            parts = {"none": 1, "rows": sizes[1], "units": -(-sizes[2] // 16), "layers": 3}[split]
            assert 1 <= chosen["threads"] <= min(threads, parts)


def test_large_batches_are_walked_in_blocks() -> None:
    assert plan(10, 64, 64, threads=1)["blocks"] == 1
    assert plan(10, 1797, 64, threads=1)["blocks"] == 29
    assert plan(10, 1797, 64, threads=2)["blocks"] == 15
    assert plan(10, 1797, 64)["chunk_steps"] == 1
    assert plan(10, 4, 64, threads=1)["chunk_steps"] == 10


@pytest.mark.parametrize("B", [1, 7, 300, 1797])
def test_the_sums_over_time_do_not_know_the_threads(B: int) -> None:
    plans = [plan(70, B, 96, threads=n, layers=2, backward=True) for n in (1, 2, 3, 8, 64)]
    kept = ("blocks", "chunk_steps", "pack_ih", "pack_hh")
    assert len({tuple(p[key] for key in kept) for p in plans}) == 1


def packing(*sizes: int, **options: Any) -> tuple[str, str]:
    chosen = plan(*sizes, **options)
    return chosen["pack_ih"], chosen["pack_hh"]


def test_packing_looks_at_the_caches() -> None:
    # One sequence: packed weights stream faster, but not at once.
    assert packing(50, 1, 512)[1] == "weights"
    assert packing(10, 1, 512)[1] == "nothing"
    # Few rows of a weight beyond L2 do not pay for the copy.
    assert packing(10, 2, 256, l2=2 * MIB)[1] == "weights"
    assert packing(10, 2, 256, l2=MIB // 2)[1] == "nothing"
    # 8 MiB of weights fit L2 or do not; two threads that share them have half each.
    assert not plan(50, 8, 512, l2=8 * MIB)["fetch_weights"]
    assert plan(50, 8, 512, l2=8 * MIB - 1)["fetch_weights"]
    assert plan(50, 8, 512, l2=8 * MIB - 1, backward=True)["fetch_weights"]
    assert not plan(50, 4, 512, l2=4 * MIB)["fetch_weights"]
    assert plan(50, 4, 512, l2=4 * MIB, threads=1)["fetch_weights"]


def test_rows_are_packed_where_weights_are_used_too_seldom() -> None:
    assert packing(1, 16, 256) == packing(4, 16, 256) == ("rows", "rows")
    assert plan(1, 16, 256)["split"] == plan(4, 16, 256)["split"] == "units"
    assert plan(1, 64, 80)["split"] == "rows"  # not well in five parts
    assert packing(5, 16, 256) == ("weights", "weights")
    assert packing(1, 8, 256) == packing(8, 1, 256) == ("nothing", "nothing")  # too few
    assert packing(1, 20, 256) == ("nothing", "nothing")  # vectors of 16, half empty
    assert packing(1, 24, 256) == ("rows", "rows")
    assert packing(1, 65, 256) == ("weights", "weights")
    # Of all steps at once, a large W_ih is used once.
    assert packing(50, 1, 512) == ("rows", "weights")
    assert packing(50, 1, 64) == packing(80, 1, 512) == ("weights", "weights")
    assert packing(1, 16, 256, proj=64) == ("rows", "weights")
    assert packing(1, 16, 512, weight_bytes=2) == ("nothing", "nothing")
    assert packing(1, 16, 256, backward=True) == ("nothing", "nothing")


def test_what_is_packed_is_described() -> None:
    assert "(packed: x and h; " in strategy.describe(plan(1, 16, 256))
    assert "(packed: W_ih and W_hh; " in strategy.describe(plan(50, 8, 512, l2=8 * MIB))
    text = strategy.describe(plan(50, 8, 512, l2=8 * MIB - 1))
    assert "(packed: W_ih and W_hh, fetched ahead; " in text
    assert "(packed: nothing; " in strategy.describe(plan(1, 1, 1024, l2=MIB))


@pytest.mark.parametrize("T", [1, 2, 9, 70])
@pytest.mark.parametrize("B", [1, 4, 16, 64, 300])
def test_whether_anything_is_packed_does_not_depend_on_threads(T: int, B: int) -> None:
    for H in 40, 300:
        plans = [packing(T, B, H, threads=n, layers=2) for n in (1, 2, 3, 8)]
        assert len({tuple(what == "nothing" for what in p) for p in plans}) == 1


FORCED = [
    ((40, 1, 5, 33), {"layers": 3}),
    ((100, 3, 40, 20), {"layers": 2}),
    ((37, 20, 9, 48), {"layers": 4}),
    ((7, 300, 5, 20), {"layers": 2}),
    ((12, 20, 9, 48), {"bidirectional": True}),
    ((4, 24, 9, 48), {"layers": 3}),  # rows are packed, not weights
    ((0, 0, 6, 40), {"batch_sizes": (9, 9, 7, 7, 3, 3, 1), "layers": 3}),
    ((0, 0, 6, 20), {"batch_sizes": tuple(range(40, 0, -1))}),  # shared anew in every chunk
    ((0, 0, 6, 20), {"batch_sizes": (300, 290, 40, 40, 1)}),  # ... and in blocks
]


@pytest.mark.parametrize("cell", sorted(_C.cells()))
@pytest.mark.parametrize(("sizes", "options"), FORCED, ids=str)
def test_every_split_gives_the_same_bits(
    cell: str, sizes: tuple[int, ...], options: dict[str, Any]
) -> None:
    args = make_arguments(cell, *sizes, **options)
    torch.set_num_threads(1)
    expected = everything(args)
    ran = 0
    for threads in (2, 5):
        torch.set_num_threads(threads)
        for split in SPLITS:
            with fused_rnn.force_split(split):
                try:
                    actual = everything(args)
                except RuntimeError as error:
                    assert f"the split '{split}' is forced, but " in str(error)  # noqa: PT017
                    continue
            assert_same(actual, expected)
            ran += 1
    assert ran >= 4


@pytest.mark.parametrize(
    ("split", "threads", "shape", "options", "why"),
    [
        ("rows", 2, (5, 1, 6), {}, "there is one sequence"),
        ("units", 2, (5, 4, 6), {}, "there are too few units"),
        ("units", 2, (5, 4, 64), {"proj_size": 8}, "a projection reads all units of a step"),
        ("layers", 2, (5, 4, 6), {}, "there is one layer"),
        (
            "layers",
            2,
            (5, 4, 6),
            {"num_layers": 2, "bidirectional": True},
            "a layer starts after both directions of the one below",
        ),
        ("rows", 1, (5, 4, 6), {}, "there is one thread per direction"),
    ],
)
def test_a_forced_split_that_cannot_run_says_what_the_log_says(
    split: str,
    threads: int,
    shape: tuple[int, int, int],
    options: dict[str, Any],
    why: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    torch.set_num_threads(threads)
    T, B, H = shape
    layer = fused_rnn.LSTM(3, H, **options)
    x = torch.randn(T, B, 3)
    with caplog.at_level(logging.DEBUG, "fused_rnn"):
        layer(x)
    assert f"not {split}: {why}" in caplog.text
    with (
        fused_rnn.force_split(split),
        pytest.raises(RuntimeError, match=f"the split '{split}' is forced, but {why}"),
    ):
        layer(x)
    layer(x)


def test_the_log_tells_both_ways_and_only_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    torch.set_num_threads(2)
    layer = fused_rnn.GRU(8, 40)
    layer(torch.randn(30, 20, 8))
    assert not caplog.records
    with caplog.at_level(logging.DEBUG, "fused_rnn"):
        layer(torch.randn(30, 20, 8))
    texts = [record.getMessage() for record in caplog.records if "strategy" in record.name]
    assert [text.split(":")[0] for text in texts] == [
        "gru forward T=30 B=20 I=8 H=40",
        "gru backward T=30 B=20 I=8 H=40",
    ]
    assert all("rows, 2 threads: each thread has sequences of its own" in text for text in texts)


ONE_CORE = """
import os
# Before there are threads, which inherit it.
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import fused_rnn, torch
from fused_rnn import _C
from scans import assert_same, everything, make_arguments
lengths = tuple(sorted((40 - k % 37 for k in range(60)), reverse=True))
busy = 0
for cell in sorted(_C.cells()):
    for sizes, options, splits in (
        ((60, 2, 40, 192), {"layers": 2}, ("units", "rows")),
        ((40, 6, 20, 192), {"layers": 2, "bidirectional": True}, ("units", "rows")),
        ((0, 0, 20, 96), {"batch_sizes": lengths, "layers": 2}, ("units", "rows")),
        ((12, 300, 8, 64), {}, ("rows",)),
    ):
        args = make_arguments(cell, *sizes, **options)
        torch.set_num_threads(1)
        expected = everything(args)
        torch.set_num_threads(8)
        for split in splits:
            with fused_rnn.force_split(split):
                assert_same(everything(args), expected)
            busy += _C.busy()
assert busy > 10, busy  # taken over, or late at the end
"""


def test_where_threads_take_over_from_one_another_the_bits_are_the_same() -> None:
    """Of eight threads on one core each loses seven eighths of its time to waiting."""
    output_of(ONE_CORE)


MS = 1_000_000


def test_a_call_that_waited_for_a_core_keeps_the_next_ones_on_one_thread() -> None:
    pressure = _C.Pressure()
    assert not pressure.high(0)
    pressure.report(10 * MS, total=8 * MS, lost=6 * MS)
    assert pressure.high(10 * MS)
    assert pressure.high(13 * MS)
    assert not pressure.high(14 * MS)  # then one call tries again
    assert plan(50, 1, 256, busy=True)["reason"] == "other programs keep the cores busy"
    assert plan(50, 1, 256, busy=True)["threads"] == 1


def test_pauses_grow_while_the_machine_stays_busy_and_end_when_it_is_quiet() -> None:
    pressure = _C.Pressure()
    now, pauses = 0, []
    for _ in range(9):
        now += 8 * MS
        pressure.report(now, total=8 * MS, lost=6 * MS)
        start = now
        while pressure.high(now):
            now += MS
        pauses.append((now - start) // MS)
    assert pauses == [4, 8, 16, 32, 64, 128, 256, 256, 256]
    for _ in range(6):
        now += 8 * MS
        pressure.report(now, total=8 * MS, lost=MS)
        assert not pressure.high(now)
    now += 8 * MS
    pressure.report(now, total=8 * MS, lost=6 * MS)
    assert not pressure.high(now + 4 * MS)


def test_a_call_that_went_on_alone_is_not_counted_again_when_it_ends() -> None:
    pressure = _C.Pressure()
    pressure.report(10 * MS, total=6 * MS, lost=5 * MS)  # the thread that took over
    pressure.report(11 * MS, total=7 * MS, lost=6 * MS)  # the end of the same call
    assert not pressure.high(14 * MS)  # no longer pause
    pressure.report(12 * MS, total=8 * MS, lost=0)
    pressure.report(20 * MS, total=6 * MS, lost=5 * MS)
    assert pressure.high(27 * MS)  # nor a shorter one after the next loss


@pytest.mark.parametrize(
    ("total", "lost"),
    [(8 * MS, 5 * MS), (MS // 10, MS // 10), (8 * MS, 0)],
    ids=["less than two thirds", "no time slice", "nothing"],
)
def test_ordinary_waiting_is_no_pressure(total: int, lost: int) -> None:
    pressure = _C.Pressure()
    pressure.report(0, total, lost)
    assert not pressure.high(1)


def test_an_unknown_split_is_refused_and_the_choice_returns() -> None:
    with pytest.raises(ValueError, match="none, rows, units, layers or None, got 'columns'"):
        fused_rnn.force_split("columns").__enter__()
    with fused_rnn.force_split("units"):
        with fused_rnn.force_split(None):
            assert plan(50, 16, 128)["split"] == "rows"
        assert plan(50, 16, 128)["split"] == "units"
    assert plan(50, 16, 128)["split"] == "rows"


def test_the_environment_forces_a_split() -> None:
    code = (
        "import fused_rnn; print(fused_rnn._C.strategy('lstm', 50, 16, 9, 64, threads=2)['split'])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"FUSED_RNN_SPLIT": "units"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "units"


H200 = {"sms": 132, "shared_per_block": 227 * 1024}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_persistent_blocks_share_units_and_sequences(cell: str, dtype: str, backward: bool) -> None:
    for B, H in itertools.product((1, 7, 16, 64, 200), (8, 64, 128, 256, 512, 776)):
        plan = _C.schedule(cell, B, H, dtype, **H200, backward=backward)
        assert plan["possible"], plan
        assert 0 < plan["shared_bytes"] <= H200["shared_per_block"]
        assert plan["blocks"] * plan["groups"] <= H200["sms"]
        # All units and sequences have a block, and no block has none.
        assert (plan["blocks"] - 1) * plan["units"] < H <= plan["blocks"] * plan["units"]
        assert (plan["groups"] - 1) * plan["rows"] < B <= plan["groups"] * plan["rows"]
        assert plan["microseconds"] > 0


@pytest.mark.parametrize(
    ("B", "H", "dtype", "backward", "chosen"),
    [
        (1, 128, "bfloat16", False, True),
        (64, 1024, "float16", False, True),
        (64, 1024, "float16", True, True),
        (256, 1024, "bfloat16", False, False),
        (256, 1024, "bfloat16", True, False),
        (16, 512, "float32", False, True),
        (256, 512, "float32", True, False),
    ],
)
def test_persistent_is_chosen_where_a_step_is_shorter_than_its_launches(
    B: int, H: int, dtype: str, backward: bool, chosen: bool
) -> None:
    plan = _C.schedule("lstm", B, H, dtype, **H200, backward=backward)
    assert plan["chosen"] == chosen, plan
    name = "persistent: " if chosen else "stepwise; not persistent: "
    assert describe_schedule(plan).startswith(f"{name}a step is estimated to take ")
    assert describe_schedule(plan, "persistent") == "persistent: forced"


def test_more_sequences_take_no_less_time() -> None:
    for H, dtype in itertools.product((64, 512, 1024), ("float32", "bfloat16")):
        times = [_C.schedule("gru", B, H, dtype, **H200)["microseconds"] for B in (1, 16, 64, 256)]
        assert times == sorted(times)


@pytest.mark.parametrize(
    ("H", "dtype", "facts", "why"),
    [
        (2048, "bfloat16", {}, "the weights do not fit into the shared memory of all SMs"),
        (100, "float32", {}, "the number of units is no multiple of 8"),
        (128, "float64", {}, "there is no kernel for float64"),
        (128, "float32", {"ragged": True}, "the sequences have lengths of their own"),
        (128, "float32", {"projected": True}, "h is projected"),
        (128, "float32", {"controlled": True}, "resets, regularisers and all cell states"),
    ],
)
def test_what_is_not_persistent_has_a_reason(
    H: int, dtype: str, facts: dict[str, bool], why: str
) -> None:
    for backward in (False, True):
        plan = _C.schedule("lstm", 16, H, dtype, **H200, **facts, backward=backward)
        assert not plan["possible"]
        assert not plan["chosen"]
        assert why in plan["against"]
        assert describe_schedule(plan) == f"stepwise; not persistent: {plan['against']}"


@pytest.mark.parametrize(
    ("cell", "B", "H", "dtype", "training", "faster"),
    [
        ("lstm", 16, 512, torch.bfloat16, True, False),
        ("lstm", 16, 1024, torch.float16, True, True),  # cuDNN has persistent kernels of its own
        ("lstm", 16, 512, torch.float16, True, False),
        ("lstm", 16, 512, torch.float16, False, True),
        ("gru", 16, 512, torch.float16, True, False),
        ("gru", 16, 128, torch.float32, False, True),
        ("gru", 16, 128, torch.float32, True, False),
        ("lstm", 16, 2048, torch.bfloat16, True, True),
        ("rnn_tanh", 16, 512, torch.float32, True, True),
    ],
)
def test_where_cudnn_is_faster(
    cell: str,
    B: int,
    H: int,
    dtype: torch.dtype,
    training: bool,
    faster: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(strategy, "gpu_sizes", lambda gpu: tuple(H200.values()))
    found = strategy.cudnn_is_faster.__wrapped__(0, cell, B, H, dtype, training)
    assert found == faster


def test_the_log_names_the_schedule_of_a_call_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(strategy, "gpu_sizes", lambda gpu: (132, 227 * 1024))
    layer = fused_rnn.LSTM(4, 64)
    x, sizes = torch.zeros(6, 3, 4), torch.tensor([3, 2, 1])
    call = functional._Call("lstm", x, None, None, None, [*layer.parameters()], 1, False, False)
    with torch.no_grad(), caplog.at_level(logging.DEBUG, "fused_rnn.strategy"):
        functional._log_schedule(call)
        with fused_rnn.force_schedule("persistent"):
            functional._log_schedule(call)
        functional._log_schedule(call._replace(input=x[:, 0], batch_sizes=sizes))
        functional._log_schedule(call._replace(controls=Controls(zoneout_h=0.1)))
    plans = [text.partition(": ")[2] for text in caplog.messages]
    chosen = _C.schedule("lstm", 3, 64, "float32", **H200)
    assert plans == [
        strategy.describe_schedule(chosen),
        "persistent: forced",
        "stepwise; not persistent: the sequences have lengths of their own",
        "stepwise; not persistent: resets, regularisers and all cell states need a kernel per step",
    ]
    assert all(text.startswith("lstm forward B=3 H=64: ") for text in caplog.messages)


def test_the_log_names_the_schedule_of_both_ways(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(strategy, "gpu_sizes", lambda gpu: tuple(H200.values()))
    weights = [*fused_rnn.GRU(4, 2048).parameters()]
    call = functional._Call("gru", torch.zeros(6, 3, 4), None, None, None, weights, 1, False, False)
    with caplog.at_level(logging.DEBUG, "fused_rnn.strategy"):
        functional._log_schedule(call)
    ways = [text.partition(": ")[0] for text in caplog.messages]
    assert ways == ["gru forward B=3 H=2048", "gru backward B=3 H=2048"]


def test_an_unknown_schedule_is_refused_and_the_choice_returns() -> None:
    with pytest.raises(ValueError, match="stepwise, persistent or None, got 'eager'"):
        fused_rnn.force_schedule("eager").__enter__()
    with fused_rnn.force_schedule("persistent"):
        with fused_rnn.force_schedule(None):
            assert forced_schedule() is None
        assert forced_schedule() == "persistent"
    assert forced_schedule() is None


def test_the_environment_forces_a_schedule() -> None:
    code = "from fused_rnn.strategy import forced_schedule; print(forced_schedule())"
    assert output_of(code, FUSED_RNN_SCHEDULE="stepwise").strip() == "stepwise"
