"""Several processes that record one task together, as `accelerate launch` and `torchrun` start them; on one machine or on several with
one disk.

There are no collectives. Each process takes work units that nobody has, by a lock that the system frees when a process dies, and writes
their shards. The first process alone decides what is done, writes the manifest, scores, and touches the files of the result; what it is
doing stands in a file of the meeting, which the others follow.
"""

from __future__ import annotations

import hashlib
import os
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil

from dbes.errors import DbesError, FileError, RecordingError, SettingError
from dbes.files import discard, refused_by_system, write_json
from dbes.locks import Held, is_held
from dbes.recording.ledger import Ledger
from dbes.recording.units import Unit
from dbes.schema import Strict, read_versioned
from dbes.text import clipped

Stage = Literal["waiting", "loading", "recording", "done", "ended", "failed"]
STAGES: tuple[Stage, ...] = ("waiting", "loading", "recording", "done")

MEETING = ".dbes-crew-"
PATIENCE = 900.0
"""Seconds that a process waits for the first one to begin."""

POLL = 0.1
STALE = 3600.0
"""Seconds after which what is left of killed processes is taken away."""


class State(Strict):
    """What the first process is doing.

    Attributes:
        launch: name of this start of the processes.
        task: which of the tasks, from 0.
        folders: of the results of the tasks that are done.
        reason: why it failed.
    """

    schema_version: int = 1
    launch: str
    task: int = 0
    stage: Stage = "waiting"
    folders: tuple[str, ...] = ()
    reason: str | None = None


