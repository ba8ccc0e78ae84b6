"""The tool server for code_interpreter: what code can do in it, and what it can't."""

import asyncio
import base64
import fcntl
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from mcp import Client
from mcp_types import CallToolResult, ImageContent, TextContent

from tests.processes import processes
from tests.servers import ROOT, START_TIMEOUT_S
from tests.toolservers import OverHttp, over_stdio, program
from tests.waiting import until

WALL_S = 6
LIMITS = f"--wall {WALL_S} --cpu 2 --memory 300 --disk 16 --processes 24 --runs 2".split()
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can take a right away from the server")


# It may read whatever there is, so that it can start wherever this Python is; what it starts in namespaces may not.
UNPRIVILEGED = (
    *("setpriv", "--reuid", "12345", "--regid", "12345", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
)
SYSTEM_PYTHON = "/usr/bin/python3"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the shared server stores its containers."""
    return private(tmp_path_factory.mktemp("containers"))


WITH_A_KEY = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
add_key, keyctl = (217, 219) if os.uname().machine == "aarch64" else (248, 250)
libc.syscall(keyctl, 1, None)  # a session keyring of its own
print("key", libc.syscall(add_key, b"user", b"the-hosts-key", b"s3cret", 6, -3), flush=True)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.fixture(scope="module")
def sandbox(directory: Path) -> Iterator[OverHttp]:
    """The server that most tests share, with small limits, and a secret in its environment and in its keyring."""
    command = program("sandbox", *LIMITS, "--directory", str(directory))
    with OverHttp([sys.executable, "-c", WITH_A_KEY, *command], env={"OPENAI_API_KEY": "sk-secret"}) as running:
        yield running


IDLE_S = 1000
IDLE, YOUNG = "cntr_unused_for_long", "cntr_used_just_now"


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the other server stores its containers; two are there before it starts."""
    made = private(tmp_path_factory.mktemp("few"))
    for container in (IDLE, YOUNG):
        for suffix in (".lock", ".tar"):
            (made / f"{container}{suffix}").touch()
    long_ago = time.time() - IDLE_S - 1
    os.utime(made / f"{IDLE}.lock", (long_ago, long_ago))
    return made


@pytest.fixture(scope="module")
def other(few: Path) -> Iterator[OverHttp]:
    """A server with the other options: a network, a token, little room for containers, and hardly a limit of wall time."""
    options = f"--wall 1000 --cpu 1 --disk 16 --containers 3 --all-disk 20 --idle {IDLE_S} --allow-network".split()
    command = program("sandbox", *options, "--directory", str(few))
    with OverHttp(command, env={"TOOLSERVER_TOKEN": "opensesame"}) as running:
        yield running


def private(directory: Path) -> Path:
    directory.chmod(0o700)
    return directory


def new_container() -> str:
    return f"cntr_{uuid.uuid4().hex}"


async def call(server: OverHttp, code: str, **arguments: Any) -> CallToolResult:
    async with server.client() as client:
        return await call_over(client, code, **arguments)


async def call_over(client: Client, code: str, **arguments: Any) -> CallToolResult:
    result = await client.call_tool("run_python", {"code": code, **arguments})
    assert isinstance(result, CallToolResult)
    return result


async def run(sandbox: OverHttp, code: str, **arguments: Any) -> dict[str, Any]:
    """The structured result of a run that could be started."""
    result = await call(sandbox, code, **arguments)
    assert not result.is_error, result.content
    assert result.structured_content is not None
    return result.structured_content


def text(result: CallToolResult) -> str:
    assert isinstance(result.content[0], TextContent)
    return result.content[0].text


# -- what code can do -------------------------------------------------------------------------------------------------------


async def test_it_works_over_http_and_stdio(sandbox: OverHttp, directory: Path) -> None:
    container = new_container()
    async with sandbox.client() as client:
        await works(client)
        await call_over(client, "open('mine', 'w').write('1')", container=container)
    async with Client(over_stdio("sandbox", *LIMITS, "--directory", str(directory))) as client:
        await works(client)
        # Another process that serves the same directory has the same containers, as stdio servers come and go.
        await call_over(client, "import os; os.remove('mine'); open('new', 'w').close()", container=container)
    assert (await run(sandbox, LIST, container=container))["stdout"] == "['new']\n"


async def works(client: Client) -> None:
    (tool,) = (await client.list_tools()).tools
    assert tool.name == "run_python"
    assert "There is no network." in (tool.description or "")
    assert tool.input_schema["required"] == ["code"]
    assert tool.output_schema is not None
    assert {*tool.output_schema["required"]} == {"stdout", "stderr", "exit_code", "timed_out", "files"}
    result = await call_over(client, "print('é')\nx = 20\nx + 1")
    assert result.structured_content == {
        "stdout": "é\n21\n",
        "stderr": "",
        "exit_code": 0,
        "timed_out": False,
        "files": [],
    }
    assert text(result) == "é\n21"


LIST = "import os; print(sorted(os.listdir()))"


async def test_errors_are_shown_as_in_a_notebook(sandbox: OverHttp) -> None:
    raised = await run(sandbox, "def f():\n    return input()\nprint('before')\nf()")
    assert (raised["exit_code"], raised["stdout"]) == (1, "before\n")
    assert raised["stderr"].startswith(
        'Traceback (most recent call last):\n  File "<cell>", line 4, in <module>\n    f()'
    )
    assert raised["stderr"].endswith("EOFError: EOF when reading a line\n")
    wrong = await run(sandbox, "x = (")
    assert wrong["exit_code"] == 1
    assert wrong["stderr"].startswith('  File "<cell>", line 1')
    assert (await run(sandbox, "import sys; sys.exit(3)"))["exit_code"] == 3
    assert "null bytes" in (await run(sandbox, "\0"))["stderr"]
    died = await run(sandbox, "import os; os.kill(os.getpid(), 11)")
    assert (died["exit_code"], died["timed_out"]) == (-11, False)


async def test_files_go_in_and_come_out(sandbox: OverHttp) -> None:
    given = [
        {"name": "in/numbers.csv", "text": "1,2"},
        {"name": "same.txt", "text": "same"},
        {"name": "blob", "data": base64.b64encode(b"\0\1").decode()},
    ]
    code = f"""
from pathlib import Path
Path("out").mkdir()
Path("out/sum.txt").write_text(str(sum(map(int, Path("in/numbers.csv").read_text().split(",")))))
Path("in/numbers.csv").write_text("3,4")
Path("plot.png").write_bytes({PNG!r})
Path("large.txt").write_text("x" * 100_000)
Path("blob.bin").write_bytes(Path("blob").read_bytes() * 2)
Path("link").symlink_to("/etc/passwd")
"""
    result = await call(sandbox, code, files=given)
    assert result.structured_content is not None
    made = {file.pop("name"): file for file in result.structured_content["files"]}
    assert made == {
        "in/numbers.csv": {"size": 3, "mime_type": "text/csv", "text": "3,4"},
        "out/sum.txt": {"size": 1, "mime_type": "text/plain", "text": "3"},
        "plot.png": {"size": len(PNG), "mime_type": "image/png", "text": None},
        "large.txt": {"size": 100_000, "mime_type": "text/plain", "text": None},
        "blob.bin": {"size": 4, "mime_type": "application/octet-stream", "text": None},
    }
    (image,) = result.content[1:]
    assert isinstance(image, ImageContent)
    assert (image.mime_type, base64.b64decode(image.data)) == ("image/png", PNG)
    assert "file out/sum.txt (text/plain, 1 bytes):\n3" in text(result)


async def test_open_figures_are_saved(sandbox: OverHttp) -> None:
    """With a pyplot of our own, as matplotlib is not installed here: what is called is what is tested."""
    pyplot = f"""
class Figure:
    def savefig(self, name): open(name, "wb").write({PNG!r})
def get_fignums(): return [1, 2]
def figure(number): return Figure()
"""
    files = [{"name": "matplotlib/__init__.py", "text": ""}, {"name": "matplotlib/pyplot.py", "text": pyplot}]
    result = await call(sandbox, "import matplotlib.pyplot as plt", files=files)
    assert [one.type for one in result.content] == ["text", "image", "image"]


async def test_a_container_keeps_its_files_and_no_others(sandbox: OverHttp) -> None:
    container = new_container()
    await run(sandbox, "open('mine', 'w').write('1')\nx = 1", container=container)
    again = await run(sandbox, "print(open('mine').read(), 'x' in globals())", container=container)
    assert (again["stdout"], again["files"]) == ("1 False\n", [])
    assert (await run(sandbox, LIST, container=new_container()))["stdout"] == "[]\n"
    assert (await run(sandbox, "open('gone', 'w').write('1')"))["files"][0]["name"] == "gone"
    assert (await run(sandbox, LIST))["stdout"] == "[]\n"


async def test_calls_of_one_container_take_turns(sandbox: OverHttp) -> None:
    container = new_container()
    code = """
import pathlib, time
count = pathlib.Path("count")
seen = int(count.read_text()) if count.exists() else 0
time.sleep(0.3)
print(count.write_text(str(seen + 1)) and seen)
"""
    ran = await asyncio.gather(*(run(sandbox, code, container=container) for _ in range(3)))
    assert sorted(one["stdout"] for one in ran) == ["0\n", "1\n", "2\n"]


async def test_unused_containers_are_removed(other: OverHttp, few: Path) -> None:
    await asyncio.to_thread(until, lambda: not (few / f"{IDLE}.lock").exists())
    assert {path.name for path in few.glob("cntr*")} >= {f"{YOUNG}.lock", f"{YOUNG}.tar"}
    assert not (few / f"{IDLE}.tar").exists()


async def test_the_number_of_containers_is_bounded(other: OverHttp, few: Path) -> None:
    """The least recently used one makes room; where all are in use, a new one is refused."""
    first, *later = (new_container() for _ in range(4))
    for container in (first, *later):
        await run(other, "open('mine', 'w').close()", container=container)
    assert {path.stem for path in few.glob("*.tar")} == {*later}
    busy = asyncio.create_task(run(other, "import time; time.sleep(1000)", container=later[0]))
    await asyncio.to_thread(until, lambda: in_use(few / f"{later[0]}.lock"))
    with ExitStack() as stack:
        for container in later[1:]:
            stack.enter_context(use(few, container))
        refused = await call(other, "1", container=new_container())
        assert refused.is_error
        assert "there are 3 containers, and all are in use" in text(refused)
    assert (await run(other, "1", container=new_container()))["exit_code"] == 0
    assert len([*few.glob("*.tar")]) == 3
    assert (few / f"{later[0]}.tar").exists()
    busy.cancel()
    await asyncio.gather(busy, return_exceptions=True)
    await asyncio.to_thread(until, lambda: not in_use(few / f"{later[0]}.lock"))


@contextmanager
def use(directory: Path, container: str) -> Iterator[None]:
    """Use a container, as a run of another process does."""
    with (directory / f"{container}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def in_use(lock: Path) -> bool:
    """Whether a run uses a container."""
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


async def test_the_disk_of_all_containers_is_bounded(other: OverHttp, few: Path) -> None:
    """The least recently used ones make room; a container that finds none keeps its files of before."""
    write = "import os\nif os.path.exists('mine'): print(os.path.getsize('mine'))\nopen('mine', 'wb').write(bytes(SIZE * 2**20))"
    containers = [new_container() for _ in range(3)]
    for container in containers:
        await run(other, write.replace("SIZE", "8"), container=container)
        assert sum(path.stat().st_size for path in few.glob("*.tar")) <= 20 * 2**20
    assert {path.stem for path in few.glob("*.tar")} == {*containers[1:]}
    *_, oldest, last = containers
    with use(few, oldest):
        ran = await run(other, write.replace("SIZE", "13"), container=last)
        assert ran["exit_code"] == 0
        assert "files are as they were before: containers have more than 20 MiB, and all are in use" in ran["stderr"]
    again = await run(other, write.replace("SIZE", "13"), container=last)
    assert (again["stdout"], again["stderr"]) == (f"{8 * 2**20}\n{13 * 2**20}\n", "")
    assert {path.stem for path in few.glob("*.tar")} == {last}
    assert [*few.glob("*.new")] == []


@pytest.mark.parametrize(
    "container", ["short", "../../../../etc/passwd", "cntr_0123456789/abcdef", "a" * 129, "cntr_0123456789é"]
)
async def test_a_container_is_no_path(sandbox: OverHttp, directory: Path, container: str) -> None:
    before = {*directory.glob("*.*")}
    result = await call(sandbox, "1", container=container)
    assert result.is_error
    assert "container must have 16 to 128 letters" in text(result)
    assert {*directory.glob("*.*")} == before


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "./a", "a/", "nul\0", "x" * 256])
async def test_a_given_file_stays_inside(sandbox: OverHttp, name: str) -> None:
    result = await call(sandbox, "1", files=[{"name": name, "text": "x"}])
    assert result.is_error
    assert "is not a relative path" in text(result)


