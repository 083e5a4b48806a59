"""What benchmarks count; the times are theirs to report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, T5ForConditionalGeneration

from benchmarks import gpu_xxl, portability, rows
from benchmarks import saved_activations as saved
from benchmarks.clock import StepClock
from benchmarks.flops import frozen_step_flops
from benchmarks.models import (
    HEAD,
    SHAPES,
    TINY_TOKENIZER,
    ensure_checkpoint,
    num_parameters,
    t5_config,
)
from benchmarks.report import Aim
from tests import runs
from tests.prompts import save_untuned

# As at [8, 356] of width 1024, an attention mask is 5.5 times a [B, S, d_model] tensor.
BATCH = saved.make_batch(4, 64)
PROMPT_BPD = 0.5 * torch.randn(4, 24, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def two_depths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved.make_models(tmp_path_factory.mktemp("models"), tiny=True)


def counted(variant: str, folders: list[Path], dtype: str) -> tuple[int, int]:
    return saved.layer_bytes(variant, folders, dtype, BATCH, PROMPT_BPD)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", [saved.OURS, saved.OURS_INT8])
def test_a_layer_keeps_less_than_half_of_the_peer_s(
    two_depths: list[Path], variant: str, dtype: str
) -> None:
    peer, _ = counted(saved.PEER, two_depths, dtype)
    ours, alive = counted(variant, two_depths, dtype)
    assert 0 < ours <= 0.45 * peer
    assert alive <= 1.01 * ours, "something is kept that the saved-tensor hooks do not see"


def test_deepspeed_s_linear_keeps_inputs_that_torch_s_does_not(two_depths: list[Path]) -> None:
    with_deepspeed, _ = counted(saved.PEER, two_depths, "fp32")
    without, _ = counted(saved.PLAIN, two_depths, "fp32")
    assert with_deepspeed > without


def test_the_gradient_is_the_peer_s(two_depths: list[Path]) -> None:
    assert saved.gradient_difference(two_depths[-1], BATCH, PROMPT_BPD) < 2e-6


def test_flops_are_those_that_torch_counts() -> None:
    config = t5_config({**SHAPES["tiny"], "num_layers": 4, "num_decoder_layers": 4})
    config._attn_implementation = "eager"  # whose products torch can count
    model = T5ForConditionalGeneration(config).requires_grad_(False).eval()
    embeds_BSD = torch.randn(2, 96, config.d_model, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeds_BSD, labels=torch.ones(2, 8, dtype=torch.long)).loss.backward()
    assert frozen_step_flops(config, 2, 96, 8) == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_a_checkpoint_is_sharded_whole_and_has_a_head_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.models._SHARD_BYTES", 400_000)
    folder = ensure_checkpoint(tmp_path / "t5", SHAPES["tiny"], "bf16")
    files = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(files) > 1
    assert set(places) == set(tensors)
    assert set(places.values()) == {path.name for path in files}
    assert sum(t.numel() for t in tensors.values()) == num_parameters(SHAPES["tiny"])
    assert not torch.equal(tensors[HEAD], tensors["shared.weight"])


def test_xxl_has_the_size_that_the_paper_prints() -> None:
    one_prompt_token = 4096
    assert num_parameters(SHAPES["xxl"]) + one_prompt_token == 11_135_336_448


@pytest.fixture
def snippets(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"a film of {n} words , and not one of them is dull" for n in range(40)]
    made = [{"text": text, "label": "positive"} for text in texts]
    monkeypatch.setattr(rows, "vader_rows", lambda name: made)


@pytest.mark.usefixtures("snippets")
def test_rows_have_the_lengths_of_the_tasks() -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))

    def lengths(made: list[rows.Row]) -> list[int]:
        return sorted(len(tokenizer(row["text"])["input_ids"]) for row in made)

    real = lengths(rows.real_rows(128, tokenizer))
    assert real[63] < 42 <= real[64]  # half are snippets, half as long as BoolQ's
    assert sum(real[64:]) / 64 == pytest.approx(sum(rows.BOOLQ_LENGTHS) / 64, rel=0.05)
    assert lengths(rows.fixed_rows(4, 200, tokenizer))[0] >= 200


@pytest.mark.usefixtures("snippets")
def test_rows_of_a_boolq_file_are_its_own(tmp_path: Path) -> None:
    path = tmp_path / "boolq.jsonl"
    rows.write_rows(path, [{"passage": "p", "question": "q", "label": "x"}] * 4)
    tokenizer = AutoTokenizer.from_pretrained(str(TINY_TOKENIZER))
    made = rows.real_rows(4, tokenizer, path)
    assert sorted(row["text"] for row in made)[2:] == ["passage: p question: q"] * 2


def test_an_aim_is_judged_on_its_side() -> None:
    assert Aim("at most", 2.0, 2.0).reached
    assert not Aim("at most", 2.1, 2.0).reached
    assert Aim("at least", 2.1, 2.0, at_least=True).reached
    assert "missed" in str(Aim("at least", 1.9, 2.0, at_least=True))


def test_time_belongs_to_the_innermost_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr("benchmarks.clock.time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(torch.Tensor, "backward", torch.Tensor.backward)
    monkeypatch.setattr("benchmarks.clock._COLLECTIVES", {})
    clock = StepClock()
    clock.start()
    with clock.phase("forward"), clock.phase("gather"):
        pass
    clock.end_step()
    assert clock.steps == [{"rest": 6.0, "forward": 6.0, "gather": 3.0, "wall": 15.0}]


def test_xxl_is_skipped_in_words_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_xxl.main([])
    assert "needs a CUDA device" in capsys.readouterr().out


def test_a_prompt_is_scored_in_every_cell_asked_for(
    lively_t5: Path, tiny_data: Path, tmp_path: Path
) -> None:
    prompt = save_untuned(tmp_path, runs.tiny_recipe(lively_t5, tiny_data))
    small = ["--recipe", str(tmp_path / "config.yaml"), "--rows", "9", "--cells", "fp32", "int8"]
    portability.main([*small, "--prompt", f"mine={prompt}", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "portability.json").read_text())
    fp32, int8 = (report["measured"][name] for name in ("fp32", "int8"))
    assert int8["bytes"] < fp32["bytes"]
    assert 0 < abs(int8["mine"]["loss"] / fp32["mine"]["loss"] - 1) < 0.1
    for cell in (fp32, int8):
        right = cell["mine"]["score"] * 9 / 100
        assert right == pytest.approx(round(right))
