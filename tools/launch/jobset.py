"""A JobSet for Kubernetes."""

import argparse
from pathlib import PurePosixPath
from typing import Any

from ._job import Job, add_job_arguments, make_node_script, read_job, write_job, write_yaml

WORKSPACE = "/workspace"
"""Where a container works; a run.dir that is relative lies in it."""
HELP = "a JobSet for kubectl apply: all pods start again together, but not what was refused or given up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument("--image", required=True, help="container image with megalm in it")
    parser.add_argument("--queue", help="Kueue's local queue")
    parser.add_argument("--claim", help="persistent volume claim that is mounted at the run's folder")


def run(args: argparse.Namespace) -> int:
    """Write the yaml."""
    write_job(write_yaml(make_jobset(read_job(args), args.image, args.queue, args.claim)), args.out)
    return 0


def make_jobset(job: Job, image: str, queue: str | None, claim: str | None) -> dict[str, Any]:
    """Make a pod for each node. Exit statuses 2 and 3 fail the whole set; all else starts it again."""
    script = make_node_script(
        job, "$JOB_COMPLETION_INDEX", f"${{MASTER_ADDR:-{job.name}-workers-0-0.{job.name}}}", "${MASTER_PORT:-29500}"
    )
    container: dict[str, Any] = {"name": "rank", "image": image, "command": ["bash", "-c", script]}
    if job.gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": job.gpus}}
    memory = {"name": "shm", "emptyDir": {"medium": "Memory"}}
    container["volumeMounts"] = [{"name": "shm", "mountPath": "/dev/shm"}]
    volumes = [memory]
    if claim:
        container["workingDir"] = WORKSPACE
        container["volumeMounts"].append(
            {"name": "runs", "mountPath": str(PurePosixPath(WORKSPACE, job.config.run.dir))}
        )
        volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": claim}})
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [container],
        "volumes": volumes,
    }
    spec = {
        "completions": job.nodes,
        "parallelism": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {"containerName": "rank", "operator": "In", "values": [2, 3]}}
            ]
        },
        "template": {"spec": pod},
    }
    policy = {
        "maxRestarts": job.restarts,
        "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }
    metadata: dict[str, Any] = {"name": job.name}
    if queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": policy,
            "replicatedJobs": [{"name": "workers", "replicas": 1, "template": {"spec": spec}}],
        },
    }