UNUSABLE_FILES: list[tuple[list[dict[str, str]], str]] = [
    ([{"name": "a"}], "needs either text or data"),
    ([{"name": "a", "text": "x", "data": "eA=="}], "needs either text or data"),
    ([{"name": "a", "data": "not base64!"}], "can't be read"),
    ([{"name": "a", "text": "x"}, {"name": "a/b", "text": "x"}], "could not be run"),
    ([{"name": "a", "text": "x" * 17 * 1024 * 1024}], "could not be run"),
]


async def test_unusable_files_are_refused_and_the_container_keeps_its_own(sandbox: OverHttp) -> None:
    container = new_container()
    await run(sandbox, "open('mine', 'w').close()", container=container)
    for files, message in UNUSABLE_FILES:
        result = await call(sandbox, "print(1)", files=files, container=container)
        assert result.is_error
        assert message in text(result)
    assert (await run(sandbox, LIST, container=container))["stdout"] == "['mine']\n"


# -- what code can't do -----------------------------------------------------------------------------------------------------

CONNECT = """
import socket
def tried(family, type, use):
    try: print("reached", use(socket.socket(family, type)))
    except OSError as error: print(error.strerror)
tried(socket.AF_INET, socket.SOCK_STREAM, lambda one: one.connect(("127.0.0.1", PORT)))
"""


