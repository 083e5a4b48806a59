from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

from softprompt_dist.launcher import FLAGS, spell_module_flag_as_deepspeed_does


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("--num_gpus 2 -m pkg.mod --steps 3", "--num_gpus 2 --module pkg.mod --steps 3"),
        ("-m pkg.mod", "--module pkg.mod"),
        ("--num_gpus=2 -m pkg.mod", "--num_gpus=2 --module pkg.mod"),
        ("--no_ssh --node_rank 0 -m pkg.mod", "--no_ssh --node_rank 0 --module pkg.mod"),
        ("--node_rank -1 -m pkg.mod", "--node_rank -1 --module pkg.mod"),
        ("--a_flag_of_a_later_release -m pkg.mod", "--a_flag_of_a_later_release --module pkg.mod"),
        ("--num_gpus 2 -m pkg.mod -m theirs", "--num_gpus 2 --module pkg.mod -m theirs"),
    ],
)
def test_m_before_the_module_becomes_module(typed: str, understood: str) -> None:
    argv = ["/somewhere/bin/deepspeed", *typed.split()]
    spell_module_flag_as_deepspeed_does(argv)
    assert argv[1:] == understood.split()


@pytest.mark.parametrize(
    "typed",
    [
        "train.py -m theirs",
        "--num_gpus 2 train.py -m theirs",
        "--no_ssh train.py -m theirs",
        "--module pkg.mod -m theirs",
        "-H hosts train.py -m theirs",
        "--num_gpus",
        "",
    ],
)
def test_everything_else_is_left_alone(typed: str) -> None:
    argv = ["deepspeed", *typed.split()]
    spell_module_flag_as_deepspeed_does(argv)
    assert argv[1:] == typed.split()


LAUNCHED = """
import signal, sys
from softprompt_dist import launcher
before = [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
launcher.prepare(sys.argv)
after = [signal.getsignal(n) for n in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)]
print(before == after, *sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("typed", "is_left_alone", "understood"),
    [
        (
            "--num_gpus 2 -m softprompt_dist.train -m x",
            False,
            "--module softprompt_dist.train -m x",
        ),
        ("--module --num_gpus 2 softprompt_dist.train", False, "2 softprompt_dist.train"),
        ("--num_gpus 2 -m theirs.train softprompt_dist.train", True, "-m theirs.train"),
        (
            "--num_gpus 2 train.py -m softprompt_dist.train",
            True,
            "train.py -m softprompt_dist.train",
        ),
        ("-m softprompt_distant.train", True, "-m softprompt_distant.train"),
        ("--num_gpus 2", True, "--num_gpus 2"),
    ],
)
def test_only_launches_of_this_package_are_prepared(
    typed: str, is_left_alone: bool, understood: str
) -> None:
    command = [sys.executable, "-c", LAUNCHED, *typed.split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{is_left_alone} ")
    assert understood in said


def test_deepspeed_understands_and_has_the_flags_we_know(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.launcher import runner

    parsers = []
    parse = argparse.ArgumentParser.parse_args

    def spy(parser: argparse.ArgumentParser, *args: object, **kwargs: object) -> object:
        parsers.append(parser)
        return parse(parser, *args, **kwargs)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", spy)
    argv = ["deepspeed", "--num_gpus", "2", "-m", "pkg.mod", "--recipe", "demo", "-m", "theirs"]
    spell_module_flag_as_deepspeed_does(argv)
    options = runner.parse_args(argv[1:])

    assert options.module
    assert options.user_script == "pkg.mod"
    assert options.user_args == ["--recipe", "demo", "-m", "theirs"]
    flags = [a.option_strings for a in parsers[0]._actions if a.option_strings and a.nargs == 0]
    assert {name for names in flags for name in names} == FLAGS
