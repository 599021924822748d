"""No rank outlives its launcher: it would train on alone, into a directory that somebody else may have gone on with.

Nothing of torch is imported here, so that this is the first thing that a rank does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_launcher() -> None:
    """From now on the system ends this process, by SIGKILL, when the one that started it ends. Linux only.

    For a process of several (WORLD_SIZE); one that was started alone may outlive its shell. SIGKILL because a run may
    be killed at any moment, while finishing a step would keep its directory locked for minutes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or sys.platform != "linux":
        return
    launcher = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it ended in between, and nobody will send the signal
        os.kill(os.getpid(), signal.SIGKILL)
