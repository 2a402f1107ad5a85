"""Five seeds as Ray Jobs: pip install "ray[default]"; python params/cluster/ray_jobs.py

Runs in the checkout, which is uploaded without .git and the files of .gitignore. The nodes
need the packages of workbench in their environment, and /runs on a shared filesystem.
"""

from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient("http://127.0.0.1:8265")  # of the cluster
for seed in range(5):
    train = f"python -m workbench train params/digits_baseline.yaml -p seed={seed}"
    # Ray starts no job again by its exit code: 1 is failed; 3 is stopped with a
    # checkpoint, or a store of images did not answer. To end a run: ray job stop.
    entrypoint = (
        "trap 'exit 3' TERM; code=3; "  # the shell waits for the checkpoint too
        f"while [ $code = 3 ]; do {train} -p runs_dir=/runs; code=$?; done; exit $code"
    )
    # No submission_id: Ray refuses one that it has seen, also of a job that ended.
    client.submit_job(
        entrypoint=entrypoint,
        entrypoint_num_gpus=1,
        entrypoint_num_cpus=8,  # without it OMP_NUM_THREADS is 1
        # From SIGTERM to SIGKILL Ray waits 3 s: too short for a large checkpoint.
        runtime_env={"working_dir": ".", "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}},
    )
