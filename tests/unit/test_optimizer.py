import pytest
import torch
from torch import nn

from softprompt_dist.config import OptimizerConfig
from softprompt_dist.errors import CheckpointError, ConfigError
from softprompt_dist.run.optimizer import (
    T5XAdafactor,
    build_optimizer,
    learning_rate_at,
    optimizer_from_tensors,
    optimizer_to_tensors,
)

SHAPES = ((6,), (3, 5), (130, 140), (2, 130, 140))


def stepped(name="adafactor", shapes=SHAPES, updates=2):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = build_optimizer(OptimizerConfig(name=name), parameters)
    for _ in range(updates):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer, parameters


def test_parameters_of_any_rank_are_each_treated_alone():
    _, together = stepped()

    generator = torch.Generator().manual_seed(0)
    alone = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizers = [build_optimizer(OptimizerConfig(), [parameter]) for parameter in alone]
    for _ in range(2):
        for parameter, optimizer in zip(alone, optimizers, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_moments_are_factored_over_the_two_largest_axes():
    optimizer, _ = stepped()

    shapes = {key: tuple(value.shape) for key, value in optimizer_to_tensors(optimizer).items()}

    assert shapes["0.v"] == (6,)
    assert shapes["1.v"] == (3, 5)
    assert (shapes["2.v_row"], shapes["2.v_col"]) == ((130,), (140,))
    assert (shapes["3.v_row"], shapes["3.v_col"]) == ((2, 130), (2, 140))


def test_batched_matrices_are_normalised_one_by_one():
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(2, 130, 140, generator=generator)
    batched = nn.Parameter(torch.zeros(2, 130, 140))
    single = [nn.Parameter(torch.zeros(130, 140)) for _ in range(2)]
    optimizer = T5XAdafactor([batched, *single], 1.0, clipping_threshold=None)

    batched.grad = gradient.clone()
    single[0].grad, single[1].grad = gradient[0].clone(), gradient[1].clone()
    optimizer.step()

    torch.testing.assert_close(batched.detach(), torch.stack([p.detach() for p in single]))


def test_first_update_moves_every_coordinate_by_the_learning_rate():
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = T5XAdafactor([parameter], 0.3)
    optimizer.param_groups[0]["lr"] = 0.125

    parameter.grad = torch.tensor([[1.0, -2.0, 3.0], [-4e-3, 5e3, 6.0]])
    optimizer.step()

    torch.testing.assert_close(parameter.detach(), -0.125 * parameter.grad.sign())


def test_weight_decay_does_not_depend_on_the_learning_rate():
    parameter = nn.Parameter(torch.full((2, 3), 8.0))
    optimizer = T5XAdafactor([parameter], 1e-12, weight_decay=0.25)

    parameter.grad = torch.ones(2, 3)
    optimizer.step()

    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 6.0))


def test_parameter_of_zeros_still_moves_under_parameter_scaling():
    parameter = nn.Parameter(torch.zeros(4))
    optimizer = T5XAdafactor([parameter], 1.0, multiply_by_parameter_scale=True)

    parameter.grad = torch.ones(4)
    optimizer.step()

    torch.testing.assert_close(parameter.detach(), torch.full((4,), -1e-3))


def test_parameter_without_a_gradient_stays():
    moved, still = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = T5XAdafactor([moved, still], 0.3, weight_decay=0.1)

    moved.grad = torch.ones(3)
    optimizer.step()

    assert torch.equal(still.detach(), torch.ones(3))
    assert not torch.equal(moved.detach(), torch.ones(3))


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_state_survives_tensors_to_the_bit(name):
    optimizer, _ = stepped(name)
    tensors = optimizer_to_tensors(optimizer)
    other, _ = stepped(name, updates=0)

    optimizer_from_tensors(other, tensors)
    again = optimizer_to_tensors(other)

    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert all(again[key].dtype == tensors[key].dtype for key in tensors)
    assert all(int(again[f"{n}.step"]) == 2 for n in range(len(SHAPES)))


def test_tensors_are_copies():
    optimizer, parameters = stepped()
    tensors = optimizer_to_tensors(optimizer)
    before = tensors["1.v"].clone()

    parameters[1].grad = torch.full((3, 5), 100.0)
    optimizer.step()

    assert torch.equal(tensors["1.v"], before)


@pytest.mark.parametrize(
    ("written_by", "shapes"),
    [("adamw", SHAPES), ("adafactor", ((7,), *SHAPES[1:])), ("adafactor", (*SHAPES, (2,)))],
    ids=["other optimiser", "other shape", "more parameters"],
)
def test_state_that_does_not_fit_is_refused_and_changes_nothing(written_by, shapes):
    tensors = optimizer_to_tensors(stepped(written_by, shapes)[0])
    optimizer, _ = stepped()
    before = optimizer_to_tensors(optimizer)

    with pytest.raises(CheckpointError, match="recipe that wrote"):
        optimizer_from_tensors(optimizer, tensors)

    after = optimizer_to_tensors(optimizer)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_warm_up_is_linear_then_constant():
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=4)

    assert [learning_rate_at(config, update) for update in range(6)] == pytest.approx(
        [1e-8, 0.125, 0.25, 0.375, 0.5, 0.5]
    )


def test_offset_beyond_the_start_is_refused():
    with pytest.raises(ConfigError, match="step_offset"):
        build_optimizer(
            OptimizerConfig(start_step=3, step_offset=4), [nn.Parameter(torch.zeros(1))]
        )
