"""The first process of a host: sets up what is the host's own, then reaps orphans.

    python -m tests.support.lab.init NAME FOLDER

It runs as process 1 in namespaces of its own (see hosts.py), and all other processes of the host
end with it. Prints "ready". FOLDER/hosts becomes the host's /etc/hosts, FOLDER/ray its /tmp/ray.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def main(name: str, folder: str) -> None:
    socket.sethostname(name)
    _mount("-t", "tmpfs", "-o", "size=1g", "none", "/dev/shm")
    os.makedirs("/tmp/ray", exist_ok=True)
    _mount("--bind", f"{folder}/ray", "/tmp/ray")
    _mount("--bind", f"{folder}/hosts", "/etc/hosts")
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    print("ready", flush=True)
    while True:
        signal.sigwait([signal.SIGCHLD])
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main(*sys.argv[1:])
