"""A script for one machine without a scheduler."""

import argparse

from megalm.config.errors import ConfigError

from ._job import Job, add_job_arguments, read_job, write_job

HELP = "a script for one machine without a scheduler: starts again what broke off"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Write the script. Errors: ConfigError for several nodes, which need a scheduler."""
    if args.nodes != 1:
        raise ConfigError(f"--nodes {args.nodes}: local is one machine; several need slurm, jobset or trainjob.")
    write_job(make_script(read_job(args)), args.out)
    return 0


def make_script(job: Job) -> str:
    """Start again after status 1, and where the launcher itself was killed; a signal to the script saves and ends the run."""
    return f"""#!/bin/bash
set -u
told=
for ((start = 0; start <= {job.restarts}; start++)); do
  {job.command} &
  run=$!
  trap 'told=1; kill -TERM "$run" 2>/dev/null' TERM INT HUP
  while true; do
    wait "$run"
    status=$?
    kill -0 "$run" 2>/dev/null || break
  done
  case $status in
    0 | 2 | 3 | 130) exit "$status" ;;
  esac
  [[ -z $told ]] || exit "$status"
  sleep 10 # ranks whose launcher was killed save meanwhile
done
exit "$status"
"""
