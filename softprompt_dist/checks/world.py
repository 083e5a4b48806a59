"""How many ranks the checks are about, and which of them looks at its machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from softprompt_dist.backbone.cell import Cluster
from softprompt_dist.errors import ConfigError
from softprompt_dist.parallel.join import (
    check_rank_variables,
    fill_rank_variables,
    local_world_size,
)


@dataclass(frozen=True)
class World:
    """The ranks of a launcher, or those that the doctor starts itself."""

    size: int
    local_size: int
    """Of this machine."""
    launched: bool
    """Whether this process is one of them; otherwise it stands for all."""
    local_rank: int = 0

    @property
    def looks_at_machine(self) -> bool:
        """Whether this process checks its machine: one on each does."""
        return self.local_rank == 0

    @property
    def cluster(self) -> Cluster:
        """As the memory model has it."""
        return Cluster(self.local_size, -(-self.size // self.local_size))


def world_to_check(num_ranks: int | None, environ: Mapping[str, str]) -> World:
    """The world of the launcher that started this process, else `num_ranks` on this machine.

    Raises:
        ConfigError: `num_ranks` is less than one, or not the launcher's number.
        MachineError: the launcher's variables are incomplete or wrong.
    """
    if num_ranks is not None and num_ranks < 1:
        raise ConfigError(f"--ranks is {num_ranks}; it must be at least 1.")
    filled = dict(environ)
    fill_rank_variables(filled)
    check_rank_variables(filled)
    size = int(filled["WORLD_SIZE"])
    if size == 1:
        return World(num_ranks or 1, num_ranks or 1, launched=False)
    if num_ranks not in (None, size):
        raise ConfigError(
            f"--ranks is {num_ranks}, but a launcher has started {size} ranks. Leave --ranks out, "
            "or start without a launcher."
        )
    local_rank = int(filled["LOCAL_RANK"])
    return World(size, local_world_size(filled), launched=True, local_rank=local_rank)
