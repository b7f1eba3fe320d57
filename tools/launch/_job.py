"""What all jobs have in common: the run's words, checked for as many ranks as the job starts, and where the text goes."""

from __future__ import annotations

import argparse
import math
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megalm.config.compose import compose_config, model_is_given
from megalm.config.errors import ConfigError
from megalm.config.root import Config
from megalm.config.writing import explain_failed_writes

SPARE_S = 30
"""Beside `resilience.grace_s`: until the signal has come to the ranks, and until all processes are gone."""


@dataclass(frozen=True)
class Job:
    """A run on so many nodes."""

    config: Config
    words: list[str]
    nodes: int
    ranks: int
    """On each node."""
    restarts: int

    @property
    def name(self) -> str:
        """Of the run; the job is called so, too."""
        return self.config.run.name

    @property
    def grace_s(self) -> int:
        """From the scheduler's signal to the end."""
        return math.ceil(self.config.resilience.grace_s) + SPARE_S

    @property
    def gpus(self) -> int:
        """On each node."""
        return 0 if self.config.device == "cpu" else self.ranks

    @property
    def command(self) -> str:
        """What each rank runs; on a single node, what runs all of them."""
        alone = [f"world_size={self.ranks}"] if self.nodes == 1 else []
        return shlex.join(["python", "-m", "megalm.launch", *self.words, *alone])


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that all jobs have."""
    parser.add_argument("words", nargs="+", metavar="WORD", help="as for megalm train: +model=7b run.name=mine ...")
    parser.add_argument("--nodes", type=int, default=1, help="machines (1)")
    parser.add_argument("--ranks", type=int, default=8, help="ranks on each, one a GPU unless device=cpu (8)")
    parser.add_argument("--restarts", type=int, default=20, help="how often the job is started again (20)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it there in place of the screen")


def read_job(args: argparse.Namespace) -> Job:
    """Compose and check the run. Errors: ConfigError for what the run itself would refuse, or a job that cannot go on."""
    from megalm.launch.resolve import resolve
    from megalm.plan.search import expand_auto

    for name, least in (("nodes", 1), ("ranks", 1), ("restarts", 0)):
        if (value := getattr(args, name)) < least:
            raise ConfigError(f"--{name} {value}: at least {least}.")
    if not model_is_given(args.words):
        raise ConfigError("choose a model with +model=NAME; megalm train without any word lists them.")
    if not any(word.startswith("run.name=") for word in args.words):
        raise ConfigError(
            "give the run a name, run.name=NAME: a job that is started again finds its checkpoints by it."
        )
    config = compose_config(expand_auto(list(args.words)))
    if config.world_size is not None:
        raise ConfigError(f"world_size={config.world_size}: leave it out, --nodes and --ranks say it.")
    if not config.checkpoint.every or not config.checkpoint.resume:
        raise ConfigError("a job that is started again needs checkpoint.every above 0 and checkpoint.resume=true.")
    if not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,40}[a-z0-9])?", config.run.name):
        raise ConfigError(
            f"run.name={config.run.name}: a job's name has lower case letters, digits and -, and at most 42 of them."
        )
    resolve(config, args.nodes * args.ranks)
    return Job(config, list(args.words), args.nodes, args.ranks, args.restarts)


def write_job(text: str, out: Path | None) -> None:
    """To the file, else to the screen."""
    if out is None:
        sys.stdout.write(text)
        return
    with explain_failed_writes(out):
        out.write_text(text, encoding="utf-8")


def write_yaml(document: dict[str, Any]) -> str:
    """Scripts as blocks of lines, everything in its order."""
    return yaml.dump(document, Dumper=_Blocks, sort_keys=False, width=1000)


class _Blocks(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _represent_text)


def make_node_script(job: Job, node: str, address: str, port: str) -> str:
    """Make the script of one node: a process a rank, whose worst exit status is the script's.

    node, address, port: shell expressions for this node's number, and for where rank 0 is met.
    """
    if job.nodes == 1:
        return f"exec {job.command}\n"
    return f"""# All ranks of this node; a signal is passed on to them, and they save.
set -u
export MASTER_ADDR={address} MASTER_PORT={port} WORLD_SIZE={job.nodes * job.ranks} LOCAL_WORLD_SIZE={job.ranks}
node={node} status=0 lost= pids=()
for ((local = 0; local < {job.ranks}; local++)); do
  RANK=$((node * {job.ranks} + local)) LOCAL_RANK=$local {job.command} &
  pids+=($!)
done
trap 'kill -TERM "${{pids[@]}}" 2>/dev/null' TERM INT HUP
while ((${{#pids[@]}})); do
  sleep 0.3
  left=()
  for pid in "${{pids[@]}}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    wait "$pid"
    code=$?
    case $code in
      0) ;;
      2 | 3) status=$code ;; # refused, or given up: nothing that another start mends
      130) ((status)) || status=130 ;;
      *) ((status == 2 || status == 3)) || status=1 ;;
    esac
    ((code == 0)) || lost=${{lost:-$SECONDS}}
  done
  pids=(${{left[@]+"${{left[@]}}"}})
  if [[ -n $lost ]] && ((SECONDS - lost > {job.grace_s} && ${{#pids[@]}})); then # these do not see that one is gone
    kill -KILL "${{pids[@]}}"
  fi
done
exit "$status"
"""
