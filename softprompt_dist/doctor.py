"""`softprompt doctor`: what could stop a run on this machine, found in a minute, not in an hour.

softprompt doctor --recipe t5-base-sst2 --ranks 2

Takes the recipe options of `softprompt train` and `adapt`, so that the command to be run can be
tried as it is. Under a launcher the collectives span its ranks, and every node checks itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING

from softprompt_dist.cache import cache_directory
from softprompt_dist.checks.finding import ChecksFailedError, Finding, table, verdict
from softprompt_dist.checks.software import check_bitsandbytes, check_python, check_versions
from softprompt_dist.errors import SoftpromptError
from softprompt_dist.parallel.verb import VerbParser, launched_rank, run_verb
from softprompt_dist.progress import phase

if TYPE_CHECKING:
    from softprompt_dist.checks.job import Job
    from softprompt_dist.checks.world import World

_TIMEOUT_SECONDS = 300.0


def build_parser() -> VerbParser:
    """Options of `softprompt doctor`."""
    parser = VerbParser(
        "doctor",
        "Check this machine, and with --recipe the whole job, before a run. Exit code 1 if a check "
        "fails.",
    )
    parser.add_recipe_options()
    parser.add_argument("--stage", metavar="NAME", help="of an adaptation, this one only")
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="start N ranks on this machine and let them talk (default: those of the launcher, "
        "else 1)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"how long the ranks may take to answer (default: {_TIMEOUT_SECONDS:.0f})",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the verb; see `build_parser`."""
    options = build_parser().parse_args(argv)
    from softprompt_dist.checks.job import check_recipe

    job, findings = check_recipe(options)
    libraries = [*check_python(), *check_versions()]
    findings += libraries
    if any(finding.status == "fail" for finding in libraries):
        _show(findings)
        verdict(findings)  # nothing that follows could be imported

    from softprompt_dist.checks.world import world_to_check

    world = world_to_check(options.ranks, os.environ)
    _show(findings)
    if world.looks_at_machine:
        groups = {
            "this machine": machine_findings,
            "its disks": disk_findings,
            "files, weights and memory of the job": job_findings,
        }
        for what, group in groups.items():
            with phase(f"checking {what}"):
                found = group(job, world)
            _show(found)
            findings += found
    if world.size > 1 and not world.launched:
        findings += _between_own_ranks(options, world)
        print(verdict(findings), flush=True)
    else:
        _between_all_ranks(options, world, job, findings)


def machine_findings(job: Job, world: World) -> list[Finding]:
    """Everything about this machine but its disks."""
    from softprompt_dist.checks import builds, machine

    on_gpu = machine.on_gpu()
    compiles = not on_gpu and job.needs_deepspeed(world.size)
    return [
        *check_bitsandbytes(needed_for=job.needs_bitsandbytes_for),
        *machine.check_accelerator(),
        *machine.check_bf16(machine.bf16_slowdown(), wanted=job.may_use_bf16),
        *machine.check_cores_and_memory(),
        *machine.check_shared_memory(world.local_size, on_gpu=on_gpu),
        *machine.check_shared_memory_leftovers(),
        *builds.check_build_tools(needed=compiles),
        *builds.check_build_locks(),
        *builds.check_shm_comm(needed=compiles),
        *builds.check_async_io(needed=job.offload_folder is not None, on_gpu=on_gpu),
    ]


def disk_findings(job: Job, world: World) -> list[Finding]:
    """The folders that a run writes to."""
    from softprompt_dist.checks.disk import check_disk_speed, check_folder

    findings = [
        *check_folder("cache", cache_directory()),
        *check_folder("run directory", job.run_directory),
        *check_disk_speed("run directory", job.run_directory),
    ]
    if job.offload_folder is not None:
        findings += check_folder("off-load folder", job.offload_folder)
        findings += check_disk_speed("off-load folder", job.offload_folder)
    return findings


def job_findings(job: Job, world: World) -> list[Finding]:
    """What the recipe asks for: rows, weights, and a world and a memory that they fit."""
    from softprompt_dist.backbone.weight_files import checkpoint_files
    from softprompt_dist.checks import job_files
    from softprompt_dist.checks.disk import check_read_speed
    from softprompt_dist.checks.job import check_world_size
    from softprompt_dist.checks.room import check_room

    findings = check_world_size(job, world.size)
    if job.stages:
        from softprompt_dist.checks.adaptation import check_adaptation

        return findings + check_adaptation(job, world)
    if job.config is None or job.backbone is None:
        return findings
    findings += job_files.check_files(job.config)
    folder, found = job_files.find_backbone(job.backbone)
    findings += found
    if folder is None:
        return findings
    found = job_files.check_backbone_files(folder, job.backbone)
    findings += found
    if all(finding.status != "fail" for finding in found):
        findings += check_read_speed("backbone speed", checkpoint_files(folder))
        findings += check_room(job.held_by(world.size) or job.config, folder, world.cluster)
    return findings


def _between_own_ranks(options: argparse.Namespace, world: World) -> list[Finding]:
    from softprompt_dist.checks.local_ranks import check_local_communication

    with phase(f"starting {world.size} ranks and having them talk"):
        found = check_local_communication(
            world.size, timeout_seconds=options.timeout, debug=options.debug
        )
    _show(found)
    return found


def _between_all_ranks(
    options: argparse.Namespace, world: World, job: Job, findings: list[Finding]
) -> None:
    """All ranks of the launcher, or the only one: talk, then judge together."""
    from softprompt_dist.checks.communication import answer_within, check_communication
    from softprompt_dist.checks.preflight import check_nodes
    from softprompt_dist.parallel import ranks
    from softprompt_dist.parallel.join import leave_world

    try:
        with answer_within(options.timeout), phase("having the ranks talk"):
            found = check_communication(debug=options.debug)
            found += check_nodes(job.run_directory)
            nodes = ranks.gather_objects((socket.gethostname(), findings))
    except SoftpromptError as error:
        if not ranks.is_main():
            raise
        found = [Finding("communication", "fail", "the ranks did not meet", str(error))]
        _show(found)
        verdict([*findings, *found])
    found += _problems_elsewhere(nodes)
    _show(found)
    try:
        sentence = verdict([*nodes[0][1], *found])
    except ChecksFailedError as error:
        error.on_all_ranks = world.launched
        raise
    if ranks.is_main():
        print(sentence, flush=True)
    leave_world()


def _problems_elsewhere(nodes: Sequence[tuple[str, list[Finding]]]) -> list[Finding]:
    """What is not well on other machines than that of rank 0."""
    here = nodes[0][0]
    return [
        dataclasses.replace(finding, name=f"{finding.name} on {host}")
        for host, findings in nodes
        for finding in findings
        if host != here and finding.status != "ok"
    ]


def _show(findings: Sequence[Finding]) -> None:
    """Print at once, on rank 0: some checks take a while."""
    if launched_rank() == 0 and findings:
        print(table(findings), flush=True)


if __name__ == "__main__":
    run_verb(main)
