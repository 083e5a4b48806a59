"""A trainer that trains nothing but keeps the contract of outcome files; starts in no time.

Stands in for softprompt_dist.train and its siblings in tests of the batch scripts.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import NoReturn

RANK = int(os.environ["SLURM_PROCID"])
RESTART = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
ATTEMPT = f"{os.environ['SLURM_JOB_ID']}.{RESTART}"


def option(name: str) -> str | None:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None


SETTINGS = {
    "steps": "20",
    "fault": "",
    "finish_after_restarts": "-1",
    "step_seconds": "0.05",
} | dict(
    sys.argv[index + 1].split("=", 1) for index, word in enumerate(sys.argv) if word == "--set"
)
FOLDER = Path(str(option("--run-dir") or option("--output")))
TOKEN = uuid.uuid4().hex
received: list[int] = []


def write(name: str, text: str) -> None:
    draft = FOLDER / f".{name}.{TOKEN}"
    draft.write_text(f"{text}\n")
    draft.replace(FOLDER / name)


def read(name: str) -> str:
    path = FOLDER / name
    return path.read_text() if path.exists() else ""


def publish(step: int) -> None:
    if RANK == 0:
        owner = json.loads(read("attempt.json") or "{}")
        if owner.get("token") != TOKEN:
            (FOLDER / f"superseded-{ATTEMPT}").touch()
            sys.exit(6)
        write("step", str(step))


def end(why: str, code: int) -> NoReturn:
    if RANK == 0:
        write("why", why)
        (FOLDER / "attempt.json").unlink(missing_ok=True)
    sys.stdout.flush()
    os._exit(code)


def misbehave(step: int) -> None:
    fault = SETTINGS["fault"] if SETTINGS.get("only", FOLDER.name) == FOLDER.name else ""
    if RANK == 1 and ((fault == "crash_once" and RESTART == 0 and step == 12) or fault == "crash"):
        os._exit(3)
    if fault == "fatal" and RANK == 0 and step == 8:
        end("fatal: the loss is nan at step 8", 4)


def note_attempt() -> None:
    names = ("MASTER_ADDR", "MASTER_PORT", "SOFTPROMPT_OUTCOME", "TMPDIR", "TORCH_EXTENSIONS_DIR")
    notes = {name: os.environ[name] for name in names}
    umask = os.umask(0o077)
    notes |= {"argv": sys.argv[1:], "umask": f"{umask:03o}", "pid": os.getpid()}
    notes |= {"container": os.environ.get("CONTAINER"), "step": os.environ["SLURM_JOB_NAME"]}
    notes |= {"node": os.environ["SLURMD_NODENAME"], "scratch": Path(notes["TMPDIR"]).is_dir()}
    write(f"attempt-{ATTEMPT}-rank-{RANK}.json", json.dumps(notes))


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        is_deaf = SETTINGS["fault"] == "deaf_once" and RESTART == 0
        signal.signal(
            number,
            signal.SIG_IGN if is_deaf else lambda number, frame: received.append(number),
        )
    FOLDER.mkdir(parents=True, exist_ok=True)
    note_attempt()
    if RANK == 0:
        write("attempt.json", json.dumps({"token": TOKEN, "job": os.environ["SLURM_JOB_ID"]}))
        write("why", "running")
    step, steps = int(read("step") or 0), int(SETTINGS["steps"])
    if (
        int(SETTINGS["finish_after_restarts"]) <= RESTART
        and "-" not in SETTINGS["finish_after_restarts"]
    ):
        steps = step + 10
    while step < steps:
        time.sleep(float(SETTINGS["step_seconds"]))
        step += 1
        if RANK == 0:
            with (FOLDER / "steps.log").open("a") as file:
                file.write(f"{RESTART} {step}\n")
        misbehave(step)
        if step % 10 == 0:
            publish(step)
        if received:
            if SETTINGS["fault"] != "crash":  # with a peer gone there is no saving
                time.sleep(0.5)
                publish(step)
            end(f"signal: {signal.Signals(received[0]).name} after step {step}", 0)
    publish(step)
    if RANK == 0:
        write("DONE", str(step))
    end("done", 0)


main()