async def test_there_is_no_network(sandbox: OverHttp) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as abstract:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # from here it can be reached
        abstract.bind(f"\0{uuid.uuid4()}")
        abstract.listen()
        code = f"""
tried(socket.AF_UNIX, socket.SOCK_STREAM, lambda one: one.connect({abstract.getsockname()!r}))
tried(socket.AF_INET, socket.SOCK_DGRAM, lambda one: one.sendto(b"x", ("192.0.2.1", 53)))
"""
        ran = await run(sandbox, CONNECT.replace("PORT", str(port)) + code)
    refusals = ["Network is unreachable", "Address family not supported by protocol", "Network is unreachable"]
    assert ran["stdout"].splitlines() == refusals


async def test_the_network_is_there_only_if_allowed(other: OverHttp) -> None:
    hidden = f"import os; print(os.path.exists({str(ROOT / 'app')!r}), len(os.listdir('/proc/1')) > 0)"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ran = await run(other, CONNECT.replace("PORT", str(listener.getsockname()[1])) + hidden)
    assert ran["stdout"] == "reached None\nFalse True\n"  # the rest of the isolation is there


async def test_secrets_files_and_processes_of_the_host_are_out_of_sight(sandbox: OverHttp, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    secret.chmod(0o644)
    code = f"""
import os, pathlib
print(sorted(os.environ))
print([path for path in ({str(secret)!r}, {str(ROOT / "app")!r}, "/etc/shadow", "/var", "/sys") if os.path.exists(path)])
print(os.path.exists("/home") and os.listdir("/home"))
print(sorted(name for name in os.listdir("/proc") if name.isdigit()))
for path in ("/proc/1/environ", "/proc/1/fd", "/proc/1/mem", "/dev/mem", "/usr/new"):
    try:
        os.listdir(path) if path.endswith("fd") else open(path, "wb" if path == "/usr/new" else "rb").read(1)
        print("opened", path)
    except OSError:
        pass
print(sorted(os.listdir("/dev/")), sorted(os.listdir("/proc/self/fd")))
print(b"sk-secret" in b"".join(path.read_bytes() for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")))
"""
    ran = await run(sandbox, code)
    env, paths, homes, pids, devices, leaked = ran["stdout"].splitlines()
    assert env == str(["HOME", "LANG", "OMP_NUM_THREADS", "PATH", "PWD"])
    assert (paths, pids, leaked) == ("[]", "['1', '2']", "False")
    # Where the interpreter lies below /home there is the way to it, and nothing else.
    assert homes == (str([Path(sys.prefix).parts[2]]) if sys.prefix.startswith("/home/") else "False")
    names = ["fd", "full", "null", "random", "shm", "stderr", "stdin", "stdout", "urandom", "zero"]
    assert devices == f"{names} {['0', '1', '2', '3']}"  # 3 is what lists the directory


PRIVILEGES = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x10000000, 0x20000, 0x40000000):  # user, mount and network namespaces
    print(libc.unshare(flags), end=" ")
