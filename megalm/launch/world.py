"""How many ranks there are, and who started them."""

from collections.abc import Mapping
from dataclasses import dataclass

from megalm.config import Config, ConfigError


@dataclass(frozen=True)
class World:
    """size: ranks in all. external: another launcher (torchrun, Slurm, Kubernetes) has started this process as `rank`."""

    size: int
    rank: int = 0
    local_rank: int = 0
    external: bool = False


def find_world(config: Config, environment: Mapping[str, str]) -> World:
    """The world from the launcher's variables, or from `world_size`.

    By default there is a rank for each GPU, or without any as many as the layout's axes multiply to.

    torchrun and Kubernetes' training operators set RANK, WORLD_SIZE and LOCAL_RANK; srun sets SLURM_PROCID, SLURM_NTASKS
    and SLURM_LOCALID, beside which MASTER_ADDR and MASTER_PORT must be exported.
    Errors: ConfigError where the variables are incomplete or contradict the configuration.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = _external(environment, "WORLD_SIZE", "RANK", "LOCAL_RANK")
    elif int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        if "MASTER_ADDR" not in environment or "MASTER_PORT" not in environment:
            raise ConfigError(
                "Slurm started this process without MASTER_ADDR and MASTER_PORT: export the first node's name and a free "
                "port before srun, for example MASTER_ADDR=$(scontrol show hostnames | head -1) MASTER_PORT=29500."
            )
        found = _external(environment, "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    elif config.dry_run:
        return World(size=config.world_size or _product(config))
    else:
        return World(size=_local_size(config))
    if config.world_size not in (None, found.size):
        raise ConfigError(
            f"world_size={config.world_size}, but the launcher started {found.size} ranks: leave world_size out."
        )
    return found


def _local_size(config: Config) -> int:
    """Ranks to start on this machine."""
    gpus = accelerator_count(config)
    if gpus and config.world_size is not None and config.world_size > gpus:
        raise ConfigError(
            f"world_size={config.world_size}, but torch sees {gpus} GPU{'s' * (gpus > 1)} here, and each rank needs one of its "
            f"own: set world_size to at most {gpus}, or device=cpu."
        )
    return config.world_size or gpus or _product(config)


def accelerator_count(config: Config) -> int:
    """GPUs that the run may use here."""
    if config.device == "cpu":
        return 0
    import torch

    count = torch.cuda.device_count()
    if config.device == "cuda" and count == 0:
        raise ConfigError("device=cuda, but torch sees no GPU here: leave device=auto, or set device=cpu.")
    return count


def device_type(config: Config) -> str:
    """cpu or cuda."""
    return "cuda" if accelerator_count(config) else "cpu"


def _product(config: Config) -> int:
    parallel = config.parallel
    data = parallel.data if isinstance(parallel.data, int) else 1
    return data * parallel.tensor * parallel.pipeline * parallel.context


def _external(environment: Mapping[str, str], size: str, rank: str, local: str) -> World:
    try:
        return World(int(environment[size]), int(environment[rank]), int(environment.get(local, "0")), external=True)
    except ValueError:
        values = ", ".join(f"{name}={environment.get(name)}" for name in (size, rank, local))
        raise ConfigError(f"the launcher's variables are not numbers: {values}.") from None
