"""Families of hostile environments. Each draws one variant from a generator, so a seed repeats it."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

NOBODY = 54_321
"""A user that has no entry in passwd."""


@dataclass(frozen=True, slots=True)
class Hostile:
    """One environment, as data: a process of its own carries it out.

    Paths are relative to the pair's folder, which holds `home`, `tmp`, `work` (where commands are typed) and
    `out` (where results go); `{base}` in a value of `env` is that folder.

    Attributes:
        what: In words, for who reads a failure.
        env: Variables set; None removes one.
        mounts: What is mounted over a folder: "readonly", "full" (no byte is left), or "tiny" (8 KiB).
        files: Files that lie in a folder beforehand; None is a folder.
        modes: Permissions of paths.
        limits: Resource limits by their name.
        umask: The umask.
        streams: Standard streams by name: "closed", "full", "broken" (its reader has left), "terminal".
        ignored: Signals that are ignored.
        blocked: Signals that are blocked.
        sent: Signals sent to the command, each so many seconds after its start.
        cwd: Where the command is typed; "" is a folder that is gone.
        user: Who types it; None is who runs the tests.
        out: The file that results go to, in this folder.
        excuse: What an error line may then speak of, as a pattern; None if the command has to work.
    """

    what: str
    env: dict[str, str | None] = field(default_factory=dict)
    mounts: dict[str, str] = field(default_factory=dict)
    files: dict[str, str | None] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    umask: int = 0o022
    streams: dict[str, str] = field(default_factory=dict)
    ignored: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()
    sent: tuple[tuple[float, int], ...] = ()
    cwd: str = "cwd"
    user: int | None = None
    out: str = "out"
    excuse: str | None = None


Draw = Callable[[random.Random], Hostile]
FAMILIES: dict[str, Draw] = {}


def family(draw: Draw) -> Draw:
    """Enter a family, under its function's name."""
    FAMILIES[draw.__name__.replace("_", " ")] = draw
    return draw


# --- what is set ------------------------------------------------------------------------------


@family
def locale(rng: random.Random) -> Hostile:
    """Locales of plain containers, and ones that are not there."""
    name = rng.choice(["C", "POSIX", "C.UTF-8", "xx_YY.UTF-8", "de_DE", "", None])
    return Hostile(f"LC_ALL {name}", {"LC_ALL": name, "LANG": None, "LANGUAGE": "xx"})


@family
def not_utf_8(rng: random.Random) -> Hostile:
    """Terminals and files that are not UTF-8."""
    env: dict[str, str | None] = rng.choice([
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"},
    ])  # fmt: skip
    return Hostile("", env)


@family
def no_home(rng: random.Random) -> Hostile:
    """HOME unset or empty: passwd has it."""
    return Hostile("", {"HOME": rng.choice([None, ""])})


@family
def strange_home(rng: random.Random) -> Hostile:
    """HOME not there, a file, a relative path, one that is not UTF-8."""
    home = rng.choice(
        ["{base}/none/at/all", "{base}/cwd/plain", "relative", "{base}/h\udcff me", "/dev/null"]
    )
    return Hostile(repr(home), {"HOME": home}, files={"cwd/plain": "text"}, excuse=r"plain|/dev/null|h.*me")


@family
def read_only_home(rng: random.Random) -> Hostile:
    """A home where nothing can be written."""
    kind = rng.choice(["readonly", "full"])
    return Hostile(kind, mounts={"home": kind}, excuse=r"Read-only file system|No space left")


@family
def no_passwd_entry(rng: random.Random) -> Hostile:
    """A container's user of its own, with and without HOME."""
    home = rng.choice([None, "/", "", "{base}/home"])
    excuse = None if home == "{base}/home" else r"HOME is not set|Permission denied|~"
    return Hostile(f"HOME {home}", {"HOME": home, "USER": None, "LOGNAME": None}, user=NOBODY, excuse=excuse)


@family
def no_tmpdir(rng: random.Random) -> Hostile:
    """TMPDIR that is not there, or no folder: Python falls back to /tmp."""
    value = rng.choice(["{base}/none", "{base}/cwd/plain", "", "relative/none", "/dev/null"])
    return Hostile(value, {"TMPDIR": value}, files={"cwd/plain": "text"})


@family
def full_tmpdir(rng: random.Random) -> Hostile:
    """TMPDIR where nothing can be written."""
    kind = rng.choice(["full", "readonly", "tiny"])
    return Hostile(kind, mounts={"tmp": kind}, excuse=r"[Nn]o space (is )?left|Read-only file system")


@family
def strange_tmpdir(rng: random.Random) -> Hostile:
    """Paths longer than a socket's may be, with spaces, newlines and bytes that are no text."""
    name = rng.choice(
        ["long" * 40, "with space", "new\nline", "b\udcff", "{curly}", "%percent%d", '"quote', "-dash"]
    )
    folder = f"tmp/{name}"
    return Hostile(repr(name[:12]), {"TMPDIR": f"{{base}}/{folder}"}, files={folder: None}, excuse=None)


