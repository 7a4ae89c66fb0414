"""`triaxial lab`: run a job on a cluster of nodes with slow links between them, on one machine."""

from __future__ import annotations

import click

from triaxial.cluster.units import parse_quantity


@click.command(name="lab", context_settings={"ignore_unknown_options": True})
@click.option("--nodes", type=click.IntRange(1, 254), default=2, show_default=True, help="Network namespaces.")
@click.option("--ranks-per-node", type=click.IntRange(1), default=2, show_default=True, help="Processes on each.")
@click.option(
    "--between", metavar="RATE", help="Of a node's link in each direction, like 200mbit.  [default: unshaped]"
)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND...")
def command(nodes: int, ranks_per_node: int, between: str | None, arguments: tuple[str, ...]) -> None:
    """Run `triaxial COMMAND` under a launcher on every node of a cluster made of network namespaces.

    Needs root and iproute2. The machine's own network is left alone, and nothing stays behind.
    """
    from triaxial.measure.lab import Lab

    rate = None if between is None else parse_quantity(between, "bytes/s")
    with Lab(nodes, ranks_per_node, rate) as lab:
        lab.run(arguments)