print(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", 0, None), libc.ptrace(16, 1, 0, 0), libc.kill(1, 9), end=" ")
print(os.getuid() != 0, [line for line in open("/proc/self/status") if line.startswith(("CapEff", "NoNewPrivs"))])
"""


async def test_privileges_can_not_be_gained(sandbox: OverHttp) -> None:
    ran = await run(sandbox, PRIVILEGES)
    capabilities = ["CapEff:\t0000000000000000\n", "NoNewPrivs:\t1\n"]
    # A signal to the first process is accepted, and ignored: the answer above would not have come otherwise.
    assert ran["stdout"].split(maxsplit=6)[:5] == ["-1"] * 5
    assert ran["stdout"].endswith(f"True {capabilities}\n")


REFUSED = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def refused(name, *arguments):
    if libc[name](*arguments) >= 0 or ctypes.get_errno() != 1: print(name, "is not refused", ctypes.get_errno())
for name, *arguments in (
    ("unshare", 0x400), ("setns", 0, 0), ("mount", 0, 0, 0, 0, 0), ("umount2", 0, 0), ("chroot", b"/"), ("ptrace", 0, 0, 0, 0),
    ("memfd_create", b"x", 0), ("shmget", 0, 10, 0o1600), ("msgget", 0, 0o1600), ("semget", 0, 1, 0o1600),
    ("personality", 8), ("fanotify_init", 0, 0), ("process_vm_readv", 0, 0, 0, 0, 0, 0), ("adjtimex", bytes(1000)),
    ("name_to_handle_at", -100, b"/", bytes(200), bytes(8), 0), ("syscall", 425, 1, bytes(200)), ("syscall", 430, b"tmpfs", 0),
):
    refused(name, *arguments)
for family in (socket.AF_UNIX, socket.AF_NETLINK, socket.AF_PACKET, socket.AF_VSOCK, socket.AF_ALG, 29):
    try: print(socket.socket(family, socket.SOCK_RAW if family in (16, 17) else socket.SOCK_STREAM), "is there")
    except OSError as error:
        if error.errno != 97: print(family, error)
try: print(socket.socketpair(type=socket.SOCK_DGRAM), "is there")
except OSError as error: print(error.errno)
"""


async def test_system_calls_that_code_does_not_need_are_refused(sandbox: OverHttp) -> None:
    """Also to root and to those who could do it otherwise; a pair of datagram sockets could be connected to another one."""
    ran = await run(sandbox, REFUSED)
    assert (ran["stdout"], ran["stderr"]) == ("97\n", "")


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the code is for x86_64")
@pytest.mark.parametrize("code", ["b814000000cd80c3", "b827000040 0f05c3"])
async def test_system_calls_of_other_architectures_kill(sandbox: OverHttp, code: str) -> None:
    """The number of getpid for 32 bits, and for x32; in a table of its own each number means something else."""
    machine_code = f"""
import ctypes, mmap
page = mmap.mmap(-1, 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex({code!r}))
print(ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    ran = await run(sandbox, machine_code)
    assert (ran["stdout"], ran["exit_code"]) == ("", -signal.SIGSYS)


async def test_keys_of_the_host_are_out_of_reach(sandbox: OverHttp) -> None:
    [key] = (int(line.split()[1]) for line in sandbox.printed if line.startswith("key"))
    if key < 0:
        pytest.skip("there are no keys here")
    code = f"""
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
text = ctypes.create_string_buffer(100)
keyctl = 219 if os.uname().machine == "aarch64" else 250
print(libc.syscall(keyctl, 11, {key}, text, 100), libc.syscall(keyctl, 10, -3, b"user", b"the-hosts-key", 0), text.value)
print(open("/proc/keys").read() if os.path.exists("/proc/keys") else "")
"""
    assert (await run(sandbox, code))["stdout"] == "-1 -1 b''\n\n"


async def test_what_python_needs_is_there(sandbox: OverHttp) -> None:
    """Event loops, processes and their shared memory, functions of the cell in them, threads, databases, modules."""
    code = """
import asyncio, concurrent.futures, multiprocessing, multiprocessing.shared_memory, sqlite3, subprocess, sys, tempfile
import own
async def main():
    process = await asyncio.create_subprocess_exec("echo", "hi", stdin=-1, stdout=-1)
    return (await process.communicate())[0], await asyncio.to_thread(lambda: 2)
def double(x): return 2 * x
print(asyncio.run(main()))
with multiprocessing.Pool(2) as pool: print(pool.map(double, [1, 2]))
fork = multiprocessing.get_context("fork")
with concurrent.futures.ProcessPoolExecutor(2, fork) as pool: print(pool.submit(double, 2).result())
array = multiprocessing.Array("i", [1, 2])
here, there = multiprocessing.Pipe()
process = fork.Process(target=lambda: there.send(array[:]))
process.start(); print(here.recv()); process.join()
segment = multiprocessing.shared_memory.SharedMemory(create=True, size=1000); segment.buf[0] = 5; segment.close(); segment.unlink()
base = sqlite3.connect("base"); base.execute("create table t (x)"); base.commit()
print(len(open("/dev/zero", "rb").read(10)), tempfile.mkstemp()[1][:5], own.value)
print(subprocess.run(["echo", "hi"], capture_output=True, text=True).stdout)
"""
    ran = await run(sandbox, code, files=[{"name": "own.py", "text": "value = 7"}])
    assert ran["stderr"] == ""
    assert ran["stdout"] == "(b'hi\\n', 2)\n[2, 4]\n4\n[1, 2]\n10 /tmp/ 7\nhi\n\n"


async def bounded(sandbox: OverHttp, code: str, **arguments: Any) -> dict[str, Any]:
    """The result of code that has no end, or a late one."""
    began = time.monotonic()
    ran = await run(sandbox, code, **arguments)
    assert time.monotonic() - began < WALL_S + 10
    return ran


async def test_wall_time_is_bounded(sandbox: OverHttp) -> None:
    ran = await bounded(sandbox, "print('begun')\nimport time; time.sleep(1000)")
    assert (ran["stdout"], ran["timed_out"], ran["exit_code"]) == ("begun\n", True, -9)
    assert ran["stderr"] == f"[sandbox: stopped after {WALL_S} s]\n"


async def test_cpu_time_is_bounded_and_a_stopped_run_keeps_its_files(other: OverHttp) -> None:
    container = new_container()
    ran = await run(other, "open('kept', 'w').write('1')\nwhile True: pass", container=container)
    assert (ran["timed_out"], ran["exit_code"]) == (True, -signal.SIGXCPU)
    assert "more than 1 s of CPU time" in ran["stderr"]
    stubborn = (
        "import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nprint(open('kept').read())\nwhile True: pass"
    )
    ran = await run(other, stubborn, container=container)
    assert (ran["exit_code"], ran["stdout"]) == (-9, "1\n")


async def test_memory_is_bounded(sandbox: OverHttp) -> None:
    assert "MemoryError" in (await bounded(sandbox, "x = bytearray(10**10)"))["stderr"]
    shared = """
import os, time
for _ in range(8):
    if not os.fork():
        x = bytearray(b"x") * (100 * 2**20)
        time.sleep(1000)
time.sleep(1000)
"""
    ran = await bounded(sandbox, shared)
    assert ran["stderr"] == "[sandbox: stopped: more than 300 MiB of memory]\n"
    assert not ran["timed_out"]


LIBC = """
import ctypes, mmap, os, socket, time
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
def tried(result):
    if result in (-1, None) or result == 2**64 - 1: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
MIB = 2**20
"""
SHARED = """
for _ in range(10):  # 100 MiB of each stay, and one page of each is mapped
    made = mmap.mmap(FILE, 100 * MIB, mmap.MAP_SHARED)
    for page in range(0, 100 * MIB, 4096): made[page] = 1
    address = ctypes.addressof(ctypes.c_char.from_buffer(made))
    tried(libc.munmap(ctypes.c_void_p(address + 4096), ctypes.c_size_t(100 * MIB - 4096)))
"""
ESCAPES = {
    "memfd": """
for file in [os.memfd_create("x") for _ in range(20)]:
    for _ in range(50): os.write(file, bytes(MIB))
""",
    "memfd by number": """
number = 279 if os.uname().machine == "aarch64" else 319
for file in [tried(libc.syscall(number, b"x", 0)) for _ in range(20)]:
    for _ in range(50): os.write(file, bytes(MIB))
""",
    "SysV shared memory": """
for _ in range(10):
    segment = tried(libc.shmget(0, ctypes.c_size_t(100 * MIB), 0o1600))
    address = tried(libc.shmat(segment, None, 0))
    ctypes.memset(address, 1, 100 * MIB)
    libc.shmdt(ctypes.c_void_p(address))
""",
    "SysV messages": """
for _ in range(30000):
    queue = tried(libc.msgget(0, 0o1600))
    for _ in range(2): tried(libc.msgsnd(queue, b"12345678" + bytes(8000), 8000, 0o4000))
""",
    "shared mappings": SHARED.replace("FILE", "-1"),
    "shared mappings of a device": "file = os.open('/dev/zero', os.O_RDWR)" + SHARED.replace("FILE", "file"),
    "socket buffers": """
for _ in range(20):
    if not os.fork():
        pairs = [socket.socketpair() for _ in range(120)]
        for one in (one for pair in pairs for one in pair):
            one.setblocking(False)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 10 * MIB)
            try:
                while True: one.send(bytes(64 * 1024))
            except BlockingIOError: pass
        time.sleep(1000)
