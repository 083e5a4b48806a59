"""A verb whose ranks fail in the way that the first argument names."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from softprompt_dist.errors import DataError
from softprompt_dist.parallel import ranks, verb


def main(argv: Sequence[str] | None = None) -> None:
    parser = verb.VerbParser("fail", "Fail.")
    parser.add_argument("how", choices=["on_main", "together", "alone"])
    options = parser.parse_args(argv)
    dist.init_process_group("gloo")
    if options.how == "on_main":
        ranks.on_main(lambda: fail("rank 0 cannot write"))
    if options.how == "together":
        ranks.together(lambda: fail("rank 1 cannot read") if ranks.rank() == 1 else None)
    if options.how == "alone" and ranks.rank() == 1:
        fail("rank 1 is ill")
    ranks.all_reduce_sum(torch.ones(1))


def fail(message: str) -> None:
    raise DataError(message)


if __name__ == "__main__":
    verb._GRACE_SECONDS = 6.0
    verb.run_verb(main)
