"""Which errors are told in one sentence, and which of them are the user's mistake."""

from __future__ import annotations

_OURS = ("engine", "sharding", "models", "benchmarks", "configs")


def sentence(error: BaseException) -> tuple[str, bool] | None:
    """(sentence, is it a mistake of usage), or None for an error of ours that deserves its traceback.

    ValueError is the user's mistake (a recipe, a path, a dataset that is none); OSError and RuntimeError are failures
    of the run: a full disk, a lock, a library or a device that is missing.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return text, True
    if isinstance(error, OSError):
        return _os_sentence(error), False
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError | RecursionError):
        return text, False
    if isinstance(error, ImportError) and not (error.name or "").startswith(_OURS):
        return text, False
    return None


def _os_sentence(error: OSError) -> str:
    import errno

    place = f"{error.filename}: " if error.filename else ""
    text = f"{place}{error.strerror or error}"
    if error.errno == errno.ENOSPC:
        return f"{text}; free some space and run the same command again, it goes on where it stopped"
    return text
