from pathlib import Path

from softprompt_dist.backbone.cell import Cell, Workload
from softprompt_dist.backbone.scoring_memory import position_bytes
from softprompt_dist.config import TuneConfig
from softprompt_dist.errors import ConfigError, DataError, SoftpromptError
from softprompt_dist.parallel import ranks
from softprompt_dist.parallel.node_memory import NodeMemory
from softprompt_dist.planning.models import find_architecture
from softprompt_dist.run import room


def _fail(error):
    raise error


def caught(call, work):
    try:
        return call(work)
    except SoftpromptError as error:
        return f"{type(error).__name__}: {error}"


def errors_of_every_kind():
    rank = ranks.rank()
    return {
        "together, all well": caught(ranks.together, lambda: rank * 10),
        "together, rank 1 fails": caught(
            ranks.together, lambda: _fail(DataError("row 7")) if rank == 1 else rank
        ),
        "together, both fail": caught(
            ranks.together, lambda: _fail(ConfigError(f"seen by rank {rank}"))
        ),
        "on_main, well": caught(ranks.on_main, lambda: f"from rank {rank}"),
        "on_main, fails": caught(ranks.on_main, lambda: _fail(DataError(f"on rank {rank}"))),
        "still in step": ranks.gather_objects(rank),
    }


def test_all_ranks_raise_the_same_error_and_stay_in_step(run_on_ranks):
    first, second = run_on_ranks(errors_of_every_kind, 2)
    assert (first.pop("together, all well"), second.pop("together, all well")) == (0, 10)
    assert first == second
    assert first == {
        "together, rank 1 fails": "DataError: row 7",
        "together, both fail": "ConfigError: seen by rank 0",
        "on_main, well": "from rank 0",
        "on_main, fails": "DataError: on rank 0",
        "still in step": [0, 1],
    }


def budget_where_the_second_gpu_is_half_full(folder):
    position = position_bytes(find_architecture(str(folder)), Cell(), Workload(1, 100, 512))
    free = position * (5000 if ranks.is_main() else 3000)
    room.device_memory = lambda: NodeMemory(free, 80 * 10**9)
    config = TuneConfig.model_validate({"backbone": {"path": str(folder)}})
    return room.scoring_budget(config, Path(folder))


def test_all_ranks_score_as_many_positions_as_fit_the_fullest_gpu(run_on_ranks, tiny_t5):
    assert run_on_ranks(budget_where_the_second_gpu_is_half_full, 2, folder=tiny_t5) == [3000, 3000]
