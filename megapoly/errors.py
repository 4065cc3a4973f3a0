"""The exceptions that megapoly raises for what a user can mend.

Each message names the file or key, what was found, what was expected, and what to do.
"""


class MegapolyError(Exception):
    """Base class: catch it to catch every error below.

    Attributes:
        everywhere: whether every rank raises this same error, so that one of them may speak for all.
    """

    everywhere = False


class ConfigError(MegapolyError):
    """A configuration that cannot be run, or that does not fit its surroundings."""


class DataError(MegapolyError):
    """A corpus, tokenizer or indexed dataset that is missing, damaged or does not fit."""


class CheckpointError(MegapolyError):
    """A checkpoint that is missing, damaged, or of another model or run."""


class TrainingError(MegapolyError):
    """A run that cannot go on: a non-finite loss, no counted token, a dead rank."""


def everywhere(error: MegapolyError) -> MegapolyError:
    """Mark ``error`` as one that every rank raises alike."""
    error.everywhere = True
    return error
