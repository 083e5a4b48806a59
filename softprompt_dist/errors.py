"""Errors a user can act on: each message gives the value, the rule and the remedy."""

from softprompt_dist.redaction import redact_text


class SoftpromptError(Exception):
    """Base of every error that is shown to the user as a message, not as a traceback."""

    exit_code = 2
    on_all_ranks = False
    """Whether every rank raises this same error, so that one of them can speak for all."""
    outcome = "fatal"
    """What the run directory's `why` begins with. fatal: a second attempt would end the same way;
    error: it may not, so that a batch script tries again; signal, stop: nothing went wrong.
    Empty: the directory is another run's."""

    def __str__(self) -> str:
        """The message without secrets, wherever it is shown, logged or written."""
        return redact_text(super().__str__())


class ConfigError(SoftpromptError):
    """A recipe, an override, a command line or a ds_config is wrong."""


class DataError(SoftpromptError):
    """A data source, a row or a label is missing or malformed."""


class BackboneError(SoftpromptError):
    """A backbone cannot be loaded, is incomplete, or has changed."""


class PromptFileError(SoftpromptError):
    """A prompt file is unreadable, malformed, or belongs to another backbone."""


class CheckpointError(SoftpromptError):
    """No checkpoint can be written, or none of those present may be resumed."""


class MachineError(SoftpromptError):
    """The machine lacks something: a compiler, a permission, disk space, a free build lock."""

    outcome = "error"


class InvariantError(SoftpromptError):
    """An invariant of prompt tuning broke: prompts differ between ranks, the backbone moved.

    The ranks compare before they judge, so all of them raise it.
    """

    exit_code = 3
    on_all_ranks = True


class NonFiniteLossError(SoftpromptError):
    """The loss became NaN or infinite; the update was not applied and the state before it saved.

    It is the loss over all ranks, so all of them raise it.
    """

    exit_code = 4
    on_all_ranks = True


class StoppedError(SoftpromptError):
    """Somebody asked the run to stop, by a signal or a STOP file; it did, and lost nothing.

    The ranks agree before they raise it, so all of them do.
    """

    exit_code = 0
    on_all_ranks = True
    outcome = "signal"


class StopFileError(SoftpromptError):
    """The run directory has a STOP file: nothing is started in it."""

    outcome = "stop"


class DirectoryInUseError(SoftpromptError):
    """Another run works in the run directory."""

    outcome = ""  # `why` is the other run's


class SupersededError(SoftpromptError):
    """A later attempt has taken the run directory over; this one writes nothing more."""

    exit_code = 6
    on_all_ranks = True
    outcome = ""


class OwnerUnknownError(SoftpromptError):
    """Nobody can tell whose the run directory is: attempt.json cannot be read any more."""

    exit_code = 6
    on_all_ranks = True
    outcome = "error"


class HangError(SoftpromptError):
    """A rank made no progress for longer than it may."""

    exit_code = 5
    outcome = "hang"