time.sleep(3)
""",
    "sockets in messages": """
for _ in range(10):
    keeper, other = socket.socketpair()
    for _ in range(20):
        pairs = [socket.socketpair() for _ in range(50)]
        for one in (one for pair in pairs for one in pair):
            one.setblocking(False)
            try:
                while True: one.send(bytes(64 * 1024))
            except BlockingIOError: pass
            socket.send_fds(keeper, [b"x"], [one.fileno()])
time.sleep(3)
""",
    "a process whose first thread has ended": """
import threading
def hold():
    time.sleep(1)
    x = bytearray(b"x") * (100 * MIB)
    time.sleep(1000)
for _ in range(8):
    if not os.fork():
        threading.Thread(target=hold).start()
        libc.syscall(93 if os.uname().machine == "aarch64" else 60, 0)
time.sleep(4)
""",
    "locks": """
import fcntl
for number in range(20):
    if not os.fork():
        with open(f"f{number}", "w") as file:
            for n in range(20_000): fcntl.lockf(file, fcntl.LOCK_EX, 1, 10**6 - 2 * n)
            time.sleep(1000)
time.sleep(5)
""",
    "files in memory": """
for directory in ("/dev/shm", "/tmp", "."):
    with open(directory + "/x", "wb") as file:
        for _ in range(1024): file.write(bytes(MIB))
