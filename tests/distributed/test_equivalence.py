"""One prompt, one batch, one set of weights: the same loss and gradient whoever computes them.

The reference is plain Hugging Face T5 with concatenated embeddings; then PEFT; then ours, on one
rank
and two, replicated and ZeRO-3. The T5's lm_head differs from its embedding, since a loader that
ties them would pass unnoticed otherwise.
"""

import equivalence
import pytest
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file, save_file

from tests.models import make_llama, make_t5, save_model

P, D = 6, 32
TOLERANCE = 1e-5
CELLS = [("replicated", 1), ("replicated", 2), ("zero3", 2)]
MODELS = {"t5": make_t5, "llama": make_llama}


@pytest.fixture(scope="module")
def prompt_PD():  # noqa: N802
    return torch.randn(P, D, generator=torch.Generator().manual_seed(3))


def padded_batch():
    """EXAMPLES as plain tensors, padded on the right."""

    def pad(rows, value):
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    input_ids = pad([e.input_ids for e in equivalence.EXAMPLES], 0)
    labels = pad([e.target_ids for e in equivalence.EXAMPLES], -100)
    return input_ids, (input_ids != 0).long(), labels


def plain_t5(prompt_PD):
    model = make_t5()
    assert not torch.equal(model.lm_head.weight, model.shared.weight)
    prompt = prompt_PD.clone().requires_grad_(True)
    input_ids, mask, labels = padded_batch()
    rows = len(input_ids)
    loss = model(
        inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), model.shared(input_ids)], dim=1),
        attention_mask=torch.cat([torch.ones(rows, P, dtype=torch.long), mask], dim=1),
        labels=labels,
    ).loss
    loss.backward()
    return loss.item(), prompt.grad


def plain_llama(prompt_PD):
    """Row by row, without any padding."""
    model = make_llama()
    prompt = prompt_PD.clone().requires_grad_(True)
    total = num_tokens = 0
    for example in equivalence.EXAMPLES:
        ids = torch.tensor([example.input_ids + example.target_ids])
        embeds = torch.cat([prompt[None], model.get_input_embeddings()(ids)], dim=1)
        start = P + len(example.input_ids)
        logits = model(inputs_embeds=embeds).logits[0, start - 1 : -1]
        targets = torch.tensor(example.target_ids)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        num_tokens += len(targets)
    (total / num_tokens).backward()
    return (total / num_tokens).item(), prompt.grad


def peft_t5(prompt_PD):
    config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, num_virtual_tokens=P, num_transformer_submodules=1
    )
    model = get_peft_model(make_t5(), config).eval()
    weight = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        weight.copy_(prompt_PD)
    input_ids, mask, labels = padded_batch()
    loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    return loss.item(), weight.grad


def assert_same(ours, reference):
    loss, gradient = ours
    assert loss == pytest.approx(reference[0], abs=TOLERANCE)
    assert reference[1].abs().max() > 1e-3
    torch.testing.assert_close(gradient, reference[1], rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: f"{cell[0]}-{cell[1]}")
def cell(request, run_functions, prompt_PD, tmp_path_factory):
    """What every rank of one way to run says of each model: one launch for all models."""
    sharding, world_size = request.param
    folder = tmp_path_factory.mktemp("equivalence")
    save_file({"prompt": prompt_PD}, folder / "prompt.safetensors")
    return run_functions(
        equivalence.gradients_on_this_rank,
        world_size,
        folders={name: save_model(make(), folder / name) for name, make in MODELS.items()},
        prompt_file=folder / "prompt.safetensors",
        sharding=sharding,
        timeout=240,
    )


def test_peft_and_plain_hugging_face_agree(prompt_PD):
    assert_same(peft_t5(prompt_PD), plain_t5(prompt_PD))


@pytest.mark.parametrize(("name", "plain"), [("t5", plain_t5), ("llama", plain_llama)])
def test_every_cell_gives_the_reference_gradient(cell, prompt_PD, name, plain):
    results = [said[name] for said in cell]
    for result in results:
        gradient = load_file(result["gradient_file"])["gradient"]
        assert_same((result["loss"], gradient), plain(prompt_PD))
        assert result["num_tokens"] == sum(len(e.target_ids) for e in equivalence.EXAMPLES)
    assert len({result["identity"] for result in results}) == 1


def test_nothing_stays_gathered_after_a_step(cell):
    for said in cell:
        for result in said.values():
            assert (result["live_elements"] == 0) == (result["sharding"] == "zero3")
