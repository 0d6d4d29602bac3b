"""A process that hangs, with a child that hangs; an interrupt ends neither."""

import os
import signal
import subprocess
import sys
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(f"sleeps as {os.getpid()}, child {child.pid}", flush=True)
    time.sleep(600)
