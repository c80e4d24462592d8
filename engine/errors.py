"""Which errors are told in one sentence, and which of them are the user's mistake."""

from __future__ import annotations

import re

_OURS = ("engine", "sharding", "models", "benchmarks", "configs")
_NO_MEMORY = re.compile(r"out of memory|n[o']t allocate memory|CUDA allocation failed|bad_alloc", re.IGNORECASE)


def sentence(error: BaseException) -> tuple[str, bool] | None:
    """(sentence, is it a mistake of usage), or None for an error of ours that deserves its traceback.

    A ValueError of ours is the user's mistake (a recipe, a path, a dataset that is none). OSError and RuntimeError are
    failures of the run: a full disk, a lock, a library or a device that is missing.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if is_out_of_memory(error):
        return (text if "out of memory" in text else f"out of memory: {text}"), False
    if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
        return (text, True) if _raised_by_us(error) else None
    if isinstance(error, OSError):
        return _os_sentence(error), False
    if isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError | RecursionError):
        return text, False
    if isinstance(error, ImportError) and not (error.name or "").startswith(_OURS):
        return text, False
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of its GPU, did not suffice: by numpy's, torch's or DALI's error."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    )


def _raised_by_us(error: BaseException) -> bool:
    """Whether our code raised it, to tell the user something; a library's ValueError is a defect of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is None or str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] in _OURS


def _os_sentence(error: OSError) -> str:
    import errno

    place = f"{error.filename}: " if error.filename else ""
    text = f"{place}{error.strerror or error}"
    if error.errno == errno.ENOSPC:
        return f"{text}; free some space and run the same command again, it goes on where it stopped"
    return text
