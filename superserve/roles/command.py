"""How each command begins and ends, whatever its environment: `run`, which every entry point calls.

It imports only Python's own modules and `superserve.errors`, and the command itself inside its guard: a
broken environment often shows while numpy, ZeroMQ or torch are loaded. An error of the system then ends the
command in one line on stderr. So does a SuperServeError, by `plain_errors` around the command's function.
Bugs keep their traceback.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from superserve.errors import SuperServeError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_OTHERS = r"(?!(superserve|router|gpu_worker|loadgen|profiles|cluster|__main__)(\.|$))"
_ENDING = (signal.SIGTERM, signal.SIGHUP)
_HEARD = (*_ENDING, signal.SIGINT, signal.SIGCHLD)
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_NO_TEMPORARY = "No usable temporary directory"  # of `tempfile`: an error without a file's name
_NO_THREAD = "can't start new thread"  # Python's only word for it: a plain RuntimeError
_TEXT = 500  # characters of a message; some libraries put a page into theirs


def run(module: str, name: str | None = None) -> NoReturn:
    """Run the click command `cli` of a module, and exit.

    Args:
        module: Where the command is, such as "router.cli".
        name: What its help calls it; the name of the script if None.
    """
    begin()
    code = 1
    try:
        with one_line():
            command = importlib.import_module(module).cli
            _unwind_on_signals()
            command(prog_name=name)
            code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    sys.exit(_flushed(code))


@contextlib.contextmanager
def plain_errors(*more: type[Exception]) -> Iterator[None]:
    """Print a command's errors without a traceback; the innermost decorator of its function.

    Args:
        more: Other errors that the user can fix.
    """
    errors: tuple[type[Exception], ...] = (SuperServeError, *more)
    try:
        yield
    except BrokenPipeError:
        raise  # an OSError that no user can fix: click ends the command
    except errors as error:
        import click  # noqa: PLC0415  applications that embed the client may not have it

        raise click.ClickException(str(error)) from error


def begin() -> None:
    """Make good what the environment lacks: streams, their encodings, and signals that would never come."""
    _open_streams()
    for stream in (sys.stdout, sys.stderr):
        _write_any_text(stream)
    # A parent that waits for signals in a thread blocks them, and its children inherit that: ours would
    # never learn that they are to end.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
    # Pictures go to files; a notebook names a backend here that this environment may lack.
    os.environ["MPLBACKEND"] = "agg"
    # Ignored, it has the kernel forget how children ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Until the command is loaded there is nothing to tidy, and an exception in the midst of a library's own
    # initialisation may crash it. What the user has ignored, as nohup does, stays so.
    for number in (*_ENDING, signal.SIGINT):
        if signal.getsignal(number) in _DEFAULTS:
            signal.signal(number, _end_at_once)
    # A mask that closes files to their owner: we could not read what we write.
    os.umask(os.umask(0o077) & 0o077)
    _pass_over_others_warnings()
    import logging  # noqa: PLC0415  only now would Ctrl-C be no traceback

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns of caches that cannot be written


def _pass_over_others_warnings() -> None:
    """Where warnings are errors have them be so in this package alone: a library's, no user can fix."""
    if any(action == "error" for action, *_ in warnings.filters):
        warnings.filterwarnings("ignore", module=_OTHERS)


def _end_at_once(number: int, _frame: FrameType | None) -> NoReturn:
    os._exit(128 + number)


def _unwind_on_signals() -> None:
    """Have signals that end Python unwind first: a command has promised to remove files and to stop roles."""
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in _ENDING:
        if signal.getsignal(number) is _end_at_once:
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> NoReturn:
    """End by unwinding; a second signal does not interrupt that."""
    for other in _ENDING:
        signal.signal(other, signal.SIG_IGN)
    raise SystemExit(128 + number)


def _open_streams() -> None:
    """Lead closed standard streams nowhere: else the next socket or file takes a stream's number."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            # The lowest number that is free, which is this one.
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def _write_any_text(stream: object) -> None:
    """Have a stream write what its encoding lacks, a line of a table say, as a question mark."""
    encoding = str(getattr(stream, "encoding", None) or "").replace("_", "-").lower()
    errors = "backslashreplace" if encoding in ("utf-8", "utf8") else "replace"
    if reconfigure := getattr(stream, "reconfigure", None):
        reconfigure(errors=errors)


@contextlib.contextmanager
def one_line() -> Iterator[None]:
    """End a program in one line where the system has not what it takes."""
    try:
        yield
    except KeyboardInterrupt:
        _fail("Aborted!")
    except MemoryError as error:
        _fail(f"Error: out of memory: {_text(error)}" if str(error) else "Error: out of memory")
    except (
        SuperServeError
    ) as error:  # of a package while it is loaded; a command's own are `plain_errors`' affair
        _fail(f"Error: {_text(error)}")
    except EOFError:
        _fail("Error: a compiled file is cut off, as a full disk leaves it: remove the folders __pycache__")
    except ImportError as error:
        _fail(f"Error: a library cannot be loaded: {_text(_root(error))}")
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise SystemExit(128 + signal.SIGPIPE) from None  # its reader has left, and knows
        _fail(f"Error: {_text(error)}")
    except RuntimeError as error:
        # Python 3.11 wraps what a signal raises while a class is being made.
        root = _root(error)
        if isinstance(root, SystemExit):
            raise root from None
        if isinstance(root, KeyboardInterrupt):
            _fail("Aborted!")
        if _NO_THREAD not in str(error):
            raise
        _fail("Error: no more threads can be started: expected a higher limit of processes (ulimit -u)")


def _root(error: BaseException) -> BaseException:
    """Return what came first: libraries raise pages of advice from it."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def _text(error: BaseException) -> str:
    """Return an error's message as one line."""
    if isinstance(error, FileNotFoundError) and error.filename is None:
        if _NO_TEMPORARY in str(error):
            said = f"{error.strerror}: {_why_no_temporary()}"
        else:
            said = "the working folder is gone: change to one that is there"
    elif isinstance(error, OSError) and error.strerror:
        names = [
            os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)
        ]
        said = ": ".join([*names, error.strerror])
    else:
        said = str(error) or type(error).__name__
    line = " ".join(said.split())
    return line if len(line) <= _TEXT else f"{line[:_TEXT]}..."


def _why_no_temporary() -> str:
    """Return why no temporary file can be written: `tempfile` tries its folders, and keeps the reasons."""
    name = Path(os.environ.get("TMPDIR") or "/tmp", f".superserve-{os.getpid()}")  # noqa: S108  as it does
    try:
        with open(name, "xb", buffering=0) as file:  # noqa: PTH123  without a buffer
            file.write(b"?")
    except OSError as error:
        return f"{name.parent}: {error.strerror}"
    finally:
        name.unlink(missing_ok=True)
    return "now there is one"


def _fail(line: str) -> NoReturn:
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()
    raise SystemExit(1)


def _flushed(code: int) -> int:
    """Return the exit code, once what was printed is out; where it cannot be, Python would say more."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except ValueError:
            continue  # closed on purpose
        except OSError as error:
            if number == 1 and code == 0:
                code = 128 + signal.SIGPIPE if error.errno == errno.EPIPE else 1
                with contextlib.suppress(OSError, ValueError):
                    sys.stderr.write(f"Error: {_text(error)}\n")
                    sys.stderr.flush()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)
    return code
