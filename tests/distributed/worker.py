"""One rank of `launch.run_function_on_ranks`: join, call the function, write its result."""

import importlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def main():
    target, arguments, result_path = sys.argv[1:]
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        from softprompt_dist.parallel.join import join_world

        join_world()
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    module, name = target.split(":")
    value = getattr(importlib.import_module(module), name)(**json.loads(arguments))
    Path(result_path).write_text(json.dumps(value))
    dist.barrier()
    dist.destroy_process_group()
    # As `run_verb` does: gloo's threads can abort the interpreter's own teardown.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
