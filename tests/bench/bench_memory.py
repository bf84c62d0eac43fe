"""What a server and its launcher hold in memory, with 1,000 jobs and the HTTP interface."""
import sys

from run import figure
from serving import server, wait_for, workplace


def proportional_mib(pid):
    """The proportional set size of a process: its share of what several processes hold."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Pss:")) / 1024


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(word) for word in file.read().split()]


def processor_seconds(pid):
    with open(f"/proc/{pid}/schedstat") as file:
        return int(file.read().split()[0]) / 1e9


def main():
    jobs = [{"id": f"job-{number}", "schedule": f"{number % 60} 2 29 2 *", "command": "true",
             "directory": "/"} for number in range(1000)]
    with workplace() as (folder, command), server(
            folder, command, jobs, "--port", "0") as (process, _):
        wait_for(lambda: len(children(process.pid)) == 1, process)
        launcher, = children(process.pid)
        wait_for(lambda: children(launcher), process)       # it has forked: all is in place
        total = proportional_mib(process.pid) + proportional_mib(launcher)
    print(figure("memory of server and launcher with 1,000 jobs, MiB (PSS)", total, "<=", 25))


if __name__ == "__main__":
    sys.exit(main())
