"""From a resolved configuration and a mesh to this rank's model chunks, with their initial weights."""

import torch

from megalm.config import Config, ConfigError
from megalm.model.transformer import Transformer
from megalm.objectives.objective import Objective
from megalm.objectives.registry import build_objective
from megalm.ops.attention_choice import AttentionChoice
from megalm.parallel.initialize import initialize
from megalm.parallel.layer_context import LayerContext
from megalm.parallel.mesh import Mesh
from megalm.parallel.slices import tie
from megalm.pipeline.partition import partition_layers
from megalm.pipeline.schedule import Schedule, build_schedule, place_stages
from megalm.precision.policy import check_device, make_policy


def choose_schedule(config: Config, data_size: int = 1) -> Schedule:
    """Choose the pipeline schedule of one step, for the usual number of micro-batches of a data rank."""
    parallel, train = config.parallel, config.train
    micro_batches = max(1, train.global_batch_size // (train.micro_batch_size * data_size))
    return build_schedule(parallel.schedule, parallel.pipeline, micro_batches, parallel.virtual_pipeline)


def find_local_seq_length(config: Config, mesh: Mesh, seq_length: int | None = None) -> int:
    """Find positions of a sequence (default: of model.seq_length) in the tensors that travel between pipeline stages: S/(c t)
    or S/c.
    """
    seq_length = (seq_length or config.model.seq_length) // mesh.context.size
    return seq_length // mesh.tensor.size if config.parallel.sequence else seq_length


def build_chunks(
    config: Config,
    mesh: Mesh,
    objective: Objective | None = None,
    *,
    device: torch.device | str | None = None,
) -> list[Transformer]:
    """This rank's chunks of the model, by chunk number, with weights drawn by (seed, global name, global index).

    objective: what the last chunk computes of its hidden states; None: the configured one.

    On the meta device nothing is drawn. Errors: ConfigError when there are fewer layers than stages.
    """
    model, parallel = config.model, config.parallel
    device = torch.device(device if device is not None else mesh.device)
    check_device(config.precision.fp8.recipe, device)
    attention = AttentionChoice(config.ops.attention, config.train.determinism)
    context = LayerContext(mesh, parallel, make_policy(config.precision, model), device, attention)
    where = place_stages(parallel.schedule, parallel.pipeline, parallel.virtual_pipeline)
    if model.num_layers < where.stages:
        raise ConfigError(
            f"model.num_layers={model.num_layers} cannot be cut into {where.stages} pipeline stages "
            f"(parallel.pipeline={parallel.pipeline} x {where.chunks} chunks): use at most {model.num_layers} stages."
        )
    layers = partition_layers(model, where.stages)
    chunks = []
    for stage in where.of_rank(mesh.pipeline.rank):
        chunk = Transformer(
            model,
            context,
            layers=layers[stage],
            first=stage == 0,
            last=stage == where.stages - 1,
            objective=(objective or build_objective(config)) if stage == where.stages - 1 else None,
        )
        chunks.append(chunk)
    if model.tie_embeddings or model.prediction.depth:
        _share_embedding(chunks, mesh)
    if device.type != "meta":
        for chunk in chunks:
            initialize(chunk, config.train.seed)
    return chunks


def _share_embedding(chunks: list[Transformer], mesh: Mesh) -> None:
    """Give the last stage the embedding, too: one parameter where the first and the last stage share a rank; else two copies,
    whose gradients are summed."""
    first = next((chunk for chunk in chunks if chunk.first), None)
    last = next((chunk for chunk in chunks if chunk.last), None)
    if first is last:
        return
    if first is not None and last is not None:
        last.embedding.weight = first.embedding.weight
    elif first is not None:
        tie(first.embedding.weight, mesh.pipeline_ends)
    elif last is not None:
        tie(last.embedding.weight, mesh.pipeline_ends)
