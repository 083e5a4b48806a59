"""T5X's own Adafactor, step by step: parameters, second moments and decay rates it produced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from softprompt_dist.config import OptimizerConfig
from softprompt_dist.run.optimizer import (
    T5XAdafactor,
    build_optimizer,
    learning_rate_at,
    optimizer_from_tensors,
    optimizer_to_tensors,
)

DATA = Path(__file__).parent / "data" / "adafactor"
LATE = {"start_step": 1_100_000}
SMALL_VARIANTS = {
    "start0": {},
    "start1100000": LATE,
    "start1100000_offset1100000": {**LATE, "step_offset": 1_100_000},
    "start0_warmup10": {"warmup_steps": 10},
    "start0_noclip": {"clipping_threshold": None},
    "start0_clip0p5": {"clipping_threshold": 0.5},
    "start0_nowd": {"weight_decay": 0.0},
    "start0_paramscale": {"multiply_by_parameter_scale": True},
}
STARTS = {"start0": {}, "start1100000": LATE}


def read(name: str) -> dict[str, NDArray[np.float32]]:
    with np.load(DATA / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def run(config, initial, gradients, *, stop_and_restore_at=None):
    """Parameters after each update [updates, P, D], and the final state."""
    parameter = nn.Parameter(torch.tensor(initial))
    optimizer = build_optimizer(config, [parameter])
    history = []
    for update, gradient in enumerate(gradients):
        if update == stop_and_restore_at:
            tensors = optimizer_to_tensors(optimizer)
            parameter = nn.Parameter(parameter.detach().clone())
            optimizer = build_optimizer(config, [parameter])
            optimizer_from_tensors(optimizer, tensors)
        optimizer.param_groups[0]["lr"] = learning_rate_at(config, update)
        parameter.grad = torch.tensor(gradient).float()
        optimizer.step()
        history.append(parameter.detach().clone())
    return torch.stack(history).numpy(), optimizer_to_tensors(optimizer)


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_small_prompt_follows_the_original_for_forty_updates(variant):
    expected = read("adafactor_p8h16")
    config = OptimizerConfig(**SMALL_VARIANTS[variant])

    params, state = run(config, expected["init"], expected["grads"])

    np.testing.assert_allclose(params, expected[f"params_{variant}"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(state["0.v"], expected[f"v_final_{variant}"], rtol=1e-5)


@pytest.mark.parametrize("variant", SMALL_VARIANTS)
def test_learning_rates_are_the_original_ones(variant):
    config = OptimizerConfig(**SMALL_VARIANTS[variant])

    rates = [learning_rate_at(config, update) for update in range(40)]

    np.testing.assert_allclose(rates, read("adafactor_p8h16")[f"lr_{variant}"], rtol=1e-6)


@pytest.mark.parametrize(("start", "first_step"), [("start0", 0), ("start1100000", 1_100_000)])
def test_decay_rates_are_the_original_ones_to_the_bit(start, first_step):
    expected = read("adafactor_p8h16")[f"beta2_{start}"]
    one = np.ones((1, 1, 1), dtype=np.float32)

    moments = [
        run(OptimizerConfig(start_step=first_step + update), one[0], one)[1]["0.v"]
        for update in range(40)
    ]

    # From a moment of zero and a gradient of one, what is left is 1 - beta2.
    np.testing.assert_array_equal(torch.cat(moments).flatten(), np.float32(1) - expected)


@pytest.mark.parametrize("start", STARTS)
def test_usual_length_keeps_a_full_second_moment(start):
    inputs = read("adafactor_p100h64_inputs")
    first = read(f"adafactor_p100h64_{start}_steps01_20")
    second = read(f"adafactor_p100h64_{start}_steps21_40")

    params, state = run(OptimizerConfig(**STARTS[start]), inputs["init"], inputs["grads"])

    expected = np.concatenate([first["params"], second["params"]])
    np.testing.assert_allclose(params, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(state["0.v"], second["v_final"], rtol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_length_127_is_the_last_that_is_not_factored(start):
    expected = read(f"adafactor_boundary_p127h130_{start}")

    params, state = run(OptimizerConfig(**STARTS[start]), expected["init"], expected["grads"])

    np.testing.assert_allclose(params, expected["params"], rtol=0, atol=1e-4)
    rows = state["0.v"][:4]
    np.testing.assert_allclose(rows, expected["v_final_rows0_3"], rtol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_prompt_with_both_axes_large_is_factored(start):
    expected = read(f"adafactor_factored_p130h144_{start}")

    params, state = run(OptimizerConfig(**STARTS[start]), expected["init"], expected["grads"])

    np.testing.assert_allclose(params, expected["params"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(state["0.v_row"], expected["v_row_final"], rtol=1e-5)
    np.testing.assert_allclose(state["0.v_col"], expected["v_col_final"], rtol=1e-5)


@pytest.mark.parametrize("start", STARTS)
def test_factored_update_does_not_depend_on_orientation(start):
    expected = read(f"adafactor_factored_p130h144_{start}")
    gradients = expected["grads"].transpose(0, 2, 1)

    params, _ = run(OptimizerConfig(**STARTS[start]), expected["init"].T.copy(), gradients)

    turned = expected["params"].transpose(0, 2, 1)
    np.testing.assert_allclose(params, turned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("start", STARTS)
def test_one_axis_gives_the_same_update_as_a_matrix_of_one_row(start):
    expected = read("adafactor_p8h16")
    config = OptimizerConfig(**STARTS[start])
    vectors = expected["grads"].reshape(40, -1)

    flat, _ = run(config, expected["init"].reshape(-1), vectors)

    small = expected[f"params_{start}"].reshape(40, -1)
    np.testing.assert_allclose(flat, small, rtol=0, atol=1e-5)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("name", ["adafactor", "adamw"])
@pytest.mark.parametrize("file", ["adafactor_p8h16", "adafactor_factored_p130h144_start0"])
def test_resume_in_the_middle_is_bitwise_equal(start, name, file):
    given = read(file)
    config = OptimizerConfig(name=name, warmup_steps=3, **STARTS[start])
    middle = len(given["grads"]) // 2

    straight, end = run(config, given["init"], given["grads"])
    resumed, resumed_end = run(config, given["init"], given["grads"], stop_and_restore_at=middle)

    np.testing.assert_array_equal(straight, resumed)
    assert end.keys() == resumed_end.keys()
    assert all(torch.equal(end[key], resumed_end[key]) for key in end)


def test_default_settings_are_the_papers():
    expected = read("adafactor_p8h16")
    parameter = nn.Parameter(torch.tensor(expected["init"]))
    optimizer = T5XAdafactor([parameter], 0.3, weight_decay=1e-5)

    parameter.grad = torch.tensor(expected["grads"][0])
    optimizer.step()

    np.testing.assert_allclose(parameter.detach(), expected["params_start0"][0], atol=1e-5)