class Crew:
    """This process among those that were started together.

    Attributes:
        rank, size: which of how many; the one of rank 0 is the first.
        local_rank: which of those on this machine, by which it picks its GPU.
        began: when it was started, in seconds since 1970; by default now.
    """

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, key: str = "", began: float | None = None) -> None:
        self.rank, self.size, self.local_rank, self._key = rank, size, local_rank, key
        self._folder: Path | None = None
        self._state = State(launch=uuid.uuid4().hex)
        self._presence: Held | None = None
        self._seen = False
        self._began = time.time() if began is None else began

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Crew:
        """As the launcher's variables say: RANK, WORLD_SIZE, LOCAL_RANK.

        Raises:
            SettingError: they contradict each other.
        """
        given = {name: environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))}
        try:
            rank, size, local = (int(value) for value in given.values())
        except ValueError:
            rank, size, local = -1, 0, 0
        if not 0 <= rank < max(size, 1) or local < 0:
            told = ", ".join(f"{name}={clipped(value)}" for name, value in given.items())
            raise SettingError(f"{told}: expected a RANK below WORLD_SIZE, as torchrun and accelerate launch set them")
        if size == 1:
            return cls()
        names = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        about = [environment.get(name, "") for name in names]
        if environment.get("LOCAL_WORLD_SIZE", str(size)) == str(size):
            about.append(f"{socket.gethostname()} {os.getppid()}")  # all on this machine: started by one process
        key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
        return cls(rank, size, local_rank=local, key=key, began=psutil.Process().create_time())

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The GPU of this process; None where it may choose by itself."""
        import torch

        if self.size == 1 or not torch.cuda.is_available():
            return None
        return f"cuda:{self.local_rank % torch.cuda.device_count()}"

    @contextmanager
    def meeting(self, output_path: Path) -> Iterator[None]:
        """Inside the block the processes know of each other, by a folder that goes with the last of them.

        Raises:
            FileError: the folder cannot be made, or another process says it is the first.
        """
        if self.size == 1:
            yield
            return
        self._folder = output_path / f"{MEETING}{self._key}"
        if self.first:
            _remove_stale(output_path)
            with refused_by_system(self._folder):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._presence = Held.take(self._folder / "first", "")
            if self._presence is None:
                raise FileError(f"{self._folder}: another process says it has rank 0 here; wait for it, or choose another folder")
            for path in self._folder.glob("left-*"):
                discard(path)
            self._tell(self._state)
        try:
            yield
            if self.first:
                self._tell(self._state.model_copy(update={"stage": "ended"}))
        except BaseException as problem:
            if self.first:
                with suppress(DbesError):
                    reason = str(problem) or type(problem).__name__
                    self._tell(self._state.model_copy(update={"stage": "failed", "reason": reason}))
            raise
        finally:
            self._leave()

    def _leave(self) -> None:
        assert self._folder is not None
        if self._presence is not None:
            self._presence.release()
        with suppress(DbesError, OSError):
            (self._folder / f"left-{self.rank}").touch()
            if len(list(self._folder.glob("left-*"))) == self.size:
                discard(self._folder)

    def _tell(self, state: State) -> None:
        assert self._folder is not None
        write_json(self._folder / "state.json", state.model_dump(mode="json"))
        self._state = state

    def tell(self, stage: Stage, *, folder: Path | None = None) -> None:
        """Say what the first process is doing, and of a task that is done where its result lies; nothing where it is alone."""
        if self.size > 1 and self.first:
            folders = self._state.folders if folder is None else (*self._state.folders, str(folder))
            self._tell(self._state.model_copy(update={"stage": stage, "folders": folders}))

    def begin(self, task: int) -> None:
        """Say that the first process turns to a task."""
        if self.size > 1 and self.first:
            self._tell(self._state.model_copy(update={"stage": "waiting", "task": task}))

    def check(self, device_map: str | None) -> None:
        """Raises SettingError where a model would be put elsewhere than on the device of its process."""
        if self.size > 1 and device_map not in (None, "cpu"):
            raise SettingError(
                f"device_map {device_map!r}: each of {self.size} processes has a device of its own; leave it out, or start one process"
            )

    def reached(self, task: int, stage: Stage) -> bool:
        """Whether the first process comes to this stage of a task and has not left the task; waits until that is known."""
        state = self._follow(task, stage)
        return state.task == task and state.stage in ("loading", "recording")

    def result(self, task: int) -> Path:
        """Folder of the result of a task, when it is done."""
        return Path(self._follow(task, "done").folders[task])

    def _follow(self, task: int, stage: Stage) -> State:
        """What the first process is doing, when it is as far.

        Raises:
            RecordingError: it failed (with its reason), died, or never came.
        """
        assert self._folder is not None and not self.first
        deadline = time.monotonic() + PATIENCE
        while True:
            alive = is_held(self._folder / "first")  # asked before the state is read, which is the last one if it is not
            self._seen = self._seen or alive
            if (state := self._read()) is not None:
                self._state = state
                if state.stage == "failed":
                    raise RecordingError(f"rank 0: {state.reason}")
                if state.stage == "ended" or (state.task, STAGES.index(state.stage)) >= (task, STAGES.index(stage)):
                    return state
            if self._seen and not alive:
                raise RecordingError("rank 0 ended without a word; start the same command again, with any number of processes, to go on")
            if time.monotonic() > deadline and not self._seen:
                raise RecordingError(f"rank 0 did not begin within {PATIENCE:.0f} s; are all processes given the same --output-path?")
            time.sleep(POLL)

    def _read(self) -> State | None:
        """The state; what an earlier start left behind says nothing, but a first process may have been so quick that it was never seen:
        then it wrote after this process had begun."""
        assert self._folder is not None
        path = self._folder / "state.json"
        try:
            written = path.stat().st_mtime
        except OSError:
            return None
        return read_versioned(path, State, error=RecordingError) if self._seen or written > self._began else None

    def units(self, ledger: Ledger) -> Iterator[tuple[Unit, Held | None]]:
        """Units to record that no other process records, each with the lock to release when it is done.

        Raises:
            RecordingError: a process of this start ended without finishing its unit.
        """
        ledger.look()
        for unit in ledger.units:
            if unit.number in ledger.done:
                continue
            if ledger.folder is None:
                yield unit, None
            elif (held := self._taken(ledger, unit)) is not None:
                yield unit, held

    def _taken(self, ledger: Ledger, unit: Unit) -> Held | None:
        note = f"{self._state.launch} rank {self.rank}, process {os.getpid()} on {socket.gethostname()}"
        path = ledger.file(unit.number, "lock")
        with refused_by_system(path, doing="locked"):
            held = Held.take(path, note)
        if held is None:
            return None
        ledger.look()
        launch, _, owner = held.before.partition(" ")
        if unit.number in ledger.done:  # between our looking and locking
            held.release()
            return None
        if launch == self._state.launch:
            held.say(held.before)
            held.release()
            raise RecordingError(
                f"{owner.strip()}: ended without finishing work unit {unit.number}; start the same command again, with any number of "
                "processes, to go on"
            )
        return held

    @contextmanager
    def holding(self) -> Iterator[list[Held]]:
        """Locks in the list are given back when the block ends; where it fails they say why."""
        held: list[Held] = []
        try:
            yield held
        except BaseException as problem:
            for each in held:
                each.add(f" ({clipped(str(problem) or type(problem).__name__)})")
            raise
        finally:
            for each in held:
                each.release()

    def wait(self) -> None:
        time.sleep(POLL)


def _remove_stale(output_path: Path) -> None:
    """Meetings of processes that were killed."""
    for folder in output_path.glob(f"{MEETING}*"):
        with suppress(OSError, DbesError):
            if time.time() - folder.stat().st_mtime > STALE and not is_held(folder / "first"):
                discard(folder)
