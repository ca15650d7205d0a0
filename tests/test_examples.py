"""The examples learn, and say what is so: shortened runs, held against what needs no network."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import torchrun

import fused_rnn

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """torch.nn with more threads crawls where other programs run: it took a minute for seconds."""
    torch.set_num_threads(1)


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_noisy_sine_beats_naive_predictions(
    cell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "sine.png"
    run = example("noisy_sine")["main"]
    losses = run(["--cell", cell, "--epochs", "200", "--plot", str(plot)])
    assert losses["training"] < 0.1 * losses["before training"]
    assert losses["single-step"] < losses["repeating the last value"]
    assert losses["multi-step"] < losses["the mean of the training part"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"multi-step                     {losses['multi-step']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("layer", ["fused", "torch"])
def test_char_lm_learns_and_writes(
    layer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sample.txt"
    argv = "--steps 60 --hidden 64 --batch 8 --window 32".split()
    module = example("char_lm")
    bits = module["main"]([*argv, "--layer", layer, "--out", str(out)])
    text = module["python_reference"]()
    # Better than any guess that does not look at the text before: its entropy per character.
    frequencies = [text.count(character) / len(text) for character in set(text)]
    entropy = -sum(p * math.log2(p) for p in frequencies)
    assert len(bits) == 60
    assert sum(bits[-10:]) / 10 < entropy < bits[0]
    written = out.read_text(encoding="utf-8")
    assert len(written) == 520
    assert written.startswith(text[:20])
    assert "tokens/s" in capsys.readouterr().out


def test_char_lm_is_the_same_with_either_layer(tmp_path: Path) -> None:
    run = example("char_lm")["main"]
    argv = f"--steps 5 --hidden 16 --batch 4 --window 16 --out {tmp_path / 'x'}".split()
    fused, torch_nn = (run([*argv, "--layer", layer]) for layer in ("fused", "torch"))
    assert fused == pytest.approx(torch_nn, rel=1e-4)


def test_char_lm_starts_the_text_again_at_its_end(tmp_path: Path) -> None:
    source = tmp_path / "short.txt"
    source.write_text("abcdefgh" * 20, encoding="utf-8")
    argv = f"--text {source} --steps 40 --batch 2 --window 16 --hidden 32 --out {tmp_path / 'x'}"
    bits = example("char_lm")["main"](argv.split())
    assert len(bits) == 40
    assert bits[-1] < 0.5 * bits[0]


def test_recurrent_ppo_agrees_with_the_loop(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--steps 20 --envs 3 --features 5 --hidden 16 --episode 5 --repeats 3"
    times = example("recurrent_ppo")["main"](argv.split())
    assert list(times) == ["inference", "training"]
    printed = capsys.readouterr().out
    started = re.search(r"20 steps x 3 environments, (\d+) episodes start;", printed)
    assert started
    assert 0 < int(started[1]) < 60
    for mode, (loop, one) in times.items():
        assert re.search(rf"{mode} +{loop:.2f} ms +{one:.2f} ms +{loop / one:.1f} times", printed)


def test_recurrent_ppo_notices_a_wrong_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its assertion holds for equal layers only: here one forgets to reset."""
    module = example("recurrent_ppo")

    def forgetful(lstm: Any) -> Any:
        return lambda features, state, episode_starts: lstm(features, state)

    monkeypatch.setitem(module["main"].__globals__, "in_one_call", forgetful)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        module["main"]("--steps 20 --envs 3 --hidden 16 --episode 5 --repeats 1".split())


def test_streaming_removes_noise(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--steps 120 --hidden 48 --batch 8 --window 20 --seconds 1"
    results = example("streaming")["main"](argv.split())
    assert results["denoised"] < 0.5 * results["noisy"] < results["before training"]
    printed = capsys.readouterr().out
    assert f"denoised   {results['denoised']:.4f}" in printed
    assert "100 frames of 10 ms, each done in" in printed


def test_data_parallel_learns_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    results = example("data_parallel")["main"]("--steps 60 --batch 32".split())
    assert results["training"] < 0.2 * results["before training"]
    assert results["accuracy"] > 0.9
    assert f"right in {100 * results['accuracy']:.1f} %" in capsys.readouterr().out


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch is built without gloo",
)
def test_data_parallel_learns_in_two_processes() -> None:
    """Whole weights in each, or half of them: the same losses."""
    script, options = str(EXAMPLES / "data_parallel.py"), "--steps 60 --batch 32".split()
    runs = [torchrun(script, *options), torchrun(script, *options, "--sharded")]
    for run in runs:
        assert run.returncode == 0, run.stderr
        (right,) = re.findall(r"right in (.+) % of new waves", run.stdout)
        assert float(right) > 90
    (whole, *losses), (half, *same_losses) = (run.stdout.splitlines() for run in runs)
    assert losses == same_losses
    kept = [re.fullmatch(r"2 processes, (\d+) weights kept in .*", line) for line in (whole, half)]
    assert int(kept[0][1]) == 2 * int(kept[1][1])


def test_wgan_gp_finds_the_distance(capsys: pytest.CaptureFixture[str]) -> None:
    argv = "--steps 100 --hidden 12 --batch 16".split()
    results = example("wgan_gp")["main"](argv)
    assert results["found"] == pytest.approx(results["true"], rel=0.2)
    assert abs(results["before training"] - results["true"]) > 0.5 * results["true"]
    assert f"found            {results['found']:.3f}" in capsys.readouterr().out


def test_wgan_gp_notices_a_lost_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its assertion holds only where the layer's second derivative is there: here it is cut off."""
    module = example("wgan_gp")
    forward = module["Critic"].forward

    def cut_off(critic: Any, waves: Any) -> Any:
        if not isinstance(critic.rnn, fused_rnn.LSTM):
            return forward(critic, waves)
        value = forward(critic, waves)
        (slope,) = torch.autograd.grad(value.sum(), waves, retain_graph=True)
        return (value + (slope * waves).sum((0, 2))) / 2

    monkeypatch.setattr(module["Critic"], "forward", cut_off)
    with pytest.raises(AssertionError, match="Tensor-likes are not close"):
        module["main"](["--steps", "1"])
