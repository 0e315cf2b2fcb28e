"""Entry point of the command line: runs a command and turns what it raises into one line and an exit status.

Status 0 is success, 2 bad input, 1 a failure at run time, 130 an interrupt. A traceback is shown only with
``--debug``, which may stand anywhere before a bare ``--``. Knows no command.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import cast

from splitrun.errors import SplitrunError

EXIT_INTERRUPTED = 130
SPINS = "1000"
"""How often an idle thread of torch's OpenMP runtime looks for work before it sleeps. Its own 300,000 looks make every
product up to thirty times slower as soon as another process wants the processor."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that ``arguments`` (default: the process's) name; returns its exit status."""
    words, debug = _without_debug(list(sys.argv[1:] if arguments is None else arguments))
    if not debug:
        sys.excepthook = _report_unexpected
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not None, which is a closed one's
            stream.reconfigure(errors="replace")  # bars and signs are not in every encoding
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is first imported
    if os.environ.get("SPLITRUN_LOG") == "json":
        from splitrun.engine.record import log_json

        log_json("coordinator")
    from typer import BadParameter
    from typer.main import get_command

    from splitrun.cli.app import app

    # Every fault of usage has this base, which typer exports under no name of its own.
    usage_error = cast(type[BadParameter], BadParameter.__mro__[1])
    try:
        # Words that are none ask for the help, which has many lines.
        # Not through the app's own call, which would put typer's report of faults in the place of ours.
        status = get_command(app)(args=words, prog_name="splitrun", standalone_mode=not words)
        return status if isinstance(status, int) else 0
    except usage_error as error:
        path = error.ctx.command_path if error.ctx else "splitrun"
        told = one_line(error.format_message()).replace("Value error, ", "").rstrip(".")
        print(f"splitrun: {told}; see {path} --help", file=sys.stderr)
        return 2
    except SplitrunError as error:
        if debug:
            raise
        print(f"splitrun: {one_line(str(error))}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, as in `splitrun run ... | head`: that is no fault, and later flushes at
        # interpreter exit must not complain either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + getattr(signal, "SIGPIPE", 13)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = error.filename or "the output, or the folder for temporary files (TMPDIR)"
        print(f"splitrun: there is no room for {where}: {error.strerror}", file=sys.stderr)
        return 1
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    finally:
        if arguments is None:
            # What is left is the interpreter's own end, of which an interrupt would only make a traceback.
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def one_line(message: str) -> str:
    """The message with every run of white space made one blank."""
    return " ".join(message.split())


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"]
    return kept + words[end:], len(kept) < end


def _report_unexpected(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an error that nobody translated as one line; Python then exits with status 1, or by the interrupt."""
    if issubclass(kind, KeyboardInterrupt):
        return
    print(
        f"splitrun: unexpected {kind.__name__}: {one_line(str(error))}; the same command with --debug shows where",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
