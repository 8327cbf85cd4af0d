import torch

from gnnmd.nn.float64 import Float64Buffers


class _Table(Float64Buffers):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.register_buffer("table", torch.tensor([1 / 3], dtype=torch.float64))


def test_buffers_keep_their_digits():
    module = torch.nn.Sequential(_Table())
    module.float().half().to(torch.float32)
    assert module[0].weight.dtype == torch.float32
    assert module[0].table.dtype == torch.float64
    assert module[0].table == torch.tensor(1 / 3, dtype=torch.float64)
    assert module.double()[0].table == torch.tensor(1 / 3, dtype=torch.float64)


def test_loaded_values_are_kept():
    module = _Table()
    module.load_state_dict({"weight": torch.zeros(2), "table": torch.tensor([1 / 7], dtype=torch.float64)})
    assert module.float().table == torch.tensor(1 / 7, dtype=torch.float64)
