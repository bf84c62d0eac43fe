"""1,000 jobs of `sh -c true` due in one second, beside a C loop that starts as many one by one."""
import os
import shutil
import subprocess
import sys
import time

from run import figure
from serving import query, server, wait_for, workplace

COUNT = 1000
LOOP = r"""
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
extern char **environ;
int main(int count, char **words) {
    char *command[] = {"sh", "-c", "true", 0};
    struct timespec began, ended;
    clock_gettime(CLOCK_MONOTONIC, &began);
    for (int left = atoi(words[1]); left; left--) {
        pid_t pid;
        int status;
        if (posix_spawn(&pid, "/bin/sh", 0, 0, command, environ)) return 1;
        waitpid(pid, &status, 0);
    }
    clock_gettime(CLOCK_MONOTONIC, &ended);
    printf("%f\n", ended.tv_sec - began.tv_sec + (ended.tv_nsec - began.tv_nsec) / 1e9);
}
"""


def reference(folder):
    """A function that says how many seconds the loop takes: in C where there is a compiler."""
    if shutil.which("cc"):
        path = os.path.join(folder, "loop")
        subprocess.run(["cc", "-O2", "-x", "c", "-o", path, "-"], input=LOOP, text=True, check=True)
        return lambda: float(subprocess.check_output([path, str(COUNT)]))
    return python_loop


def python_loop():
    began = time.perf_counter()
    for _ in range(COUNT):
        os.waitpid(os.posix_spawn("/bin/sh", ["sh", "-c", "true"], os.environ), 0)
    return time.perf_counter() - began


def herd(folder, command):
    """Seconds from the slot until all of its runs have ended and are recorded."""
    slot = int(time.time()) + 12
    at = time.gmtime(slot)
    schedule = f"{at.tm_sec} {at.tm_min} {at.tm_hour} {at.tm_mday} {at.tm_mon} *"
    jobs = [{"id": f"job-{number}", "schedule": schedule, "timezone": "UTC", "command": "true",
             "directory": "/"} for number in range(COUNT)]
    with server(folder, command, jobs, "--no-http") as (process, store):
        if time.time() > slot - 1:
            sys.exit("the server was not ready in time")
        wait_for(lambda: time.time() >= slot, process)
        wait_for(lambda: query(store, "SELECT COUNT(*) FROM runs WHERE finished_at IS NOT NULL")
                 == [(COUNT,)], process)
        taken = time.time() - slot
        kinds = query(store, "SELECT state, COUNT(DISTINCT job_id), COUNT(*) FROM runs "
                             "GROUP BY state")
    if kinds != [("succeeded", COUNT, COUNT)]:
        sys.exit(f"not each job ran once: {kinds}")
    return taken


def main():
    ratios = []
    for _ in range(3):                  # the best of three: what else the machine does only adds
        with workplace() as (folder, command):
            loop = reference(folder)
            before, taken, after = loop(), herd(folder, command), loop()
            ratios.append((before + after) / 2 / taken)
    print(figure("rate of 1,000 jobs due at once / of a C loop of posix_spawn", max(ratios),
                 ">=", 0.6))


if __name__ == "__main__":
    main()
