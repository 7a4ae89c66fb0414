"""Which layouts a model, a batch and a cluster allow: said one by one with the reason."""

from __future__ import annotations

from triaxial import BadInput
from triaxial.cluster.spec import Cluster
from triaxial.model.spec import ModelSpec
from triaxial.plan.layout import Layout, check_layout, micro_batches
from triaxial.plan.workload import Training


def check_training_layout(layout: Layout, model: ModelSpec, cluster: Cluster, training: Training) -> None:
    """Refuse a layout that this model, batch and cluster do not allow, naming what would do.

    Raises:
        BadInput: the sentence says which rule is broken.
    """
    if layout.world_size != cluster.num_gpus:
        raise BadInput(
            f"tp*cp*dp*pp is {layout.world_size} ranks, but {cluster.name} has {cluster.num_gpus} GPUs: "
            "make the two equal"
        )
    check_layout(layout, model, training.seq_len)
    count = micro_batches(layout, training.global_batch)
    if layout.schedule == "interleaved" and count % layout.pp:
        raise BadInput(
            f"the interleaved schedule needs a multiple of pp={layout.pp} micro-batches (arXiv 2104.04473), "
            f"not {count}: change mb or dp"
        )
    if layout.ep > 1 and model.experts is None:
        raise BadInput(f"{model.name} has no experts to spread over ep={layout.ep}: leave ep out")
    if model.experts and model.experts.count % layout.ep:
        raise BadInput(f"ep={layout.ep} does not divide the {model.experts.count} experts of {model.name}")
    if layout.cp > 1 and training.seq_len % (2 * layout.cp):
        raise BadInput(
            f"cp={layout.cp} cuts a sequence into {2 * layout.cp} parts (two a rank, to balance causal attention), "
            f"which do not divide {training.seq_len} tokens"
        )