""",
    "pages in pipes": """
class Part(ctypes.Structure): _fields_ = [("base", ctypes.c_char_p), ("length", ctypes.c_size_t)]
reader, writer = os.pipe()
text = bytes(4096)
tried(libc.vmsplice(writer, ctypes.byref(Part(text, 4096)), 1, 0))
""",
}
"""Code that holds a gigabyte, or what is not counted, unless it is stopped or refused."""


@pytest.mark.parametrize("way", ESCAPES)
async def test_no_memory_escapes_the_limit(sandbox: OverHttp, way: str) -> None:
    ran = await bounded(sandbox, LIBC + ESCAPES[way] + "\ntime.sleep(1)\nprint('escaped')")
    assert ran["stdout"] == ""
    assert "Error: [Errno " in ran["stderr"] or ran["stderr"] == "[sandbox: stopped: more than 300 MiB of memory]\n"


BOMB = """
import os, sys, time
full = False
while True:
    try: os.fork()
    except OSError:
        full = full or not print('full', flush=True)
        time.sleep(float(sys.argv[1]))
"""
"""Forks for ever; a process that can't says so, once, and pauses before it tries again."""


async def test_a_fork_bomb_is_bounded(sandbox: OverHttp) -> None:
    marker = f"1000.{uuid.uuid4().int}"
    code = f"""
import subprocess
made = 0
try:
    for _ in range(100):
        subprocess.Popen(["sleep", {marker!r}])
        made += 1
except BlockingIOError as error:
    print(made, error)
"""
    ran = await bounded(sandbox, code)
    made, error = ran["stdout"].split(maxsplit=1)
    assert error == "[Errno 11] Resource temporarily unavailable\n"
    # The cell is one too; and where the server does not run as root, so are the two of the isolation, on most kernels.
    assert int(made) in ((23,) if os.getuid() == 0 else (21, 22, 23))
    assert not processes(marker)
    # The cell ends as soon as the limit is reached; the others fork on.
    command = f"[sys.executable, '-c', {BOMB!r}, '0', {marker!r}]"
    endless = f"import subprocess, sys; print(subprocess.Popen({command}, stdout=subprocess.PIPE).stdout.readline())"
    ran = await bounded(sandbox, endless)
    assert (ran["exit_code"], ran["stdout"]) == (0, "b'full\\n'\n")
    assert not processes(marker)


