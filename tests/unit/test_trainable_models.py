"""Examples that share a row are computed as if each were alone in plain transformers."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from transformers import AutoModelForCausalLM

from softprompt_dist.adaptation.model import CausalModel, LossModel, TrainableT5, recompute_layers
from softprompt_dist.run.loss import token_loss
from tests.lm_corpora import corpus_of, data_of
from tests.models import make_llama, make_t5

VOCABULARY, LENGTH, NUM_ROWS, Z_LOSS = 128, 32, 6, 1e-2
TOLERANCE = 1e-4


def rows(seed=0, longest=30, **settings):
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, 200)
    corpus = corpus_of([generator.integers(10, VOCABULARY, length) for length in lengths])
    data = data_of(corpus, inputs_length=LENGTH, targets_length=LENGTH, **settings)
    return data.rows(data.plan(0, NUM_ROWS), 0, NUM_ROWS)


def lively(model):
    """Attention that prefers some positions to others; dropout would make two passes differ."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "layer_norm" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.25)
    model.config.dropout_rate = 0.0
    return model


@pytest.fixture
def plain():
    model = lively(make_t5(VOCABULARY))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


@pytest.fixture
def trainable(plain):
    model = TrainableT5(plain.config)
    model.load_state_dict(dict(plain.named_parameters()))
    return model


def each_alone(plain, batch):
    """(row, decoder positions of an example, its logits_TV where nothing else is in the row)."""
    for row in range(NUM_ROWS):
        for segment in range(1, int(batch.input_segments_BS[row].max()) + 1):
            inputs = batch.input_ids_BS[row, batch.input_segments_BS[row] == segment]
            positions = (batch.target_segments_BT[row] == segment).nonzero()[:, 0]
            labels = batch.labels_BT[row, positions]
            decoder_inputs = torch.cat([torch.tensor([0]), labels[:-1]])
            logits = plain(input_ids=inputs[None], decoder_input_ids=decoder_inputs[None]).logits
            yield row, positions, logits[0]


PACKINGS = {
    "greedy": {"packing": "greedy"},
    "complementary pairs": {"packing": "complementary_pairs"},
    "alone, padded": {"packing": "none"},
    "greedy, few": {"packing": "greedy", "longest": 8},
}


@pytest.mark.parametrize("settings", PACKINGS.values(), ids=PACKINGS)
def test_packed_logits_are_those_of_each_example_alone(plain, trainable, settings):
    batch = rows(**settings)
    pairs = settings["packing"] == "complementary_pairs"
    assert batch.is_packed == (settings["packing"] != "none")
    assert batch.has_padding != pairs
    with torch.no_grad():
        logits_BTV = trainable.logits(batch)
        alone = list(each_alone(plain, batch))
    assert len(alone) >= (NUM_ROWS if settings["packing"] == "none" else 2 * NUM_ROWS - 2)
    for row, positions, expected_TV in alone:
        torch.testing.assert_close(
            logits_BTV[row, positions], expected_TV, rtol=TOLERANCE, atol=TOLERANCE
        )
    assert torch.isfinite(logits_BTV).all(), "padding, too, must give numbers"


@pytest.mark.parametrize("settings", PACKINGS.values(), ids=PACKINGS)
@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_loss_and_gradients_are_the_sums_over_examples(plain, trainable, settings, recompute):
    batch = rows(**settings)
    if recompute:
        recompute_layers(trainable)
    losses = LossModel(trainable, Z_LOSS, autocast=False)(batch)
    losses.total.backward()
    total = torch.zeros(())
    for row, positions, logits_TV in each_alone(plain, batch):
        labels_T = batch.labels_BT[row, positions]
        total = total + F.cross_entropy(logits_TV, labels_T, reduction="sum")
        total = total + Z_LOSS * logits_TV.logsumexp(dim=-1).square().sum()
    total.backward()
    assert losses.total.item() == pytest.approx(total.item(), rel=1e-5)
    assert int(losses.num_tokens) == int((batch.labels_BT >= 0).sum())
    expected = dict(plain.named_parameters())
    for name, weight in trainable.named_parameters():
        error = (weight.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert float(error) < TOLERANCE, name


def test_examples_that_saw_each_other_would_be_noticed(plain, trainable):
    batch = rows(packing="complementary_pairs")
    object.__setattr__(batch, "is_packed", False)
    with torch.no_grad():
        logits_BTV = trainable.logits(batch)
        differences = [
            float((logits_BTV[row, positions] - expected_TV).abs().max())
            for row, positions, expected_TV in each_alone(plain, batch)
        ]
    assert min(differences) > 100 * TOLERANCE


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recomputed"])
def test_running_text_is_what_plain_transformers_makes_of_it(recompute):
    batch = rows(objective="lm")
    assert batch.input_ids_BS is None
    llama, same = lively(make_llama(VOCABULARY)), lively(make_llama(VOCABULARY))
    ours = CausalModel(same)
    if recompute:
        recompute_layers(ours)
    losses = LossModel(ours, Z_LOSS, autocast=False).train()(batch)
    losses.total.backward()
    ids = batch.decoder_input_ids_BT
    expected = llama(input_ids=ids, labels=ids)
    mean = losses.cross_entropy / losses.num_tokens
    assert int(losses.num_tokens) == NUM_ROWS * (LENGTH - 1)
    assert float(mean) == pytest.approx(expected.loss.item(), rel=1e-5)
    token_loss(expected.logits, batch.labels_BT, z_loss=Z_LOSS).total.backward()
    for (name, weight), reference in zip(same.named_parameters(), llama.parameters(), strict=True):
        error = (weight.grad - reference.grad).norm() / reference.grad.norm()
        assert float(error) < TOLERANCE, name


def test_names_are_those_of_a_hugging_face_checkpoint(plain, trainable):
    assert set(trainable.checkpoint_names().values()) == set(dict(plain.named_parameters()))
    llama = make_llama(VOCABULARY)
    assert set(CausalModel(llama).checkpoint_names().values()) == set(
        dict(AutoModelForCausalLM.from_config(llama.config).named_parameters())
    )
