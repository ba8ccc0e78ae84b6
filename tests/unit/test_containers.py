"""Containers in a directory that two processes share: two stores stand for them, since `flock` tells open files apart."""

import os
import time
from pathlib import Path

import pytest

from app.toolservers.containers import Containers, ContainersFull

BYTES_MAX = 20


@pytest.fixture
def stores(tmp_path: Path) -> tuple[Containers, Containers]:
    one, other = (Containers(tmp_path, idle_s=100, count_max=3, bytes_max=BYTES_MAX) for _ in range(2))
    return one, other


async def write(store: Containers, container: str, size: int) -> None:
    """Give a container a file of so many bytes."""
    async with store.use(container) as archive:
        written = store.directory / f"{container}.new"
        written.write_bytes(bytes(size))
        store.replace(archive, written)


def stored(store: Containers) -> dict[str, int]:
    """The sizes of all archives; each has its lock."""
    archives = {path.stem: path.stat().st_size for path in store.directory.glob("*.tar")}
    assert archives.keys() == {path.stem for path in store.directory.glob("*.lock")}
    return archives


async def test_the_least_recently_used_container_makes_room(stores: tuple[Containers, Containers]) -> None:
    one, other = stores
    for container, store in (("a", one), ("b", other), ("c", one)):
        await write(store, container, 1)
    async with other.use("a"):
        pass
    await write(one, "d", 1)
    assert stored(one) == {"a": 1, "c": 1, "d": 1}


async def test_bytes_are_counted_over_all_containers(stores: tuple[Containers, Containers]) -> None:
    one, other = stores
    for container, store in (("a", one), ("b", other), ("c", one)):
        await write(store, container, 8)
        assert sum(stored(one).values()) <= BYTES_MAX
    assert stored(one) == {"b": 8, "c": 8}
    await write(other, "c", 12)
    assert stored(one) == {"b": 8, "c": 12}
    await write(other, "c", 13)
    assert stored(one) == {"c": 13}


async def test_containers_in_use_are_not_removed(stores: tuple[Containers, Containers]) -> None:
    one, other = stores
    async with one.use("a"), one.use("b"), other.use("c") as archive:
        with pytest.raises(ContainersFull, match="there are 3 containers"):
            await write(other, "d", 1)
        archive.write_bytes(b"before")
        (one.directory / "large").write_bytes(bytes(BYTES_MAX + 1))
        with pytest.raises(ContainersFull, match="more than 0 MiB"):
            other.replace(archive, one.directory / "large")
        assert archive.read_bytes() == b"before"
        long_ago = time.time() - 1000
        os.utime(archive.with_suffix(".lock"), (long_ago, long_ago))
        one.sweep()
        assert archive.exists()


async def test_a_sweep_removes_what_is_unused_for_long(stores: tuple[Containers, Containers]) -> None:
    one, _ = stores
    await write(one, "old", 1)
    await write(one, "young", 1)
    for name in ("left.new", "now.new"):
        (one.directory / name).touch()
    long_ago = time.time() - 101
    for name in ("old.lock", "left.new"):
        os.utime(one.directory / name, (long_ago, long_ago))
    one.sweep()
    assert stored(one) == {"young": 1}
    assert [path.name for path in one.directory.glob("*.new")] == ["now.new"]
