"""Five seeds as Ray Jobs: pip install "ray[default]"; python params/cluster/ray_jobs.py"""

from ray.job_submission import JobSubmissionClient

client = JobSubmissionClient("http://127.0.0.1:8265")  # of the cluster
for seed in range(5):
    train = f"python -m workbench train params/digits_baseline.yaml -p seed={seed}"
    # Ray starts no job again by its exit code: 1 is failed; 3 is stopped with a
    # checkpoint, or a store of images did not answer.
    entrypoint = (
        f"code=3; while [ $code = 3 ]; do {train} -p runs_dir=/runs; code=$?; done; exit $code"
    )
    # No submission_id: Ray refuses one that it has seen, also of a job that ended.
    client.submit_job(
        entrypoint=entrypoint, entrypoint_num_gpus=1, runtime_env={"working_dir": "."}
    )
