"""What prevents loss spikes: changes of the configuration that others report to have worked, with their sources."""

from __future__ import annotations

from typing import Any

from megalm.config.optim import READS


def list_advice(config: Any) -> list[str]:
    """List the changes that this configuration has not made yet."""
    model, optim = config.model, config.optim
    hints = []
    if not model.qk_norm:
        hints.append(
            "model.qk_norm=true: normalise queries and keys, so that attention logits cannot grow "
            "(Dehghani et al. 2023, arXiv:2302.05442; Wortsman et al. 2023, arXiv:2309.14322)"
        )
        if not optim.qk_clip:
            hints.append(
                "optim.qk_clip=100: where the network must stay as it is, scale down the query and key weights of heads "
                "whose attention logits pass it (Kimi K2, arXiv:2507.20534)"
            )
    if not model.z_loss:
        hints.append("model.z_loss=1e-4: keep the output logits from drifting (PaLM, arXiv:2204.02311, sec. 5)")
    if not model.embedding_norm:
        hints.append("model.embedding_norm=true: normalise the embeddings (BLOOM, arXiv:2211.05100, sec. 3.2)")
    if optim.clip_grad_norm == 0 or optim.clip_grad_norm > 1:
        hints.append("optim.clip_grad_norm=1.0, or lower: GPT-3 and OPT clip at 1.0, Marin at 0.2")
    if optim.adaptive_clip.kind == "none":
        hints.append(
            "optim.adaptive_clip.kind=adagc or zclip: clip by what is usual for each tensor, or for the whole gradient "
            "(arXiv:2502.11034, arXiv:2504.02507)"
        )
    if "update_clip" in READS[optim.name] and not optim.update_clip:
        hints.append(
            "optim.update_clip=true: StableAdamW, no update that its second moment does not explain (2304.13013)"
        )
    if "betas" in READS[optim.name] and len(optim.betas) == 2 and optim.betas[1] > 0.95:
        hints.append(
            f"optim.betas=[{optim.betas[0]:g},0.95]: a second moment that forgets {optim.betas[1]:g} too slowly lags "
            "behind growing gradients (OPT, arXiv:2205.01068; Wortsman et al. 2023, arXiv:2304.13013)"
        )
    hints.append(f"optim.lr={optim.lr * 0.5:g}: half of this run's, or a longer optim.warmup_steps")
    return hints
