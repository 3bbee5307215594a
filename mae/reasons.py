"""In a few words why something could not be read or written."""


def reason_of(error: BaseException) -> str:
    """The system's word where it was the system, else the first line of what the error was raised from."""
    causes = [error]
    while (x := causes[-1].__cause__ or causes[-1].__context__) is not None and x not in causes:
        causes.append(x)
    # PyTorch says a position alone and datasets that there was an error, and both wrap what the system said.
    cause = next((x for x in causes if isinstance(x, OSError) and x.strerror), error.__cause__ or error)
    return getattr(cause, "strerror", None) or (str(cause).strip().splitlines() or [type(cause).__name__])[0]
