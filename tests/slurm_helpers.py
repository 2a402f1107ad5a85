"""A real Slurm with two nodes on loopback, for tests; everything is in a temporary folder.

Needs root and Debian's packages: apt-get install --no-install-recommends slurmctld slurmd
slurm-client munge libpmi2-0 slurm-wlm-basic-plugins
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
PROGRAMS = "munged slurmctld slurmd sbatch srun squeue scancel scontrol sinfo".split()
MISSING = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH)]
WHY_NOT = f"no Slurm ({', '.join(MISSING)}): apt-get install slurmctld slurmd ..." * bool(MISSING)
if os.geteuid() != 0:
    WHY_NOT = WHY_NOT or "the daemons of Slurm need root"

# cred_expire is also how long a requeued job waits: 120 s if it is not given.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
DefMemPerNode=3000
KillWait=5
SlurmdTimeout=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=8000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=60
"""


class Cluster:
    """The daemons by name: munged, slurmctld, n1 and n2; `environment` is for Slurm's commands."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": SEARCH}
        sockets = [socket.socket() for _ in range(3)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
        for one in sockets:
            one.close()
        values = {"folder": folder, "host": socket.gethostname(), "ports": ports}
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**values))
        # GPUs for Slurm alone: it wants files, and looks no further.
        gpus = "".join(f"NodeName=n[1-2] Name=gpu File={folder}/gpu{i}\n" for i in range(2))
        (folder / "gres.conf").write_text(gpus)
        for i in range(2):
            (folder / f"gpu{i}").touch()
        (folder / "state").mkdir()
        (folder / "munge.key").write_bytes(os.urandom(128))
        (folder / "munge.key").chmod(0o600)

    def start(self, name: str, *command: str) -> None:
        """Starts a daemon in the foreground."""
        with open(self.folder / f"{name}.log", "ab") as out:
            options = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            env = os.environ | self.environment
            self.daemons[name] = subprocess.Popen(command, env=env, **options)

    def start_all(self) -> None:
        files = {"socket": "munge.socket", "key-file": "munge.key", "seed-file": "munge.seed"}
        files |= {"pid-file": "munged.pid", "log-file": "munged.log"}
        words = [f"--{option}={self.folder / name}" for option, name in files.items()]
        # --force: the folder is not open to other users
        self.start("munged", "munged", "--foreground", "--force", *words)
        self.wait_for(lambda: (self.folder / "munge.socket").exists())
        self.start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        self.wait_for(self.is_idle)

    def is_idle(self) -> bool:
        return self.call("sinfo", "-hN", "-o", "%N %T").split() == ["n1", "idle", "n2", "idle"]

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    @staticmethod
    def wait_for(true, seconds: float = 30):
        """What `true` returns once it is truthy."""
        end, error = time.monotonic() + seconds, None
        while time.monotonic() < end:
            try:
                if found := true():
                    return found
            except AssertionError as why:
                error = why
            time.sleep(0.1)
        raise AssertionError(f"not within {seconds} s") from error

    def call(self, *command: str) -> str:
        """What a command of Slurm prints."""
        options = {"env": os.environ | self.environment, "text": True, "capture_output": True}
        done = subprocess.run(command, timeout=30, **options)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def processes(self, node: str | None = None) -> list[psutil.Process]:
        """What this cluster, or what one node of it, has started: steps, then daemons and tasks.

        All but slurmstepd, whose environment is empty, have the configuration in theirs.
        """
        steps, found = {}, {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment, parent = process.environ(), process.parent()
                if environment.get("SLURM_CONF") != self.environment["SLURM_CONF"]:
                    continue
                if (
                    node is None
                    or environment.get("SLURMD_NODENAME") == node
                    or process.pid == self.daemons[node].pid
                ):
                    if parent and "slurmstepd" in " ".join(parent.cmdline()):
                        steps[parent.pid] = parent
                    found[process.pid] = process
        found.pop(os.getpid(), None)
        return [*(steps | found).values()]

    def kill_node(self, node: str) -> None:
        """SIGKILL to slurmd and all it has started, as a power failure."""
        kill_all([psutil.Process(self.daemons[node].pid), *self.processes(node)])
        self.daemons.pop(node).wait()

    def stop_all(self) -> None:
        """Cancels all jobs, ends the daemons in the reverse order, and what is left."""
        known = self.processes()
        with contextlib.suppress(AssertionError):
            self.call("scancel", "--user=root")
            self.wait_for(lambda: not self.call("squeue", "-h"), 20)
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        kill_all([*known, *self.processes()])
        self.wait_for(lambda: not any(map(is_alive, known)))


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL in this order: slurmstepd would report the end of its tasks."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def slurm() -> Iterator[Cluster]:
    """A cluster with two idle nodes; at the end none of its processes is left."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # a socket's path is short
        cluster = Cluster(Path(folder))
        try:
            cluster.start_all()
            yield cluster
        finally:
            cluster.stop_all()