async def test_output_is_bounded(other: OverHttp) -> None:
    ran = await run(other, "print('begin')\nfor n in range(10**4): print('x' * 500)\nprint('end')")
    assert len(ran["stdout"]) < 70_000
    assert ran["stdout"].startswith("begin\nxxx")
    assert ran["stdout"].endswith("xxx\nend\n")
    assert "bytes are left out …]" in ran["stdout"]
    endless = await run(other, "import os\nwhile True: os.write(1, b'y' * 65536); os.write(2, b'z' * 65536)")
    assert endless["timed_out"]
    assert len(endless["stdout"]) + len(endless["stderr"]) < 140_000


async def test_files_are_bounded(sandbox: OverHttp) -> None:
    full = "n = 0\nwhile True: open(f'{n}', 'wb').write(bytes(2**20)); n += 1; print(n)"
    ran = await bounded(sandbox, full, container=new_container())
    assert "No space left on device" in ran["stderr"]
    assert 0 < int(ran["stdout"].split()[-1]) < 16
    many = """
import os
def tried(work):
    try: work()
    except OSError as error: print(error.strerror)
tried(lambda: open("f", "wb").truncate(65 * 2**20))
tried(lambda: [open("/dev/null") for _ in range(300)])
tried(lambda: [open(f"e{n}", "w").close() for n in range(10**5)])
"""
    errors = ["File too large", "Too many open files", "No space left on device"]
    assert (await run(sandbox, many))["stdout"].splitlines() == errors
    sparse = await run(sandbox, "for n in range(100):\n    with open(f's{n}', 'wb') as file: file.truncate(10 * 2**20)")
    assert [file["size"] for file in sparse["files"]] == [10 * 2**20]  # more would not fit into a container
    assert "99 files are not kept" in sparse["stderr"]


async def test_odd_files_do_no_harm(sandbox: OverHttp) -> None:
    """Neither links, pipes, endless names nor directories without end reach the host or break the next call."""
    container = new_container()
    code = r"""
import os
os.symlink("/", "root"); os.mkfifo("pipe")
open(b"\xff\xfe", "w").close()
open("new\nline ünï", "w").write("1")
os.chmod("new\nline ünï", 0)
for _ in range(400): os.mkdir("deep" * 5); os.chdir("deep" * 5)
open("bottom", "w").close()
"""
    ran = await run(sandbox, code, container=container)
    assert (ran["exit_code"], [file["name"] for file in ran["files"]]) == (0, ["new\nline ünï"])
    assert "1 files are not kept" in ran["stderr"]
    again = await run(sandbox, "import os; print(os.listdir(), open('new\\nline ünï').read())", container=container)
    assert again["stdout"] == "['new\\nline ünï'] 1\n"


async def test_nothing_is_left_running(sandbox: OverHttp) -> None:
    marker = uuid.uuid4().hex
    sleepers = f"['sh', '-c', 'setsid sleep 1000 & sleep 1000; : {marker}'], start_new_session=True"
    ran = await run(sandbox, f"import subprocess\nprocess = subprocess.Popen({sleepers})\nprint(process.poll())")
    assert (ran["stdout"], ran["exit_code"]) == ("None\n", 0)
    assert not processes(marker)


SLEEPER = "import subprocess; subprocess.run(['sh', '-c', 'sleep 1000; : MARKER'])"


async def test_a_client_that_leaves_ends_its_run(other: OverHttp) -> None:
    await ends_with(other, lambda calling: calling.cancel())


async def test_a_server_that_is_killed_leaves_no_run(directory: Path) -> None:
    with OverHttp(program("sandbox", "--wall", "1000", "--directory", str(directory))) as sandbox:
        await ends_with(sandbox, lambda _: sandbox.process.kill())


async def ends_with(server: OverHttp, end: Callable[[asyncio.Task[Any]], Any]) -> None:
    """Wait until code runs, bring about the end, and wait until nothing of the code runs any more."""
    marker = uuid.uuid4().hex
    calling = asyncio.create_task(call(server, SLEEPER.replace("MARKER", marker)))
    await asyncio.to_thread(until, lambda: len(processes(f"sh -c sleep 1000; : {marker}")) == 1)
    end(calling)
    await asyncio.to_thread(until, lambda: not processes(marker))
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)


