from __future__ import annotations

import errno
import os

import pytest

from softprompt_dist.errors import ConfigError, DataError, NonFiniteLossError
from softprompt_dist.parallel import verb
from softprompt_dist.parallel.verb import VerbParser, run_verb


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verb, "_GRACE_SECONDS", 0.0)


def failing(error: BaseException):
    def main(argv: object = None) -> None:
        raise error

    return main


def exit_code(main, argv=()) -> object:
    with pytest.raises(SystemExit) as ended:
        run_verb(main, list(argv))
    return ended.value.code


def test_success_is_silent_and_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda argv: None) == 0
    assert capsys.readouterr() == ("", "")


def test_user_error_is_one_message_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(failing(DataError("row 7 is empty"))) == 2
    assert capsys.readouterr().err == "error: row 7 is empty\n"
    assert exit_code(failing(NonFiniteLossError("loss is nan"))) == 4


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    exit_code(failing(DataError("row 7 is empty")), ["--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_full_or_forbidden_disk_is_a_user_error(
    number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(failing(OSError(number, os.strerror(number), "runs/demo"))) == 2
    said = capsys.readouterr().err
    assert "runs/demo" in said
    assert os.strerror(number) in said
    assert "--run-dir" in said


def test_ctrl_c_has_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: Interrupted.\n"


@pytest.mark.parametrize("bug", [ValueError("ours"), OSError(errno.EBADF, "ours")])
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)):
        run_verb(failing(bug), [])


def test_another_rank_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert exit_code(failing(DataError("my disk is full"))) == 2
    assert capsys.readouterr().err == "[rank 3] error: my disk is full\n"


def parser() -> VerbParser:
    made = VerbParser("tune", "Tune.")
    made.add_recipe_options()
    return made


def test_wrong_option_is_a_config_error_with_usage() -> None:
    with pytest.raises(ConfigError, match=r"(?s)softprompt tune: .*--recpie.*usage:"):
        parser().parse_args(["--recpie", "demo"])


def test_options_are_not_abbreviated() -> None:
    with pytest.raises(ConfigError):
        parser().parse_args(["--rec", "demo"])


def test_launcher_s_local_rank_is_taken_and_overrides_collect() -> None:
    typed = ["--local_rank=1", "--set", "a.b=1", "--recipe", "demo", "--set", "c=2"]
    options = parser().parse_args(typed)
    assert options.overrides == ["a.b=1", "c=2"]
    assert options.recipe == "demo"
    assert not options.debug


@pytest.mark.parametrize(("rank", "prints"), [("0", True), ("1", False)])
def test_help_comes_from_one_rank(
    rank: str, prints: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert exit_code(parser().parse_args, ["--help"]) == 0
    assert ("usage: softprompt tune" in capsys.readouterr().out) == prints
