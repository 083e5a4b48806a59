"""Planning LM adaptation: operations, memory by ZeRO stage, bytes on disk, and what is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from softprompt_dist.backbone.architecture import Architecture
from softprompt_dist.backbone.cell import Cluster, Workload
from softprompt_dist.backbone.known_architectures import known_architecture
from softprompt_dist.planning.adaptation import (
    AdaptationQuestion,
    adaptation_plans,
    budget,
    choose_adaptation,
    largest_adaptation_micro_batch,
    make_adaptation_plan,
    real_share,
    rows_of_pairs,
    with_micro_batch_that_fits,
)
from softprompt_dist.planning.adaptation_memory import (
    Engine,
    Optimizer,
    checkpoint_bytes,
    export_bytes,
    host_memory_bytes,
    matrix_shapes,
    num_statistics,
    predict_adaptation_memory,
    saving_bytes,
)
from softprompt_dist.planning.machine import GPUS
from softprompt_dist.planning.work import training_operations

XXL = "google/t5-v1_1-xxl"


def known(name: str) -> Architecture:
    found = known_architecture(name)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("size", "teraflop_512_512", "exaflop_512_512", "exaflop_1024_256"),
    [
        ("small", 0.215, 44, 25),
        ("base", 0.772, 158, 97),
        ("large", 2.536, 519, 329),
        ("xl", 9.015, 1846, 1162),
        ("xxl", 34.73, 7113, 4462),
    ],
)
def test_operations_of_a_row_and_of_the_papers_hundred_thousand_steps(
    size: str, teraflop_512_512: float, exaflop_512_512: float, exaflop_1024_256: float
) -> None:
    """Arithmetic by hand: 3 (2L(4di+f)S + 4LSSi + 2L(6di+f)T + 4diLS + 4LTTi + 4LTSi + 2VdT)."""
    model = known(f"google/t5-v1_1-{size}")
    assert training_operations(model, 1, 512, 512) / 1e12 == pytest.approx(teraflop_512_512, 1e-3)
    for total, rows, lengths in (
        (exaflop_512_512, 2048, (512, 512)),
        (exaflop_1024_256, 1024, (1024, 256)),
    ):
        run = 100_000 * training_operations(model, rows, *lengths)
        assert run / 1e18 == pytest.approx(total, abs=0.5)


def test_operations_of_a_decoder_only_row_are_six_for_each_weight_and_token() -> None:
    seven = known("meta-llama/Llama-2-7b-hf")
    multiplied = seven.num_parameters - seven.embedding_size - seven.small_size
    by_hand = 6 * 64 * multiplied + 3 * 32 * 4 * 64**2 * 4096
    assert training_operations(seven, 1, 0, 64) == pytest.approx(by_hand, rel=1e-9)


def state_gb(engine: Engine, ranks: int, optimizer: Optimizer = "adafactor") -> float:
    """What stays on a GPU from step to step, for XXL."""
    memory = predict_adaptation_memory(
        known(XXL), engine, Workload(1, 0, 512, 512), Cluster(ranks), optimizer
    )
    return memory.states / 1e9


@pytest.mark.parametrize(
    ("ranks", "adamw", "adafactor"),
    [
        (8, (61.2, 41.8, 22.3), (50.1, 30.6, 11.1)),
        (16, (52.9, 32.0, 11.1), (47.3, 26.4, 5.6)),
        (32, (48.7, 27.1, 5.6), (45.9, 24.4, 2.8)),
        (64, (46.6, 24.7, 2.8), (45.2, 23.3, 1.4)),
    ],
)
def test_states_of_xxl_by_stage(
    ranks: int, adamw: tuple[float, ...], adafactor: tuple[float, ...]
) -> None:
    """Arithmetic by hand: bf16 weights and gradients, fp32 masters, Adam's 8 bytes or none.

    Sums in fp32 add 2 bytes a weight and rank; stage 1 keeps them whole (83.5 GB on 8 with Adam).
    """
    whole = known(XXL).num_parameters / 1e9
    for stage, with_adam, with_adafactor in zip((1, 2, 3), adamw, adafactor, strict=True):
        engine = Engine(stage, sums="bf16")
        assert state_gb(engine, ranks, "adamw") == pytest.approx(with_adam, abs=0.1)
        assert state_gb(engine, ranks) == pytest.approx(with_adafactor, abs=0.1)
        more = state_gb(Engine(stage), ranks) - state_gb(engine, ranks)
        assert more == pytest.approx(2 * whole / (ranks if stage > 1 else 1), abs=0.01)
    trap = 6 * whole + 12 * whole / ranks
    assert state_gb(Engine(1), ranks, "adamw") == pytest.approx(trap, abs=0.01)


def test_stage_1_with_fp32_sums_is_83_gb_on_eight_and_69_on_sixty_four() -> None:
    assert state_gb(Engine(1), 8, "adamw") == pytest.approx(83.5, abs=0.1)
    assert state_gb(Engine(1), 64, "adamw") == pytest.approx(69, abs=0.2)


def test_stage_0_keeps_fp32_weights_and_fp32_runs_keep_no_second_copy_in_stage_3() -> None:
    whole = known(XXL).num_parameters / 1e9
    assert state_gb(Engine(0), 8) == pytest.approx(8 * whole, abs=0.1)
    assert state_gb(Engine(2, dtype="fp32"), 8) == pytest.approx((4 + 8 / 8) * whole, abs=0.1)
    assert state_gb(Engine(3, dtype="fp32"), 8) == pytest.approx(8 / 8 * whole, abs=0.1)


def test_adafactors_statistics_are_a_row_and_a_column_of_every_matrix() -> None:
    xxl = known(XXL)
    assert sum(1 for _ in matrix_shapes(xxl)) == 434
    of_matrices = num_statistics(xxl) - xxl.small_size
    assert of_matrices / 1e6 == pytest.approx(4.50, abs=0.005)
    assert 4 * of_matrices / 1e6 == pytest.approx(18, abs=0.1)
    tied = known("demo:smollm2-135m")
    assert sum(1 for _ in matrix_shapes(tied)) == 30 * 7 + 1


def test_bytes_on_the_disk_and_in_the_nodes_memory() -> None:
    xxl = known(XXL)
    assert checkpoint_bytes(xxl, "adafactor") / 1e9 == pytest.approx(44.56, abs=0.01)
    assert checkpoint_bytes(xxl, "adamw") / 1e9 == pytest.approx(133.6, abs=0.1)
    assert export_bytes(xxl)["fp32"] / 1e9 == pytest.approx(44.5, abs=0.1)
    assert export_bytes(xxl)["bf16"] / 1e9 == pytest.approx(22.3, abs=0.1)
    adam = host_memory_bytes(xxl, Engine(2, offload=True), Cluster(4), "adamw")
    pinned = 4 * xxl.num_parameters
    assert (adam - pinned) / 1e9 == pytest.approx(178, abs=0.5)
    halves = host_memory_bytes(xxl, Engine(2, offload=True), Cluster(4, nodes=2), "adamw")
    assert halves == pytest.approx(adam / 2)
    assert host_memory_bytes(xxl, Engine(2), Cluster(4), "adamw") == 0


def test_checkpoints_are_written_from_a_copy_in_the_nodes_memory() -> None:
    xxl = known(XXL)
    whole = checkpoint_bytes(xxl, "adamw")
    assert saving_bytes(xxl, Engine(2), Cluster(4), "adamw") == whole
    assert saving_bytes(xxl, Engine(3), Cluster(4, nodes=2), "adamw") == pytest.approx(whole / 2)
    assert saving_bytes(xxl, Engine(0), Cluster(4, nodes=2), "adamw") == whole, "rank 0 has all"


def test_a_node_without_room_for_the_copy_waits_for_the_disk() -> None:
    plans = [
        choose_adaptation(adaptation_plans(replace(ask(), host_memory_gb=gb))) for gb in (45, 44)
    ]
    assert [plan and plan.engine for plan in plans] == [chosen(ask())] * 2
    assert [plan and round(plan.saving / 1e9, 1) for plan in plans] == [44.6, 0]


def ask(model: str = XXL, *, gb: float = 80, gpus: int = 8, rows: int = 16) -> AdaptationQuestion:
    gpu = replace(GPUS["a100-80"], memory_gb=gb)
    return AdaptationQuestion(known(model), gpu, Cluster(gpus), 512, 512, micro_batch=rows)


def chosen(question: AdaptationQuestion) -> Engine:
    plan = choose_adaptation(adaptation_plans(question))
    assert plan is not None
    assert plan.memory.total <= question.device_bytes
    return plan.engine


@pytest.mark.parametrize(
    ("question", "engine"),
    [
        (ask(), Engine(2, checkpointing=True)),
        (ask(rows=8), Engine(2)),
        (ask(gb=40), Engine(3, checkpointing=True)),
        (ask("google/t5-v1_1-small", gpus=1), Engine(0)),
        (ask("google/t5-v1_1-large"), Engine(0)),
        (ask(gpus=1), Engine(2, checkpointing=True, offload=True)),
    ],
    ids=["xxl", "xxl, few rows", "xxl on 40 GB", "small", "large", "xxl on one"],
)
def test_the_stage_with_the_least_communication_is_taken(
    question: AdaptationQuestion, engine: Engine
) -> None:
    assert chosen(question) == engine


def test_gradients_summed_in_bf16_are_never_chosen() -> None:
    fitting = [p for p in adaptation_plans(ask(rows=1)) if p.fits]
    assert any(plan.engine.sums == "bf16" for plan in fitting)
    assert chosen(ask(rows=1)).sums == "fp32"


def test_a_smaller_micro_batch_is_taken_before_off_loading() -> None:
    question = replace(ask(gb=40), optimizer="adamw")
    assert chosen(question).offload
    smaller = with_micro_batch_that_fits(question)
    assert smaller.micro_batch == 8
    assert not chosen(smaller).offload
    alone = ask(gpus=1)
    assert with_micro_batch_that_fits(alone) == alone


def test_a_smaller_micro_batch_is_taken_where_only_off_loading_fits() -> None:
    assert choose_adaptation(adaptation_plans(ask(gb=16))) is None
    smaller = with_micro_batch_that_fits(ask(gb=16))
    assert smaller.micro_batch == 8
    assert chosen(smaller).offload
    assert with_micro_batch_that_fits(ask(gb=4)) == ask(gb=4)


def test_the_nodes_memory_is_checked_where_it_is_known() -> None:
    question = ask(gpus=1)
    assert choose_adaptation(adaptation_plans(replace(question, host_memory_gb=100))) is None
    assert chosen(replace(question, host_memory_gb=200)).offload


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    question, engine = ask(), Engine(2, checkpointing=True)
    most = largest_adaptation_micro_batch(question, engine)
    fits = [
        make_adaptation_plan(replace(question, micro_batch=rows), engine).fits
        for rows in (most, 2 * most)
    ]
    assert fits == [True, False]
    assert question.rows % (most * 8) == 0
    assert largest_adaptation_micro_batch(ask(gb=10), engine) == 0


def test_hours_and_days_at_an_mfu() -> None:
    """18,100 A100-hours at 35 %, 5,000 H100-hours at 40 %."""
    a100 = budget(ask())
    assert a100.gpu_hours == pytest.approx(18_100, rel=1e-3)
    assert a100.days == pytest.approx(a100.gpu_hours / 8 / 24)
    h100 = budget(replace(ask(), gpu=GPUS["h100"], mfu=0.4))
    assert h100.gpu_hours == pytest.approx(5000, rel=2e-3)


def test_pairs_carry_the_same_tokens_in_fewer_rows() -> None:
    """A full piece of 511 tokens and two ends in 1,024 positions; 1,024 + 256 trims the target."""
    assert real_share(512, 512) == pytest.approx(513 / 1024)
    assert real_share(1024, 256) == pytest.approx((512.5 + 224.3) / 1280, abs=1e-3)
    assert rows_of_pairs(ask()) == 1024
