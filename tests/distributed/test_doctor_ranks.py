"""`softprompt doctor` with ranks: those of a launcher, its own, and worlds that are broken."""

import os
import re
import subprocess
import sys

import launch

VERB = "softprompt_dist.doctor"
COLLECTIVES = (
    r"^(ok|warn) +{name} +2 ranks: 8 MiB in [\d.]+ ms, [\d.]+ GB/s to each rank, latency \d+ us$"
)


def doctor(*arguments, env=None):
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environ = {name: value for name, value in os.environ.items() if name not in launched}
    return subprocess.run(
        [sys.executable, "-m", VERB, *map(str, arguments)],
        cwd=launch.REPOSITORY,
        env=environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | (env or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_talked(said):
    for name in ("all-reduce", "all-gather"):
        assert re.search(COLLECTIVES.format(name=name), said, re.MULTILINE), said


def test_two_ranks_of_its_own_with_a_recipe(tiny_recipe, tmp_path):
    done = doctor("--recipe", tiny_recipe, "--ranks", 2, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_talked(done.stdout)
    assert launch.without_progress(done.stderr) == ""
    assert list(tmp_path.iterdir()) == [], "probes are cleaned up"


def test_the_ranks_of_a_launcher_talk_and_one_reports(run_module_on_ranks, tmp_path):
    first, second = run_module_on_ranks(VERB, ["--run-dir", tmp_path], 2)
    assert_talked(first.stdout)
    assert first.stdout.count("ok    torch") == 1
    assert second.stdout == ""
    assert launch.without_progress(first.stderr) + second.stderr == ""


def test_of_a_launcher_s_ranks_all_fail_and_one_speaks(run_module_on_ranks, tiny_recipe):
    arguments = ["--recipe", tiny_recipe, "--set", "batch.global_batch_size=9"]
    outputs = run_module_on_ranks(VERB, arguments, 2, check=False)
    assert [output.returncode for output in outputs] == [1, 1]
    assert "".join(output.stderr for output in outputs).count("error: ") == 1
    assert launch.without_progress(outputs[0].stderr).startswith("error: 1 check failed (batch)")


def test_a_rank_that_nobody_started_is_waited_for_no_longer_than_told(tmp_path):
    lonely = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(launch.free_port()),
    }
    done = doctor("--run-dir", tmp_path, "--timeout", 15, env=lonely)
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert launch.without_progress(done.stderr).startswith(
        "error: The ranks did not answer within 15 s."
    )
    assert "ok    torch" in done.stdout, "what was found before is told"


def test_own_ranks_that_cannot_join_fail_with_their_reason(tmp_path):
    done = doctor("--ranks", 2, "--run-dir", tmp_path, env={"DS_ACCELERATOR": "cuda"})
    assert done.returncode == 1
    assert launch.without_progress(done.stderr).startswith(
        "error: 2 checks failed (accelerator, communication)"
    )
    assert "-> Rank 0 on " in done.stdout
    assert "set DS_ACCELERATOR=cpu to compute on the CPU" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
