"""A batch script for Slurm."""

import argparse

from ._job import Job, add_job_arguments, read_job, write_job

HELP = "a batch script for sbatch: told before its time is over, saved, and put into the queue again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument("--time", default="24:00:00", help="limit of one start (24:00:00)")
    parser.add_argument("--cpus", type=int, default=8, help="cores of each rank (8)")
    parser.add_argument("--partition", help="as sbatch's")
    parser.add_argument("--account", help="as sbatch's")
    parser.add_argument("--qos", help="as sbatch's")


def run(args: argparse.Namespace) -> int:
    """Write the script."""
    write_job(make_script(read_job(args), args), args.out)
    return 0


def make_script(job: Job, args: argparse.Namespace) -> str:
    """On one node a task that supervises its ranks; on several a task for each rank."""
    tasks = 1 if job.nodes == 1 else job.ranks
    cpus = args.cpus * (job.ranks if job.nodes == 1 else 1)
    lines = [
        f"--job-name={job.name}", f"--nodes={job.nodes}", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={job.gpus}"] if job.gpus else []), f"--time={args.time}",
        *(f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(args, name))),
        "--output=%x-%j.out", "--open-mode=append", "--requeue", f"--signal=B:USR1@{max(120, job.grace_s + 60)}",
    ]  # fmt: skip
    meeting = (
        ""
        if job.nodes == 1
        else """
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
export MASTER_ADDR MASTER_PORT
"""
    )
    return (
        "#!/bin/bash\n"
        + "".join(f"#SBATCH {line}\n" for line in lines)
        + f"""set -u
{meeting}
# When a task ends, the others save or see that it is gone; what stands after that time is ended.
srun --kill-on-bad-exit=0 --wait={job.grace_s} {job.command} &
step=$! told=
trap 'told=1; kill -USR1 "$step" 2>/dev/null' USR1 # its time is nearly over; srun passes it on to all ranks, which save
trap 'kill -USR1 "$step" 2>/dev/null' TERM         # preempted or cancelled: Slurm knows whether it starts again
while true; do
  wait "$step"
  status=$?
  kill -0 "$step" 2>/dev/null || break # else it was a signal that ended the wait
done

case $status in
  0) ;;
  2 | 3) echo "status $status: not started again, a person has to look" >&2 ;;
  130) [[ -z $told ]] || scontrol requeue "$SLURM_JOB_ID" ;; # saved
  *)
    if ((${{SLURM_RESTART_COUNT:-0}} < {job.restarts})); then
      scontrol requeue "$SLURM_JOB_ID"
    else
      echo "status $status after {job.restarts} restarts: not started again" >&2
    fi
    ;;
esac
exit "$status"
"""
    )