@family
def strange_state(rng: random.Random) -> Hostile:
    """State folders whose paths are long, odd, or of the wrong kind."""
    value = rng.choice([
        "{base}/home/" + "long" * 40, "{base}/home/with space", "{base}/home/new\nline",
        "{base}/home/%percent%d", "relative", "{base}/cwd/plain", "/dev/null", "/proc/none", "~/state",
        "{base}/home/b\udcff",
        "{base}/home/;x",
    ])  # fmt: skip
    return Hostile(
        repr(value), {"SUPERSERVE_STATE": value}, files={"cwd/plain": "text"},
        excuse=r"SUPERSERVE_STATE|state|plain|/dev/null|/proc|home",
    )  # fmt: skip


@family
def python_variables(rng: random.Random) -> Hostile:
    """What other programs' users set for Python."""
    return Hostile("", dict(rng.choice([
        {"PYTHONOPTIMIZE": "2"}, {"PYTHONWARNINGS": "error"}, {"PYTHONDONTWRITEBYTECODE": "1"},
        {"PYTHONSTARTUP": "/none.py"}, {"PYTHONSAFEPATH": "1"}, {"PYTHONHASHSEED": "0"},
        {"PYTHONDEVMODE": "1"},
        {"PYTHONUNBUFFERED": "1"}, {"PYTHONNOUSERSITE": "1"}, {"PYTHONINSPECT": ""},
        {"PYTHONMALLOC": "debug"},
        {"PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "error"}, {"PYTHONPLATLIBDIR": "lib"},
    ])))  # fmt: skip


@family
def python_path(rng: random.Random) -> Hostile:
    """A PYTHONPATH of folders that are not there, or that hold modules of other programs."""
    value = rng.choice(["{base}/none", "{base}/cwd", ":", "relative", "{base}/cwd:{base}/none"])
    return Hostile(
        value, {"PYTHONPATH": value}, files={"work/helpers.py": "raise RuntimeError", "work/notes.txt": "x"}
    )


@family
def terminal(rng: random.Random) -> Hostile:
    """Terminals of one column, of none, of an unknown kind."""
    return Hostile("", dict(rng.choice([
        {"COLUMNS": "1"}, {"COLUMNS": "0"}, {"COLUMNS": "-5"}, {"COLUMNS": "wide"},
        {"COLUMNS": "1", "LINES": "1"},
        {"TERM": "dumb"}, {"TERM": None}, {"TERM": "no-such-terminal"}, {"NO_COLOR": "1"},
        {"FORCE_COLOR": "1"},
        {"COLUMNS": "100000"}, {"CLICOLOR_FORCE": "1"}, {"TTY_COMPATIBLE": "1", "COLUMNS": "2"},
    ])))  # fmt: skip


@family
def proxies(rng: random.Random) -> Hostile:
    """Proxies that answer nobody, and are no business of ours."""
    name = rng.choice(["http_proxy", "https_proxy", "ALL_PROXY", "HTTP_PROXY"])
    return Hostile(name, {name: "http://127.0.0.1:9", "no_proxy": None})


@family
def own_variables(rng: random.Random) -> Hostile:
    """Variables of ours, and of the libraries under us, set to garbage."""
    env: dict[str, str | None] = rng.choice([
        {"SUPERSERVE_KEYS": "/none/at/all"}, {"SUPERSERVE_KEYS": ""}, {"SUPERSERVE_KEYS": "~nobody/x"},
        {"SUPERSERVE_STATE": ""}, {"XDG_STATE_HOME": "relative"}, {"XDG_STATE_HOME": ""},
        {"SUPERSERVE_READY_FD": "garbage"}, {"SUPERSERVE_READY_FD": "999"}, {"SUPERSERVE_READY_FD": "-1"},
        {"SUPERSERVE_PARENT_PID": "garbage"}, {"SUPERSERVE_PARENT_PID": "1"},
        {"OMP_NUM_THREADS": "many"}, {"MPLBACKEND": "no-such"}, {"MPLCONFIGDIR": "/none/at/all"},
        {"SUPERSERVE_HOST_FOLDER": "/none"}, {"SUPERSERVE_TIMING": "garbage"},
        {"SUPERSERVE_SSH_CONFIG": "/none"}, {"MALLOC_ARENA_MAX": "1"},
        {"MPLBACKEND": "module://of_a_notebook.backend_inline"},
    ])  # fmt: skip
    return Hostile(str(env), env, excuse=r"SUPERSERVE|KEYS|/none|process 1, which started this one")


@family
def time_zone(rng: random.Random) -> Hostile:
    """Time zones that are not there, and far ones."""
    return Hostile(
        "", {"TZ": rng.choice(["garbage", "", "UTC-25", ":/etc/passwd", "Pacific/Kiritimati", "a" * 300])}
    )


# --- where it is typed, and what lies there ------------------------------------------------------


@family
def shadowing_modules(rng: random.Random) -> Hostile:
    """Modules in the working folder that are called as ours, Python's, or a library's."""
    names = ["router.py", "cluster/__init__.py", "random.py", "json.py", "numpy.py", "loadgen.py", "click.py",
             "superserve/__init__.py", "zmq/__init__.py", "profiles.py", "gpu_worker.py", "signal.py",
             "types.py", "sitecustomize.py", "usercustomize.py", "orjson.py",
             "supervisor/__init__.py"]  # fmt: skip
    chosen = rng.sample(names, rng.randint(1, len(names)))
    return Hostile(
        ", ".join(chosen), files={f"work/{name}": "raise RuntimeError('shadow')\n" for name in chosen}
    )


@family
def gone_folder(rng: random.Random) -> Hostile:
    """A working folder that was removed under our feet."""
    return Hostile("", {"PWD": rng.choice(["", "/none", None])}, cwd="", excuse=r"working folder")


@family
def unreadable_folder(rng: random.Random) -> Hostile:
    """A working folder that may not be read, or not be entered again."""
    mode = rng.choice([0o000, 0o111, 0o444, 0o555])
    return Hostile(oct(mode), modes={"cwd": mode}, user=NOBODY, excuse=r"Permission denied|working folder")


@family
def read_only_system(rng: random.Random) -> Hostile:
    """Nothing can be written anywhere but in /tmp."""
    folders = rng.choice([("out",), ("cwd", "out"), ("home", "cwd", "out"), ("home", "tmp", "cwd", "out")])
    return Hostile(
        " ".join(folders), mounts=dict.fromkeys(folders, "readonly"), excuse=r"Read-only file system"
    )


@family
def full_disk(rng: random.Random) -> Hostile:
    """No byte is left, or few, where results go, and perhaps elsewhere."""
    folders = rng.choice([("out",), ("home",), ("home", "out"), ("home", "tmp", "out")])
    kind = rng.choice(["full", "tiny"])
    return Hostile(
        f"{kind} {' '.join(folders)}", mounts=dict.fromkeys(folders, kind), excuse=r"No space left"
    )


@family
def strange_names(rng: random.Random) -> Hostile:
    """Results in folders whose names are odd."""
    name = rng.choice(
        ["with space", "-dash", "new\nline", "caf\u00e9", "b\udcff", "long" * 50, "%d{x}$HOME", "'\"\\"]
    )
    folder = f"out/{name}"
    excuse = r"expected UTF-8|b\\xff" if "\udcff" in name else None
    return Hostile(repr(name[:12]), files={folder: None}, out=folder, excuse=excuse)


@family
def strange_targets(rng: random.Random) -> Hostile:
    """Results that go to a folder, into a missing one, over a file, through a link, or nowhere."""
    how = rng.choice(["folder", "missing", "file", "dangling", "below a file", "too long", "read-only"])
    files: dict[str, str | None] = {"out/plain": "text"}
    if how == "folder":
        files |= dict.fromkeys([f"out/{name}" for name in ("r.json", "r.npz", "r.html", "r.svg", "r.log")])
    if how == "file":
        files |= dict.fromkeys(
            [f"out/{name}" for name in ("r.json", "r.npz", "r.html", "r.svg", "r.log")], "old"
        )
    out = {"missing": "out/not/there", "below a file": "out/plain", "too long": "out/" + "x" * 300}.get(
        how, "out"
    )
    if how == "dangling":
        files |= {
            f"out/{name}": "-> /none/at/all" for name in ("r.json", "r.npz", "r.html", "r.svg", "r.log")
        }
    modes = {"out": 0o555} if how == "read-only" else {}
    user = NOBODY if how == "read-only" else None
    excuse = None if how == "file" else r"out|r\.|directory|folder"
    return Hostile(how, files=files, modes=modes, user=user, out=out, excuse=excuse)


# --- limits -----------------------------------------------------------------------------------


@family
def umask_open(_: random.Random) -> Hostile:
    """Whatever is made is open to everybody, unless we see to it."""
    return Hostile("", umask=0)


@family
def umask_closed(rng: random.Random) -> Hostile:
    """Whatever is made is closed, to its owner too."""
    umask = rng.choice([0o077, 0o777, 0o277, 0o177, 0o400])
    user = rng.choice([None, NOBODY])
    excuse = None if umask == 0o077 else r"umask|Permission denied"
    return Hostile(f"{umask:o} as {user}", umask=umask, user=user, excuse=excuse)


@family
def few_descriptors(rng: random.Random) -> Hostile:
    """Few open files."""
    n = rng.choice([8, 12, 16, 20, 24, 32, 48, 64, 128])
    return Hostile(f"{n}", limits={"NOFILE": n}, excuse=r"[Tt]oo many open files|descriptors|open files")


@family
def little_memory(rng: random.Random) -> Hostile:
    """Little address space: from too little for Python itself to enough."""
    mebibytes = rng.choice([48, 64, 96, 128, 192, 256, 384, 512, 1_024, 2_048])
    return Hostile(
        f"{mebibytes} MiB",
        limits={"AS": mebibytes << 20},
        excuse=r"[Mm]emory|thread|map segment|limit of memory",
    )


@family
def few_processes(rng: random.Random) -> Hostile:
    """No or few more processes and threads."""
    n = rng.choice([1, 2, 3, 5, 8, 16])
    return Hostile(
        f"{n}", limits={"NPROC": n}, user=NOBODY, excuse=r"Resource temporarily unavailable|thread|process"
    )


@family
def small_files(rng: random.Random) -> Hostile:
    """Files may not grow beyond some bytes."""
    n = rng.choice([0, 1, 512, 4_096])
    return Hostile(f"{n} bytes", limits={"FSIZE": n}, excuse=r"File too large")


# --- streams and signals ------------------------------------------------------------------------


@family
def closed_streams(rng: random.Random) -> Hostile:
    """Streams that are closed, one or all."""
    names = rng.choice(
        [("stdin",), ("stdout",), ("stderr",), ("stdin", "stdout"), ("stdin", "stdout", "stderr")]
    )
    return Hostile(" ".join(names), streams=dict.fromkeys(names, "closed"))


@family
def all_streams_closed(_: random.Random) -> Hostile:
    """As some cron jobs and daemons start programs."""
    return Hostile("", streams=dict.fromkeys(("stdin", "stdout", "stderr"), "closed"))


@family
def full_stdout(rng: random.Random) -> Hostile:
    """Output to a disk that is full."""
    streams = rng.choice([{"stdout": "full"}, {"stdout": "full", "stderr": "full"}])
    return Hostile(" ".join(streams), streams=streams, excuse=r"No space left")


@family
def full_stderr(rng: random.Random) -> Hostile:
    """Errors go nowhere."""
    return Hostile("", streams={"stderr": rng.choice(["full", "broken"])}, excuse=r"")


@family
def reader_left(rng: random.Random) -> Hostile:
    """A pipe whose reader has left, as `| head` leaves it; SIGPIPE ignored or not."""
    ignored = rng.choice([(), (int(signal.SIGPIPE),)])
    return Hostile("", streams={"stdout": "broken"}, ignored=ignored, excuse=r"Broken pipe")


@family
def ignored_signals(rng: random.Random) -> Hostile:
    """As nohup, cron and some supervisors leave them."""
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD, signal.SIGTERM, signal.SIGQUIT]
    chosen = rng.sample(numbers, rng.randint(1, len(numbers)))
    return Hostile(
        " ".join(number.name for number in chosen), ignored=tuple(int(number) for number in chosen)
    )


