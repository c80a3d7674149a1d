"""Python programs in processes of their own that start with torch imported, which takes most of a short program's time.

A server imports torch and forks a process for each program. What is decided when qkernels is imported, and by the
environment that it finds then, is as in a fresh interpreter; what torch decides when it is imported is not.
"""

from __future__ import annotations

import functools
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

from conftest import ROOT

SERVER = """
import json, os, sys
import torch
for line in sys.stdin:
    asked = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(asked["folder"], name), os.O_WRONLY | os.O_CREAT), number)
    os.environ.update(asked["env"])
    os.chdir(asked["root"])
    sys.path.insert(0, asked["root"])
    exec(asked["code"], {"__name__": "__main__"})
    break
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """Ends when this process does, as then no one can write to it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command, pipe = [sys.executable, "-c", SERVER], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)


def run_forked(code: str, root: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` where qkernels is imported from ``root``."""
    process = server()
    assert process.stdin is not None
    assert process.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        process.stdin.write(json.dumps({"code": code, "root": str(root), "env": env, "folder": folder}) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], 300)[0]:
            process.kill()
            server.cache_clear()
            raise TimeoutError(f"after 300 s still running: {code}")
        returncode = int(process.stdout.readline())
        stdout, stderr = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(["-c", code], returncode, stdout, stderr)