# -- how it starts ----------------------------------------------------------------------------------------------------------


def refusal(*command: str, **env: str) -> str:
    """The error of a server that does not start."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        check=False,
    )
    assert done.returncode != 0
    return done.stderr


@needs_root
def test_without_isolation_it_does_not_start(directory: Path) -> None:
    powerless = [
        "setpriv",
        "--bounding-set=-all",
        "--inh-caps=-all",
        *program("sandbox", "--directory", str(directory)),
    ]
    assert "code can't be isolated here" in refusal(*powerless)
    # As root the code would be root too: not even on request.
    assert "code can't be isolated here" in refusal(*powerless, "--allow-network")


@needs_root
async def test_limits_alone_only_on_request(tmp_path: Path, new_home: Callable[[], Path]) -> None:
    """An unprivileged server whose interpreter its namespaces can't show."""
    home, hidden = new_home(), tmp_path / "hidden"
    venv.create(hidden)
    hidden.chmod(0o700)
    python = ["--python", str(hidden / "bin" / "python")]
    command = [
        *UNPRIVILEGED,
        *program("sandbox", *LIMITS, "--cpu", "1", "--wall", "10", *python, "--directory", str(home)),
    ]
    assert "code can't be isolated here" in refusal(*command)
    with OverHttp([*command, "--allow-network"]) as sandbox:
        assert "code is confined by resource limits only" in "".join(sandbox.printed)
        marker = uuid.uuid4().hex
        container = new_container()
        code = f"import os, subprocess; subprocess.Popen(['sh', '-c', 'setsid sleep 1000; : {marker}'], start_new_session=True)"
        code += "; open('f', 'w').write('1'); print(sorted(os.environ))"
        ran = await run(sandbox, code, container=container)
        assert (ran["stdout"], ran["exit_code"]) == ("['HOME', 'LANG', 'OMP_NUM_THREADS', 'PATH', 'PWD']\n", 0)
        assert [file["name"] for file in ran["files"]] == ["f"]
        assert not processes(marker)
        assert (await run(sandbox, "print(open('f').read())", container=container))["stdout"] == "1\n"
        assert (await run(sandbox, "while True: pass"))["exit_code"] == -signal.SIGXCPU
        assert (await run(sandbox, "import time; time.sleep(1000)"))["timed_out"]
    assert {path.suffix for path in home.iterdir()} == {"", ".lock", ".tar"}


@needs_root
@pytest.mark.skipif(not Path(SYSTEM_PYTHON).exists(), reason="there is no Python that another user may read")
async def test_an_unprivileged_server_isolates_as_well(new_home: Callable[[], Path]) -> None:
    """With a user namespace, where root needs none; the system's Python is one that this user may read."""
    command = [*UNPRIVILEGED, *program("sandbox", *LIMITS, "--directory", str(new_home()), "--python", SYSTEM_PYTHON)]
    with OverHttp(command) as sandbox, socket.create_server(("127.0.0.1", 0)) as listener:
        container = new_container()
        code = f"""
import os
print(os.getuid(), sorted(os.listdir("/proc/self/fd")), os.path.exists("/root"))
{CONNECT.replace("PORT", str(listener.getsockname()[1]))}{PRIVILEGES}
open("f", "w").close()
"""
        ran = await run(sandbox, code, container=container)
        identity, connected, privileges = ran["stdout"].splitlines()
        assert (identity, ran["stderr"]) == ("12345 ['0', '1', '2', '3'] False", "")
        assert connected == "Network is unreachable"
        assert privileges.startswith("-1 -1 -1 -1 -1 ")
        marker = uuid.uuid4().hex
        bomb = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BOMB!r}, '0.05', {marker!r}])"
        assert (await bounded(sandbox, LIST + "\n" + bomb, container=container))["timed_out"]
        assert not processes(marker)
        assert (await run(sandbox, LIST, container=container))["stdout"] == "['f']\n"


@pytest.fixture
def new_home(tmp_path: Path) -> Callable[[], Path]:
    """Makes a directory that belongs to the unprivileged user."""

    def make() -> Path:
        home = tmp_path / "home"
        home.mkdir(mode=0o700)
        os.chown(home, 12345, 12345)
        return home

    return make


def test_a_directory_that_others_can_read_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert "must belong to this user alone" in refusal(*program("sandbox", "--directory", str(tmp_path)))


async def test_http_beyond_loopback_needs_a_token(directory: Path, other: OverHttp) -> None:
    command = program("sandbox", "--directory", str(directory))
    assert "set TOOLSERVER_TOKEN" in refusal(*command, "--http", "0.0.0.0:0")
    assert "expected HOST:PORT" in refusal(*command, "--http", "8000")
    async with httpx2.AsyncClient(verify=False) as http:
        for authorization, allowed in (("", False), ("Bearer x", False), ("Bearer opensesame", True)):
            answer = await http.post(other.url, json={}, headers={"authorization": authorization})
            assert (answer.status_code != 401) is allowed
    assert text(await call(other, "1 + 1")) == "2"
