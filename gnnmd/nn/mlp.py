"""Small dense networks."""

from torch import Tensor, nn

from gnnmd.nn.edge_operations import EdgeOperations
from gnnmd.nn.experts import ExpertLinear, Routing


class RadialMLP(nn.Module):
    """Linear, LayerNorm, SiLU, twice, and a last Linear, on the scalars of an edge.

    Args:
        c_in: columns of the input.
        hidden: width of the two hidden layers.
        c_out: columns of the output.
        experts: number of experts of each linear map, 0 for plain ones.
    """

    def __init__(self, c_in: int, hidden: int, c_out: int, *, experts: int = 0):
        super().__init__()
        self.linear_1 = ExpertLinear(c_in, hidden, experts=experts)
        self.norm_1 = nn.LayerNorm(hidden)
        self.linear_2 = ExpertLinear(hidden, hidden, experts=experts)
        self.norm_2 = nn.LayerNorm(hidden)
        self.linear_3 = ExpertLinear(hidden, c_out, experts=experts)

    def forward(self, x: Tensor, routing: Routing | None, ops: EdgeOperations) -> Tensor:
        """Map ``[E, c_in]`` to ``[E, c_out]``."""
        x = ops.activated_norm(self.linear_1(x, routing), self.norm_1)
        x = ops.activated_norm(self.linear_2(x, routing), self.norm_2)
        return self.linear_3(x, routing)
