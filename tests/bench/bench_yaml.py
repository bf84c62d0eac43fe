"""How fast a jobs file is read: in rates of PyYAML's pure-Python safe loader, and as it grows."""
import importlib
import os
import subprocess
import sys
import tempfile
import time
import venv

from run import ROOT, figure

sys.path.insert(0, ROOT)
from roexec import load_yaml

JOBS = 10_000
ROUNDS = 8
# PyYAML takes ten seconds and more for all jobs. It reads this many, and its rate per byte counts,
# which is, if anything, too good for it: it gets slower as the file grows.
PYYAML_JOBS = 1_000
JOB = """\
  - id: job-{0}
    name: "Backup of database {0}"
    schedule: "{1} {2} * * *"
    command: /usr/local/bin/backup --database db{0} --to /srv/backup/db{0}
    env:
      LEVEL: {1}
      TARGET: host{2}.example.com
    timeout: 1h30m
    retries: 3
    backoff:
      delay: 30s
    notify:
      on_failure: mail -s "backup of db{0} failed" ops@example.com
"""


def jobs_file(count):
    return "jobs:\n" + "".join(JOB.format(i, i % 60, i % 24) for i in range(count))


def seconds(load, text, times=1):
    """The processor time that reading the text takes."""
    began = time.process_time()
    for _ in range(times):
        load(text)
    return (time.process_time() - began) / times


def pyyaml(folder):
    """PyYAML, from a venv in `folder` where this Python has none."""
    try:
        return importlib.import_module("yaml")
    except ImportError:
        venv.create(folder, with_pip=True)
        subprocess.run([f"{folder}/bin/python", "-m", "pip", "install", "-q", "pyyaml"], check=True,
                       stdout=sys.stderr)
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        sys.path.append(os.path.join(folder, "lib", version, "site-packages"))
        importlib.invalidate_caches()
        return importlib.import_module("yaml")


def main():
    few, many, sample = map(jobs_file, (JOBS // 10, JOBS, PYYAML_JOBS))
    with tempfile.TemporaryDirectory() as folder:
        yaml = pyyaml(folder)

        def load_pyyaml(text):
            return yaml.load(text, Loader=yaml.SafeLoader)

        if load_pyyaml(sample) != load_yaml(sample):
            sys.exit("PyYAML and roexec read the jobs file differently")
        loads = (load_yaml, few, 10), (load_yaml, many), (load_pyyaml, sample)
        # The least of several rounds, taken in turns: what else the machine does only adds. All
        # three take about as long, so that a quiet moment is as likely for each.
        rounds = [[seconds(*load) for load in loads] for _ in range(ROUNDS)]
        small, large, theirs = map(min, zip(*rounds))
    print(f"{len(many) / large / 1e6:.1f} MB/s of {len(many) / 1e6:.2f} MB; "
          f"PyYAML {len(sample) / theirs / 1e6:.2f} MB/s of {len(sample) / 1e6:.2f} MB")
    print(figure("rate of reading jobs / of PyYAML's pure-Python safe loader",
                 len(many) / large / (len(sample) / theirs), ">=", 10))
    print(figure(f"time per byte of {JOBS} jobs / of {JOBS // 10}",
                 large / len(many) / (small / len(few)), "<=", 1.3))


if __name__ == "__main__":
    main()
