"""Run Python in a new process without Triton's interpreter. The tests themselves run in the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(*arguments: str, stdin: str = "") -> str:
    """Run ``python ARGUMENTS`` in the repository's root; return its output, or fail with what it wrote to stderr."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *arguments]
    done = subprocess.run(
        command, input=stdin, capture_output=True, text=True, cwd=ROOT, env=env | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
