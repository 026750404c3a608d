"""A worker process that prepares batches, so that its threads do not take Python's lock from the training step.

The training process sends the batches of the schedule ahead, and receives the prepared ones in the same order. Arrays and tensors
are passed through shared memory (:mod:`.shared_slots`), everything else through a pipe. No thread of the training process waits for
batches: a batch is received in the thread that asks for it. On large sets, a thread of the training process computes the next epoch's
order (:mod:`.schedule`).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch
from comtip_shards.storage.cache import remove_tmp_files

from comtip_fast.data import upload
from comtip_fast.data.loaders.schedule import ScheduledBatch
from comtip_fast.data.loaders.shared_slots import NO_SLOT, Layout, SharedSlots, end_of, flatten, parts, restore

log = logging.getLogger("comtip_fast")
Work = Callable[[Iterator[ScheduledBatch]], Iterator[Any]]
"""Prepares scheduled batches, in their order."""
READY = 2
"""Slots that hold batches which the training process has not asked for yet."""
END_S = 5.0
"""Seconds that a worker has to end before it is killed. It ends itself after twice as long, if the training process does not exist."""
ORPHAN_S = 2.0
"""Seconds between two checks of the worker that the training process still exists."""
BATCH, FAILED, END = b"b", b"f", b"e"
STOP = b""


class LoaderProcess:
    """Iterator over the results of ``work``, which runs in a process of its own.

    Parameters
    ----------
    work
        Called in the worker process with the iterator of ``batches``; yields one result per batch, in their order.
    batches
        The scheduled batches, which this process iterates over.
    ahead
        Number of batches that are sent to the worker before their results are requested.
    slot_bytes
        Expected bytes of all arrays of one result; a larger one is sent through the pipe, and the first one is logged.
    lent
        Number of results that the caller keeps while it asks for the next one; further ones are copied.
    name
        Name of the loader in messages.

    Raises
    ------
    ShardError and other errors of ``work``
        By :meth:`__next__`, with the trace of the worker as a note.
    RuntimeError
        By :meth:`__next__`: the worker process ended without a result.
    """

    def __init__(
        self, work: Work, batches: Iterator[ScheduledBatch], *, ahead: int, slot_bytes: int, lent: int, name: str
    ) -> None:
        self._batches, self._name = batches, name
        self._sent: deque[ScheduledBatch] = deque()
        self._slots, self._warned = SharedSlots(lent + READY, slot_bytes, lent), False
        context = multiprocessing.get_context("fork")
        self._pipe, end = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(work, end, self._pipe, self._slots, os.getpid()), name="comtip-loader", daemon=True
        )
        with without_collecting():
            self._process.start()
        end.close()
        self._closed, self._owner = False, os.getpid()
        atexit.register(self.close)  # before multiprocessing waits for the process
        try:
            self._send(list(range(self._slots.count)), ahead)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next result; see the class for errors."""
        if self._closed:
            raise StopIteration
        self._send(self._slots.released(), 1)
        try:
            kind, data, slot, layout = pickle.loads(self._pipe.recv_bytes())
            if kind == BATCH:
                own = self._slots.read(slot, layout) if slot != NO_SLOT else self._received(layout)
                return restore(data, own, self._sent.popleft())
        except (EOFError, OSError):
            self._raise_dead()
        self.close()
        if kind == FAILED:
            raise _error_of(data)
        raise StopIteration

    @property
    def pid(self) -> int:
        """Process id of the worker."""
        return self._process.pid or 0

    def close(self) -> None:
        """End the worker; may be called more than once, and does nothing in a forked child."""
        if self._closed or self._owner != os.getpid():
            return
        self._closed = True
        atexit.unregister(self.close)
        try:
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(
                    STOP
                )  # a process forked later may hold the pipe, so that closing it is not noticed
            self._pipe.close()
            self._process.join(END_S)
        finally:  # also after Ctrl-C
            if self._process.is_alive():
                self._process.kill()
                self._process.join()

    def _send(self, slots: list[int], count: int) -> None:
        """Send released slots and the next ``count`` batches; a worker that has ended is noticed by the next receipt."""
        for _ in range(count):
            scheduled = next(self._batches, None)
            if scheduled is not None:
                self._sent.append(scheduled)
            with contextlib.suppress(OSError):
                self._pipe.send_bytes(pickle.dumps((slots, scheduled), protocol=5))
            slots = []

    def _received(self, layout: Layout) -> list[memoryview]:
        """Receive the arrays of a result that was too large for a slot; log the first one."""
        if not self._warned:
            self._warned = True
            log.warning(
                "%s: a batch of %d bytes is larger than its %d bytes of shared memory; such batches pass through a pipe, which is "
                "slower",
                self._name,
                end_of(layout),
                self._slots.size,
            )
        return parts(memoryview(bytearray(self._pipe.recv_bytes())), layout)

    def _raise_dead(self) -> NoReturn:
        self._process.join(END_S)
        ended, pid = not self._process.is_alive(), self.pid
        self.close()
        code = self._process.exitcode or 0
        if not ended:
            how = "closed its pipe"
        elif code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        else:
            how = f"ended with exit code {code}"
        raise RuntimeError(
            f"{self._name}: its process {pid} {how} before it sent the next batch; if the machine ran out of memory, lower "
            "data.prefetch or data.workers; otherwise set data.loader_process=training (instead of data.loader=wds, set "
            "data.loader=torch too) to load in threads of the training process"
        )


