"""Small dense networks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnnmd.nn.edge_operations import EdgeOperations
from gnnmd.nn.experts import ExpertLinear, Routing, grouped_linear
from gnnmd.nn.scatter import Groups


class RadialMLP(nn.Module):
    """Linear, LayerNorm, SiLU, twice, and a last Linear, of an edge, its source and its target.

    What the first map does to atoms is computed per atom and then gathered.

    Args:
        c_edge: scalars of an edge.
        c_atom: scalars of an atom.
        hidden: width of the two hidden layers.
        c_out: columns of the output.
        experts: number of experts of each linear map, 0 for plain ones.
    """

    def __init__(self, c_edge: int, c_atom: int, hidden: int, c_out: int, *, experts: int = 0):
        super().__init__()
        self.widths = [c_edge, c_atom, c_atom]
        self.linear_1 = ExpertLinear(sum(self.widths), hidden, experts=experts)
        self.norm_1 = nn.LayerNorm(hidden)
        self.linear_2 = ExpertLinear(hidden, hidden, experts=experts)
        self.norm_2 = nn.LayerNorm(hidden)
        self.linear_3 = ExpertLinear(hidden, c_out, experts=experts)

    def forward(
        self,
        x: Tensor,
        sources: tuple[Tensor, Groups],
        targets: tuple[Tensor, Groups],
        routing: Routing | None,
        ops: EdgeOperations,
    ) -> Tensor:
        """Map ``[E, c_edge]`` to ``[E, c_out]``.

        Args:
            x: scalars of the edges.
            sources: scalars of atoms ``[n, c_atom]``, and which of these rows is the source of each edge.
            targets: the same for the targets.
            routing: experts of the edges.
            ops: what computes it.
        """
        weights, bias = self.linear_1.weights(routing), self.linear_1.bias
        (source, j), (target, i) = sources, targets
        if len(weights) > 1:  # each system has its own
            whole = [x, source.index_select(0, j.index), target.index_select(0, i.index)]
            x = grouped_linear(torch.cat(whole, dim=1), weights, bias, routing)
        else:
            w_edge, w_source, w_target = weights[0].split(self.widths, dim=1)
            y = ops.pair_rows(F.linear(target, w_target, bias), i, F.linear(source, w_source), j)
            autocast = torch.is_autocast_enabled(x.device.type)
            x = y + F.linear(x, w_edge) if autocast else y.addmm_(x, w_edge.t())
        x = ops.activated_norm(x, self.norm_1)
        x = ops.activated_norm(self.linear_2(x, routing), self.norm_2)
        return self.linear_3(x, routing)
