"""How long others wait for the store while much is purged: a start wants it within 50 ms."""
import os
import sys
import tempfile
import time

from run import ROOT, figure

sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from big_store import fill

import roexec


def main():
    with tempfile.TemporaryDirectory() as folder:
        store = roexec.Store(os.path.join(folder, "store")).create()
        fill(store, 30_000, 500)
        store.keep_open()
        pid = os.fork()
        if pid == 0:
            roexec.Upkeep(roexec.Store(store.path), None).purge_runs(newest=5)
            os._exit(0)
        waits = []
        while os.waitpid(pid, os.WNOHANG) == (0, 0):
            began = time.monotonic()
            with store.write():
                waits.append(time.monotonic() - began)
            time.sleep(0.01)
        store.close()
    waits.sort()
    print(figure("median wait for the store during a purge, of 50 ms",
                 waits[len(waits) // 2] / 0.05, "<=", 1))
    print(figure("longest wait but 5 % of them, of 50 ms", waits[len(waits) * 19 // 20] / 0.05,
                 "<=", 2))


if __name__ == "__main__":
    main()