def process_stream(process: LoaderProcess) -> Generator[Any, None, None]:
    """Yield the results of a worker process, and end it when the generator is closed."""
    try:
        yield from process
    finally:
        process.close()


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Fork inside the block so that the child never garbage-collects inherited objects.

    The destructor of a DALI pipeline waits for threads that do not exist after a fork, so the child would hang.
    """
    frozen = gc.get_freeze_count()
    gc.collect()  # otherwise garbage would be frozen, and unfreeze would move it to the oldest generation
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


# -- in the worker process --------------------------------------------------------------------------------------


class _Inbox:
    """What the training process sends: released slots and scheduled batches, received by a thread, so that no send waits.

    ``parent`` is the process id of the training process.
    """

    def __init__(self, pipe: Connection, parent: int) -> None:
        self._pipe, self._parent = pipe, parent
        self._error: Exception | None = None
        self.slots: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.batches: queue.SimpleQueue[ScheduledBatch | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="comtip-loader-inbox", daemon=True).start()

    def scheduled(self) -> Iterator[ScheduledBatch]:
        """Yield the scheduled batches; raise the error that ended their receipt, if there was one."""
        yield from iter(self.batches.get, None)
        if self._error is not None:
            raise self._error

    def _receive(self) -> None:
        """Receive until the training process stops this one, closes the pipe or ends; then end this process if it does not end."""
        try:
            self._receive_all()
        except (EOFError, OSError):
            pass  # the training process has closed the pipe
        except Exception as error:
            self._error = error
        finally:
            self.batches.put(None)
            self.slots.put(None)
        time.sleep(2 * END_S)  # the training process kills this one earlier, if it still exists
        _leave(1)

    def _receive_all(self) -> None:
        while self._pipe.poll(ORPHAN_S) or os.getppid() == self._parent:
            if not self._pipe.poll():
                continue
            if (message := self._pipe.recv_bytes()) == STOP:
                return
            slots, scheduled = pickle.loads(message)
            for slot in slots:
                self.slots.put(slot)
            self.batches.put(scheduled)


def _serve(work: Work, pipe: Connection, other_end: Connection, slots: SharedSlots, parent: int) -> None:
    """Prepare batches until there are no more, or the training process closes the pipe or ends."""
    other_end.close()  # otherwise this process would not notice the end of the training process
    # The training process handles signals, and may need further batches to reach its next checkpoint.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    torch.set_num_threads(1)
    upload.never_pin()
    inbox = _Inbox(pipe, parent)
    messages = _flattened(work(inbox.scheduled()))
    with contextlib.suppress(OSError):  # the training process has closed the pipe
        for message in messages:
            if not _send(pipe, inbox, slots, *message):
                break
    messages.close()
    sys.stdout.flush()
    sys.stderr.flush()
    _leave(0)


def _leave(code: int) -> NoReturn:
    """End the worker without destroying objects of the training process; running fetches leave no partial files."""
    remove_tmp_files()
    os._exit(code)


def _flattened(results: Iterator[Any]) -> Generator[tuple[bytes, bytes, list[memoryview], Layout], None, None]:
    """Yield the messages to the training process; the last one is the end or an error."""
    try:
        for item in results:
            yield BATCH, *flatten(item)
    except Exception as error:
        yield FAILED, _pickled(error), [], []
    else:
        yield END, b"", [], []
    finally:
        close = getattr(results, "close", None)
        if close is not None:
            close()


def _send(
    pipe: Connection,
    inbox: _Inbox,
    slots: SharedSlots,
    kind: bytes,
    data: bytes,
    arrays: list[memoryview],
    layout: Layout,
) -> bool:
    """Send a message; return False if the training process has stopped this one."""
    size = end_of(layout)
    slot: int | None = NO_SLOT
    if kind == BATCH and size <= slots.size:
        slot = inbox.slots.get()
        if slot is None:
            return False
        slots.write(slot, arrays, layout)
    pipe.send_bytes(pickle.dumps((kind, data, slot, layout), protocol=5))
    if kind == BATCH and slot == NO_SLOT:
        joined = bytearray(size)
        for array, (offset, n) in zip(arrays, layout, strict=True):
            joined[offset : offset + n] = array
        pipe.send_bytes(joined)
    return True


def _pickled(error: BaseException) -> bytes:
    """Return an error and its trace; an error that cannot be pickled becomes a RuntimeError with its text."""
    trace = "".join(traceback.format_exception(error))
    try:
        data = pickle.dumps((error, trace))
        pickle.loads(data)
    except Exception:
        data = pickle.dumps((RuntimeError(f"{type(error).__name__}: {error}"), trace))
    return data


def _error_of(data: bytes) -> BaseException:
    error: BaseException
    error, trace = pickle.loads(data)
    error.add_note(f"in the process of the loader:\n{trace}")
    return error
