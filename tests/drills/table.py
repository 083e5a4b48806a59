"""The fault drills: what befalls a run, what plain DeepSpeed was seen to do, what must happen here.

The controls were measured once on DeepSpeed 0.19.8 and torch 2.13 with gloo, two ranks; none is
given where plain DeepSpeed has nothing to compare.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Drill:
    """One line of the resilience table."""

    title: str
    expected: str
    control: str = ""
    """What plain DeepSpeed does."""


DRILLS = {
    "D1": Drill("SIGKILL at random, rank 0, 1 or both", "resumes each time; end equal to the bit"),
    "D2": Drill(
        "killed in the middle of a save",
        "the save before it is used; nothing half-written is seen",
        "`latest` already names the step whose shard is torn; the load dies",
    ),
    "D3": Drill(
        "SIGTERM, USR1 or USR2 to one rank",
        "all ranks save at the same step and exit 0",
    ),
    "D4": Drill(
        "a signal while loading, validating, reporting or saving",
        "ends at the next boundary; nothing is lost or saved twice",
    ),
    "D5": Drill("a second signal during the save", "one published checkpoint, valid"),
    "D6": Drill(
        "a signal to every process of the step, workers too",
        "workers ignore it, the save is done",
        "workers die (exit code -10), the save is lost",
    ),
    "D7": Drill(
        "eight kinds of damage to a checkpoint",
        "all noticed before training; the newest valid one is used",
        "loads flipped bits without a word; ranks disagree over a missing shard",
    ),
    "D8": Drill(
        "no valid checkpoint is left",
        "refused; never step 0 unasked",
        "starts again from step 0, exit code 0",
    ),
    "D9": Drill(
        "disk full in a save",
        "older ones intact, temporary files gone, the numbers are said",
        "both ranks raise; a partial folder stays",
    ),
    "D10": Drill("too little room for checkpoints", "refused before step 1, with both numbers"),
    "D11": Drill("write permission is lost", "older checkpoints intact, the reason is said"),
    "D12": Drill(
        "one rank hangs",
        "all ranks end within timeout + 5 s, with their stacks",
        "gloo: the other rank raises at its timeout; no stacks",
    ),
    "D13": Drill("a slow rank", "named, with its ratio, within 20 steps"),
    "D14": Drill("NaN on one rank", "all stop before the update; the newest checkpoint is finite"),
    "D15": Drill("a loss spike of ten sigma", "flagged; the run goes on"),
    "D16": Drill(
        "one run, two halves, twelve parts",
        "equal to the bit; without random states the comparison fails",
        "random states are not saved: another result",
    ),
    "D17": Drill("kills over an epoch's edge", "each example as often as without kills"),
    "D18": Drill(
        "another number of ranks: 1, 2, 1",
        "the same state, the same data; differs by rounding",
        "refused by ZeRO: `used a DP world size of 2`",
    ),
    "D19": Drill("replicated and ZeRO-3 load each other's", "the same prompt, to the bit"),
    "D20": Drill("only the last k are kept, kills meanwhile", "never fewer than one valid"),
    "D21": Drill("kill or failure of the background writer", "unseen, or said at the next step"),
    "D22": Drill("an attempt that was thought dead wakes up", "publishes nothing, ends"),
    "D23": Drill("two runs in one directory", "the second is refused, naming the first"),
    "D24": Drill(
        "another job on the same port",
        "refused by all ranks",
        "they train together: all_reduce gives 101",
    ),
    "D25": Drill(
        "a build lock that nobody holds", "refused, naming the file", "hangs without a word"
    ),
    "D26": Drill("no srun, a half-set environment", "refused; no world of one"),
    "D27": Drill("Slurm: a chain of time limits", "requeued until done, 0 steps redone"),
    "D28": Drill("Slurm: preemption, both configurations", "requeued once, 0 steps redone"),
    "D29": Drill("Slurm: a node is lost", "requeued; a rank left behind publishes nothing"),
    "D30": Drill("Slurm: adapt, then tune", "tune begins once, and only after DONE"),
    "D31": Drill("Slurm: scancel", "saved, CANCELLED, not requeued"),
    "D32": Drill("Slurm: a crash loop; a fatal error", "three attempts; one attempt"),
    "D33": Drill("Slurm: one element of a sweep fails", "the others are done; ports differ"),
    "D34": Drill(
        "evil checkpoints, prompts and names",
        "no code run, no byte outside",
        "unpickles a shard: its code runs",
    ),
    "D35": Drill("secrets in the environment and the command", "in no file and on no screen"),
    "D36": Drill("permissions under umask 077", "folders 0700, files 0600"),
    "D37": Drill("clocks that jump", "chosen by step and manifest, not by time"),
    "D38": Drill("resumed with another recipe, data or backbone", "refused, with both values"),
    "D39": Drill("the network disk is away now and then", "tried again; nothing is lost"),
}
