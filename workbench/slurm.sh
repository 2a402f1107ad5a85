#!/bin/bash
# Trains the runs whose folders are the lines of @TASKS@, one array index each.
# Written by `workbench submit` for you to read and edit; then call: sbatch @SCRIPT@
# The training, not this script, gets SIGTERM 120 s before the time limit, and writes a checkpoint.
#SBATCH --signal=TERM@120
#SBATCH --requeue --open-mode=append
@DIRECTIVES@

export WORKBENCH_ROOT=@ROOT@
python=@PYTHON@
run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" @TASKS@)

# Writes node and number of requeues into job.json, for `workbench runs`.
"$python" -m workbench.jobs start "$run"

# One process per GPU. Those that end first wait ten minutes for the one that writes the results.
[ -z "$SLURM_CPUS_PER_TASK" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
srun --wait=600 "$python" -m workbench train "$run/recipe.yaml"
code=$?

# 0: finished. 1: failed. 3: stopped, with a checkpoint. 143: stopped before the first step.
# The second command refuses after a file STOP, and after three starts without a new step.
if [ $code = 3 ] || [ $code = 143 ]; then
  "$python" -m workbench.jobs requeue "$run" || exit 1
  scontrol requeue "$SLURM_JOB_ID"  # ends this script
fi
exit $code