@family
def blocked_signals(rng: random.Random) -> Hostile:
    """As a parent with threads that wait for signals leaves them."""
    numbers = [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE, signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1]
    chosen = rng.sample(numbers, rng.randint(1, len(numbers)))
    return Hostile(
        " ".join(number.name for number in chosen), blocked=tuple(int(number) for number in chosen)
    )


@family
def one_signal(rng: random.Random) -> Hostile:
    """A signal in the midst of it."""
    number = rng.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
    at_s = round(rng.uniform(0.05, 2.0), 2)
    return Hostile(f"{number.name} after {at_s} s", sent=((at_s, int(number)),), excuse=r"")


@family
def two_signals(rng: random.Random) -> Hostile:
    """Two, as of an impatient user."""
    first, second = rng.choices([signal.SIGTERM, signal.SIGHUP, signal.SIGINT], k=2)
    at_s, later_s = round(rng.uniform(0.05, 2.0), 2), round(rng.uniform(0.0, 0.5), 2)
    return Hostile(
        f"{first.name} after {at_s} s, {second.name} {later_s} s later",
        sent=((at_s, int(first)), (at_s + later_s, int(second))), excuse=r"",
    )  # fmt: skip


@family
def no_terminal(_: random.Random) -> Hostile:
    """No terminal, no variables: what `env -i` leaves, with PATH."""
    names = (
        "LANG",
        "LC_ALL",
        "TERM",
        "USER",
        "LOGNAME",
        "SHELL",
        "PWD",
        "OLDPWD",
        "XDG_RUNTIME_DIR",
        "TMPDIR",
    )
    return Hostile("", dict.fromkeys(names))
