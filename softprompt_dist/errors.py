"""Errors a user can act on: each message gives the value, the rule and the remedy."""


class SoftpromptError(Exception):
    """Base of every error that is shown to the user as a message, not as a traceback."""

    exit_code = 2
    on_all_ranks = False
    """Whether every rank raises this same error, so that one of them can speak for all."""


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
