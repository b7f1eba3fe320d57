"""A TrainJob for Kubeflow Trainer."""

import argparse
from typing import Any

from ._job import Job, add_job_arguments, make_node_script, read_job, write_job, write_yaml

HELP = "a TrainJob for Kubeflow Trainer, on its runtime torch-distributed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_job_arguments(parser)
    parser.add_argument("--image", required=True, help="container image with megalm in it")
    parser.add_argument("--queue", help="Kueue's local queue")
    parser.add_argument("--runtime", default="torch-distributed", help="cluster training runtime (torch-distributed)")


def run(args: argparse.Namespace) -> int:
    """Write the yaml."""
    write_job(write_yaml(make_trainjob(read_job(args), args.image, args.queue, args.runtime)), args.out)
    return 0


def make_trainjob(job: Job, image: str, queue: str | None, runtime: str) -> dict[str, Any]:
    """Make a node for each node; how often it is started again is the runtime's to say."""
    script = make_node_script(job, "$PET_NODE_RANK", "$PET_MASTER_ADDR", "$PET_MASTER_PORT")
    trainer: dict[str, Any] = {"image": image, "numNodes": job.nodes, "command": ["bash", "-c", script]}
    if job.gpus:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": job.gpus}}
    metadata: dict[str, Any] = {"name": job.name}
    if queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": queue}
    return {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": metadata,
        "spec": {"runtimeRef": {"name": runtime}, "trainer": trainer},
    }
