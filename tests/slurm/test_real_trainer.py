"""softprompt_dist.train itself through slurm/train_xxl.sh: a rank on each of two nodes, CPU."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from softprompt_dist.parallel.extensions import choose_extensions_folder
from tests import runs
from tests.slurm.cluster import wait_until
from tests.slurm.lab import Job, Lab, starts

STEPS = 120


def submit(lab: Lab, name: str, script: str = "train_xxl.sh", **options: Any) -> Job:
    folder = lab.folder / "real"
    environ = {
        "PYTHONPATH": "",  # not the stand-in
        "RECIPE": str(folder / "recipe.yaml"),
        "DS_CONFIG": str(folder / "zero3.json"),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        # To compile takes a minute; there is one node, really.
        "TORCH_EXTENSIONS_DIR": str(choose_extensions_folder()),
    }
    environ |= options.pop("environ", {})
    return lab.submit(f"real-{name}", script=script, environ=environ, **options)


def interrupt(job: Job) -> None:
    wait_until(lambda: job.read("step") not in ("", "0"), 240, job.log)
    job.cluster.call("scancel", "--batch", "--signal=USR1", job.id)


def start_three(lab: Lab) -> tuple[Job, Job, Job, Future[None]]:
    folder = lab.folder / "real"
    backbone, data = runs.save_t5(folder / "t5"), runs.write_splits(folder / "data")
    recipe = runs.tiny_recipe(backbone, data)
    recipe["backbone"]["dropout"] = 0.1  # so that random states matter
    recipe["evaluation"]["every_steps"] = 60
    runs.write_recipe(folder / "recipe.yaml", recipe)
    (folder / "zero3.json").write_text(json.dumps(runs.PARTITION_EVERYTHING))
    whole = submit(lab, "whole", steps=STEPS)
    interrupted = submit(lab, "interrupted", steps=STEPS)
    scored = submit(
        lab,
        "scored",
        "evaluate_xxl.sh",
        options=[f"--dependency=afterok:{whole.id}"],
        environ={
            "PROMPT": str(whole.run_dir / "prompt" / "best.safetensors"),
            "SOFTPROMPT_AFTER": f"{whole.run_dir}:{STEPS}",
        },
    )
    # It has saved and waits again long before it is this test's turn.
    return whole, interrupted, scored, ThreadPoolExecutor(1).submit(interrupt, interrupted)


@pytest.mark.drill("D27")
@starts(start_three)
def test_a_run_that_was_interrupted_and_queued_again_gives_the_same_prompt(
    started: tuple[Job, Job, Job, Future[None]],
) -> None:
    whole, interrupted, scored, interruption = started
    interruption.result()
    for job, restarts in ((whole, "0"), (interrupted, "1")):
        facts = job.ended(seconds=180)
        assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", restarts), job.log
        assert job.read("DONE") == str(STEPS)
        assert job.read("why") == "done"
    assert "signal: SIGUSR1 after step" in interrupted.log
    expected, found = (runs.checkpoint_tensors(job.run_dir, STEPS) for job in (whole, interrupted))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert scored.ended(seconds=180)["JobState"] == "COMPLETED", scored.log
    assert (scored.read("DONE"), scored.read("why")) == ("0", "done")
    assert (scored.run_dir / "report.md").stat().st_size > 0
