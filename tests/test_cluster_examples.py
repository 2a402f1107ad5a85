"""The examples of params/cluster with real processes, and with Ray where it is installed.

For Ray: `pip install "ray[default]"` beside the workbench, then
`python -m pytest -m slow tests/test_cluster_examples.py`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from workbench import ROOT, runs

EXAMPLES = ROOT / "params" / "cluster"
SHORT = "-p runs_dir={} -p workers=0 -p train_fraction=0.2"


def environment_with_python(tmp_path: Path) -> dict[str, str]:
    """Where `python` is the interpreter of the tests, as in an image with the workbench."""
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_a_pod_ends_with_an_exit_code_of_its_failure_policy_and_the_next_one_resumes(tmp_path):
    job = yaml.safe_load((EXAMPLES / "kubernetes.yaml").read_text(encoding="utf-8"))
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = [rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule]
    assert codes == [[3, 143], [1]]  # tried again, and failed
    [container] = job["spec"]["template"]["spec"]["containers"]
    environment = environment_with_python(tmp_path) | {"JOB_COMPLETION_INDEX": "2"}
    run = runs.Run(tmp_path / "digits_baseline-seed2")

    def start_pod(options: str = "") -> subprocess.Popen:
        *shell, text = container["command"]
        text = text.replace("-p runs_dir=/runs", SHORT.format(tmp_path)) + options
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*shell, text], cwd=ROOT, env=environment, **pipes)

    with start_pod(" -p lr=fast") as pod:
        assert "valid number" in pod.stdout.read()
    assert pod.returncode == 1
    with start_pod(" -p epochs=8") as pod:
        next(line for line in pod.stdout if line.startswith("epoch   2"))
        pod.send_signal(signal.SIGTERM)  # as a kubelet does: to the container's process alone
        pod.communicate()
    assert pod.returncode == 3
    step = run.status()["step"]
    with start_pod(" -p epochs=8") as pod:
        text = pod.stdout.read()
    assert pod.returncode == 0 and f"resumes after step {step}" in text, text


DRIVER = """
import fcntl, socket, struct, subprocess, sys, time
from pathlib import Path

with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:  # loopback: up and running
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x41))
example, folder, ray, short = sys.argv[1:]
start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--num-cpus=2"]
start += ["--num-gpus=1", "--disable-usage-stats", f"--temp-dir={ray}"]
subprocess.run(start, check=True, stdout=subprocess.DEVNULL)

from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient("http://127.0.0.1:8265")
run = Path(folder) / "digits_baseline-seed0"

def submit():
    known = {job.submission_id for job in client.list_jobs()}
    text = Path(example).read_text().replace("-p runs_dir=/runs", short)
    text = text.replace("range(5)", "range(1)").replace("num_cpus=8", "num_cpus=1")
    exec(compile(text, example, "exec"), {})
    [job] = {job.submission_id for job in client.list_jobs()} - known
    return job

def wait(done):
    while not done():
        time.sleep(0.2)

def ended(job):
    wait(lambda: client.get_job_info(job).status not in ("PENDING", "RUNNING"))
    return client.get_job_info(job)

job = submit()
wait(lambda: "epoch   2" in client.get_job_logs(job) or client.get_job_info(job).driver_exit_code)
print(client.get_job_logs(job))
client.stop_job(job)
print(ended(job).status, (run / "status.json").read_text())
info = ended(job := submit())
print(info.status, info.driver_exit_code)
print(client.get_job_logs(job))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason='needs pip install "ray[default]"')
def test_a_job_of_ray_is_stopped_with_a_checkpoint_and_resumed(tmp_path):
    """In a network of its own, since Ray listens on all addresses; all ends with its process."""
    program = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*program, "true"]).returncode:
        pytest.skip("needs unshare, and the right to use it")
    environment = environment_with_python(tmp_path) | {"OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # "", which Ray compares with its number of GPUs
    short = f"{SHORT.format(tmp_path)} -p epochs=10"
    program += [sys.executable, "-c", textwrap.dedent(DRIVER)]
    with tempfile.TemporaryDirectory(prefix="ray") as ray:  # short, for the names of its sockets
        program += [str(EXAMPLES / "ray_jobs.py"), str(tmp_path), ray, short]
        options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(program, timeout=120, **options)
    assert "STOPPED" in done.stdout and "stopped by SIGTERM after step" in done.stdout, done.stderr
    step = done.stdout.partition("stopped by SIGTERM after step ")[2].split()[0]
    assert "SUCCEEDED 0" in done.stdout and f"resumes after step {step}" in done.stdout
    status = json.loads((tmp_path / "digits_baseline-seed0" / "status.json").read_text())
    assert status["state"] == "finished"
