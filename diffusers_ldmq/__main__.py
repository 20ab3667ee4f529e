"""Entry point of `ldmq` and `python -m diffusers_ldmq`: every user error one line and exit code 2, Ctrl-C 130."""

import sys

from .errors import LDMQError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit. arguments: default sys.argv."""
    sys.exit(_run(arguments))


def _run(arguments: list[str] | None) -> int:
    from .terminal import INTERRUPTED, USER_ERROR, complain

    try:
        from .cli import app  # the slow import, interruptible like everything after it

        app(arguments, prog_name="ldmq")
    except LDMQError as cause:
        complain(str(cause))
        return USER_ERROR
    except BrokenPipeError:
        return 1  # the reader of our output went away
    except OSError as cause:
        complain(f"{cause.filename or 'reading or writing'}: {cause.strerror or cause}")
        return USER_ERROR
    except KeyboardInterrupt:
        complain("interrupted; no unfinished result was left behind")
        return INTERRUPTED
    except SystemExit as request:  # typer turns its own usage errors and Ctrl-C into exits
        if request.code == INTERRUPTED:
            complain("interrupted; no unfinished result was left behind")
        return request.code if isinstance(request.code, int) else int(request.code is not None)
    return 0


if __name__ == "__main__":
    main()
