"""Operations of training, and what the meter makes of tokens and seconds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from softprompt_dist.adaptation import peak as peak_module
from softprompt_dist.adaptation import throughput
from softprompt_dist.adaptation.peak import Peak, find_peak, listed_peak, measured_peak
from softprompt_dist.adaptation.throughput import Throughput
from softprompt_dist.backbone.architecture import architecture_of
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.planning.work import training_operations
from tests.models import make_llama, make_t5


@pytest.mark.parametrize(
    ("inputs", "targets", "base", "xxl"),
    [(512, 114, 0.426, 20.9), (512, 512, 0.772, 34.7), (1024, 256, 0.951, 43.6)],
)
def test_operations_of_a_row_of_the_published_sizes(inputs, targets, base, xxl):
    for size, teraflop in (("base", base), ("xxl", xxl)):
        architecture = known_architecture(f"google/t5-v1_1-{size}")
        counted = training_operations(architecture, 1, inputs, targets) / 1e12
        assert counted == pytest.approx(teraflop, rel=3e-3)


def counted_by_torch(model, **inputs):
    model.set_attn_implementation("eager")
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**inputs, use_cache=False).loss.backward()
    return counter.get_total_flops()


def test_operations_of_a_t5_are_those_that_torch_counts():
    model = make_t5()
    ids_BS, ids_BT = torch.ones(3, 40, dtype=torch.long), torch.ones(3, 24, dtype=torch.long)
    counted = counted_by_torch(model, input_ids=ids_BS, labels=ids_BT)
    architecture = architecture_of("tiny", model.config.to_dict())
    assert training_operations(architecture, 3, 40, 24) == pytest.approx(counted, rel=0.01)


def test_operations_of_a_decoder_only_model_are_those_that_torch_counts():
    model = make_llama()
    ids_BT = torch.ones(3, 24, dtype=torch.long)
    counted = counted_by_torch(model, input_ids=ids_BT, labels=ids_BT)
    architecture = architecture_of("tiny", model.config.to_dict())
    assert training_operations(architecture, 3, 0, 24) == pytest.approx(counted, rel=0.02)


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

    monkeypatch.setattr(throughput.time, "monotonic", lambda: Clock.now)
    return Clock


def test_the_meter_tells_of_the_interval_since_its_last_reading(clock):
    meter = Throughput(operations_per_update=30e12, peak=Peak(1e13, "a test"))
    meter.count(1000, 1024, seconds=999.0)
    assert "seconds_left" not in meter.read(updates_left=12)
    for _ in range(2):
        clock.now += 10.0
        meter.count(450, 600, seconds=7.5)
    assert meter.read(updates_left=10) == {
        "tokens_per_second": 2 * 450 / 15,
        "padding": 25.0,
        "tflops_per_second": 2 * 30 / 15,
        "mfu": 40.0,
        "seconds_left": 100.0,
    }


def test_only_a_device_named_in_full_has_the_figure_of_its_vendor():
    bf16 = torch.bfloat16
    assert listed_peak("NVIDIA H100 80GB HBM3", bf16) == 989e12
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5e12
    slower = ("NVIDIA H100 PCIe", "NVIDIA A10G", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "this CPU")
    assert [listed_peak(name, bf16) for name in slower] == [None] * 4
    assert listed_peak("Tesla T4", bf16) is None


def test_fp32_products_that_may_use_tf32_have_no_figure(monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.float32) is None
    assert listed_peak("NVIDIA A100-SXM4-80GB", torch.bfloat16) == 312e12


def test_a_cpu_is_measured_and_says_so(monkeypatch):
    monkeypatch.setattr(peak_module, "_CPU_SIZE", 64)
    monkeypatch.setattr(peak_module, "_SECONDS_OF_MEASURING", 0.0)
    peak = find_peak(torch.float32)
    assert peak.operations_per_second > 0
    assert "measured on this CPU" in peak.source
    assert "fp32" in peak.source


def test_the_peak_is_that_of_the_fastest_product(monkeypatch):
    seconds = iter([0.5, 0.25, 1.0])
    monkeypatch.setattr(peak_module, "_seconds_of_product", lambda square: next(seconds))
    ticks = iter([0.0, 0.1, 0.2, 9.0])
    monkeypatch.setattr(peak_module.time, "monotonic", lambda: next(ticks))
    assert measured_peak(torch.float32, size=8, seconds=1.0) == 2 * 8**3 / 0.25
