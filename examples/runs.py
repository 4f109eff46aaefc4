"""All runs of the experiment, side by side in worker processes."""

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import fields

import torch
from tqdm import tqdm

from data import Images
from methods import METHODS, Method, Run, Settings, run


def run_all(images: Images, settings: Settings, seeds: list[int], workers: int) -> list[Run]:
    """Every method with every seed, in the order of `METHODS` and `seeds`, with a progress bar."""
    jobs = [(method, seed) for method in METHODS for seed in seeds]
    # Not "fork": a forked OpenMP runtime can hang.
    context = multiprocessing.get_context("spawn")
    epochs = context.Queue()
    refresh = 0.2 if sys.stderr.isatty() else 10.0  # a log file keeps every line
    total = len(jobs) * settings.tasks * settings.epochs
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (images, settings, epochs)) as executor,
        tqdm(total=total, unit="epoch", desc=f"{len(jobs)} runs", mininterval=refresh) as bar,
    ):
        # The long runs first, so that no worker idles at the end.
        longest_first = sorted(range(len(jobs)), key=lambda job: jobs[job][0].mask is None)
        futures = {job: executor.submit(_run, *jobs[job]) for job in longest_first}
        try:
            pending = set(futures.values())
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                while not epochs.empty():
                    epochs.get()
                    bar.update()
        except BaseException:
            # Runs can last hours: whoever interrupted, or has an error to read, should not wait for them.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        bar.update(total - bar.n)
        return [futures[job].result() for job in range(len(jobs))]


def _start_worker(images: Images, settings: Settings, epochs) -> None:
    global _images, _settings, _epochs
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends the worker without a traceback of its own
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a terminated worker would leave behind
    # Runs side by side use the cores better than threads do, and one thread sums in the same order on every machine.
    torch.set_num_threads(1)
    _images = Images(*(getattr(images, field.name).to(settings.device) for field in fields(images)))
    _settings, _epochs = settings, epochs


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # of a parent that was killed, the pool would go on training
    os._exit(1)


def _run(method: Method, seed: int) -> Run:
    return run(method, seed, _images, _settings, on_epoch=lambda: _epochs.put(None))
