import math

import pytest
import torch

from softprompt_dist.run.loss import token_loss


def test_loss_is_the_sum_over_tokens_that_count():
    logits = torch.zeros(2, 3, 8)
    labels = torch.tensor([[1, 2, -100], [3, -100, -100]])

    loss = token_loss(logits, labels)

    assert loss.total.item() == pytest.approx(3 * math.log(8))
    assert int(loss.num_tokens) == 3


def test_padding_changes_nothing_and_gets_no_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, generator=generator, requires_grad=True)
    labels = torch.tensor([[1, 2, 7], [3, -100, -100]])
    apart = [
        token_loss(logits[:1], labels[:1], z_loss=0.1),
        token_loss(logits[1:, :1], labels[1:, :1], z_loss=0.1),
    ]

    loss = token_loss(logits, labels, z_loss=0.1)
    loss.total.backward()

    assert loss.total.item() == pytest.approx(sum(part.total.item() for part in apart))
    assert torch.count_nonzero(logits.grad[1, 1:]) == 0
    assert torch.count_nonzero(logits.grad[0]) == logits.grad[0].numel()


def test_batch_of_padding_only_is_zero_and_differentiable():
    logits = torch.randn(1, 2, 4, requires_grad=True)

    loss = token_loss(logits, torch.full((1, 2), -100), z_loss=1e-4, label_smoothing=0.1)
    loss.total.backward()

    assert loss.total.item() == 0.0
    assert int(loss.num_tokens) == 0
    assert torch.count_nonzero(logits.grad) == 0


def test_bf16_logits_are_summed_in_fp32():
    logits = torch.randn(4, 64, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.zeros(4, 64, dtype=torch.int64)

    loss = token_loss(logits, labels, z_loss=1e-4)

    assert loss.total.dtype == torch.float32
    assert loss.total.item() == pytest.approx(
        float(token_loss(logits.float(), labels, z_loss=1e-4).total), rel=1e-6
    )


def test_perfect_prediction_of_smoothed_labels_has_loss_zero():
    smoothing, vocabulary = 0.1, 5
    probabilities = torch.full((1, 1, vocabulary), smoothing / (vocabulary - 1))
    probabilities[..., 2] = 1 - smoothing

    loss = token_loss(probabilities.log(), torch.tensor([[2]]), label_smoothing=smoothing)

    assert loss.total.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_gradient_of_many_rows_is_autograd_s_in_fp64(label_smoothing):
    """More rows than are worked on at a time, and not a multiple of it."""
    vocabulary, z_loss = 1000, 1e-2
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 301, vocabulary, generator=generator)).requires_grad_()
    labels = torch.randint(vocabulary, (2, 301), generator=generator)
    labels[:, ::7] = -100
    wide = logits.detach().double().requires_grad_()
    counts = (labels != -100).flatten()
    targets = torch.nn.functional.one_hot(labels.flatten().clamp(min=0), vocabulary).double()
    spread = label_smoothing / (vocabulary - 1)
    targets = targets * (1 - label_smoothing - spread) + spread
    log_z = wide.flatten(0, 1).logsumexp(-1)
    per_token = log_z - (targets * wide.flatten(0, 1)).sum(-1) + z_loss * log_z.square()
    (0.1 * per_token[counts].sum()).backward()

    loss = token_loss(logits, labels, z_loss=z_loss, label_smoothing=label_smoothing)
    (0.1 * loss.total).backward()

    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=1e-8)
