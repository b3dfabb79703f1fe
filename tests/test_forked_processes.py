"""Tests of processes that are forked from a process with a loaded model."""

import subprocess
import sys
from pathlib import Path

import pytest

FORK = """
import os, sys, threading, time
import torch
import voxkern

torch.set_num_threads(1)
tts = voxkern.load(sys.argv[1], device="cpu", backend="torch")
expected = tts.generate("seven", seed=3, steps=1, max_frames=3).samples.tobytes()
running, stop = threading.Event(), threading.Event()

def on_frame(n):
    running.set()
    if stop.is_set():
        raise KeyboardInterrupt

def work():
    try:
        tts.generate("seven", seed=5, steps=64, max_frames=900, on_frame=on_frame)
    except KeyboardInterrupt:
        pass

if sys.argv[2] == "busy":
    thread = threading.Thread(target=work)
    thread.start()
    running.wait()
    while not tts.engine._frame_lock.locked():
        time.sleep(0)
pid = os.fork()
if not pid:
    start = time.monotonic()
    try:
        same = tts.generate("seven", seed=3, steps=1, max_frames=3).samples.tobytes() == expected
        os.write(1, b"same" if same else b"other")
    except RuntimeError as error:
        os.write(1, str(error).encode())
    os.write(1, b" at once" if time.monotonic() - start < 5 else b" late")
    os._exit(0)
os.waitpid(pid, 0)
stop.set()
if sys.argv[2] == "busy":
    thread.join()
same = tts.generate("seven", seed=3, steps=1, max_frames=3).samples.tobytes() == expected
print(" and the parent goes on" if same else " and the parent differs")
"""


@pytest.mark.parametrize(
    ("parent", "child"),
    [("idle", "same"), ("busy", "this process was forked while another thread generated speech")],
)
def test_a_child(tiny_folder: Path, parent: str, child: str) -> None:
    command = [sys.executable, "-c", FORK, str(tiny_folder), parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(child)
    assert done.stdout.endswith(" at once and the parent goes on\n")
