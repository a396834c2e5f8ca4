"""Lowering to an ExecuTorch program in a fraction of the time.

ExecuTorch 1.5 lowers a U-Net in minutes, because it redoes work on whole graphs at every small step
(docs/explanation/log.md has the profile). `fewer_repeats` takes the repetition out while it is
active: the same program comes out (tests/test_to_executorch.py). With P partitions and N nodes:

- `create_submodule_from_nodes` sorts the whole graph anew after each partition, and every new graph
  has the Python code of all submodules generated again: O(P N + P²). Sorting once at the end does.
- `GraphModule.recompile` generates Python code after each pass, though the passes interpret graphs
  and never call it: it is generated when somebody calls the module.
- `ExportedProgramPassManager.check` verifies before each of the 17 passes of each partition;
  the programs that passes give are still verified when they are made.
- `NodeSource` deep-copies the history of each node at each retracing; no history reaches a program.
- `_can_merge_partitions` builds sets of nodes for each pair of partitions; bits of integers do.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def fewer_repeats() -> Iterator[None]:
    """While active, lowering in this process (all of its threads) skips what it would redo."""
    import torch.fx.traceback
    from executorch.exir.backend import backend_api
    from executorch.exir.backend.canonical_partitioners import group_partitioner
    from executorch.exir.pass_manager import ExportedProgramPassManager

    grouping = group_partitioner.GroupBasedPartitioner
    with contextlib.ExitStack() as stack:
        for owner, name, quick in (
            (backend_api, "create_submodule_from_nodes", _unsorted),
            (backend_api, "_create_partitions_in_graph_module", _sorted_once),
            (torch.fx.GraphModule, "recompile", _when_called),
            (ExportedProgramPassManager, "check", _unchecked),
            (torch.fx.traceback.NodeSource, "__init__", _without_history),
            (grouping, "_can_merge_partitions", _by_bits),
        ):
            stack.enter_context(mock.patch.object(owner, name, quick(getattr(owner, name))))
        yield


def _unsorted(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`create_submodule_from_nodes` that leaves the graph's order to `_sorted_once`."""

    def create(gm: Any, nodes: Any, tag: str, skip_legalize_graph: bool = True) -> Any:
        return plain(gm, nodes, tag, skip_legalize_graph=True)

    return create


def _sorted_once(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`_create_partitions_in_graph_module` that sorts after the last partition.

    Sorting makes new nodes, so those that it returns are looked up again by their targets.
    """
    from torch.fx.passes.tools_common import legalize_graph

    def create(gm: Any, *rest: Any) -> dict[str, list[Any]]:
        calls: dict[str, list[Any]] = plain(gm, *rest)
        if not any(calls.values()):
            return calls
        legalize_graph(gm)
        of_target = {node.target: node for node in gm.graph.nodes if node.op == "call_module"}
        return {key: [of_target[node.target] for node in nodes] for key, nodes in calls.items()}

    return create


def _when_called(plain: Callable[..., Any]) -> Callable[..., Any]:
    """`GraphModule.recompile` that waits until the module is called."""
    from torch.fx.graph import _PyTreeCodeGen

    def recompile(self: Any) -> None:
        if isinstance(self._graph._codegen, _PyTreeCodeGen):
            self._in_spec = self._graph._codegen.pytree_info.in_spec
            self._out_spec = self._graph._codegen.pytree_info.out_spec
        self.__dict__.setdefault("_code", "")  # what a log of the module shows

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            plain(self)
            return type(self).forward(self, *args, **kwargs)

        type(self).forward = forward  # each module has a class of its own

    return recompile


def _unchecked(_: Callable[..., Any]) -> Callable[..., None]:
    return lambda self, program: None


def _without_history(plain: Callable[..., None]) -> Callable[..., None]:
    """`NodeSource.__init__` that names the node it came from, without that one's own history."""

    def init(self: Any, node: Any, pass_name: str = "", action: Any = None) -> None:
        plain(self, None, pass_name, action)
        if node:
            self.node_info = self.NodeInfo(node.name, str(node.target), id(node.graph))

    return init


def _by_bits(plain: Callable[..., bool]) -> Callable[..., bool]:
    """`_can_merge_partitions`: a merge is refused early where a path leaves it and comes back.

    Sets of nodes are integers with a bit a node. What is not refused here is left to `plain`.
    """

    def can_merge(self: Any, p1: int, p2: int, partitions: Any) -> bool:
        reach = _reachability(self)
        (nodes_1, users_1), (nodes_2, users_2) = (reach.bits(partitions[p].nodes) for p in (p1, p2))
        inside = nodes_1 | nodes_2
        outside = (users_1 | users_2) & ~inside
        while outside:
            lowest = outside & -outside
            if reach.down[lowest.bit_length() - 1] & inside:
                return False
            outside ^= lowest
        return plain(self, p1, p2, partitions)

    return can_merge


class _Reachability:
    """Which nodes depend on which, as bits, and the bits of sets of nodes met before."""

    def __init__(self, graph: Any):
        nodes = list(graph.nodes)
        self.index = {node: i for i, node in enumerate(nodes)}
        self.users = [sum(1 << self.index[user] for user in node.users) for node in nodes]
        self.down = [0] * len(nodes)  # all that is reached from a node, itself included
        for i in reversed(range(len(nodes))):
            self.down[i] = 1 << i
            for user in nodes[i].users:
                self.down[i] |= self.down[self.index[user]]
        self._known: dict[int, tuple[Any, int, int, int]] = {}

    def bits(self, nodes: Any) -> tuple[int, int]:
        """Of the nodes of a partition, and of all their users; partitions only ever grow."""
        known = self._known.get(id(nodes))
        if known is None or known[0] is not nodes or known[1] != len(nodes):
            inside = users = 0
            for node in nodes:
                inside |= 1 << self.index[node]
                users |= self.users[self.index[node]]
            known = self._known[id(nodes)] = (nodes, len(nodes), inside, users)
        return known[2], known[3]


def _reachability(partitioner: Any) -> _Reachability:
    if not hasattr(partitioner, "laptop_reachability"):
        partitioner.laptop_reachability = _Reachability(partitioner.graph_module.graph)
    found: _Reachability = partitioner.laptop_reachability
    return found
