import torch

from softprompt_dist.prompt.module import SoftPrompt


def test_every_row_of_a_batch_gets_the_prompt_in_the_activations_dtype():
    initial = torch.randn(3, 4)
    prompt = SoftPrompt(initial)

    rows = prompt(2, torch.bfloat16)

    assert rows.shape == (2, 3, 4)
    assert rows.dtype == torch.bfloat16
    assert all(torch.equal(row, initial.bfloat16()) for row in rows)


def test_gradient_is_fp32_and_summed_over_the_batch():
    prompt = SoftPrompt(torch.zeros(3, 4))

    prompt(5, torch.bfloat16).sum().backward()

    assert torch.equal(prompt.weight.grad, torch.full((3, 4), 5.0))


def test_rows_are_summed_in_fp32_also_for_bf16_activations():
    prompt = SoftPrompt(torch.zeros(3, 4))
    generator = torch.Generator().manual_seed(0)
    gradient_BPD = torch.randn(64, 3, 4, generator=generator).bfloat16()

    prompt(64, torch.bfloat16).backward(gradient_BPD)

    # bf16 has 8 bits: a sum of 64 such terms would be off by some 1e-2.
    expected = gradient_BPD.double().sum(dim=0).float()
    torch.testing.assert_close(prompt.weight.grad, expected, rtol=1e-5, atol=1e-5)


def test_prompt_is_the_only_state_and_a_copy_in_fp32():
    initial = torch.ones(3, 4, dtype=torch.bfloat16)
    prompt = SoftPrompt(initial)

    initial.zero_()

    assert list(prompt.state_dict()) == ["weight"]
    assert prompt.weight.dtype == torch.float32
    assert torch.equal(prompt.weight.detach(), torch.ones(3, 4))
