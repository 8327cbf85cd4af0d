"""The clock of a device that lags behind: one that counts steps, and forbids to wait for it."""

import pytest
import torch

from gnnmd.training.stopwatch import Spans


class Device:
    """Gets work with `give` and does it when told; marks stand in its queue."""

    def __init__(self):
        self.given = self.done = 0
        self.made = 0

    def mark(self):
        self.made += 1
        return DeviceMark(self)


class DeviceMark:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = self.device.given

    def query(self):
        return self.device.done >= self.at

    def elapsed_time(self, end):
        assert self.query()
        assert end.query(), "CUDA raises here: the device is not there yet"
        return 1e3 * (end.at - self.at)

    def synchronize(self):
        pytest.fail("waited for the device")


def step(device, spans, forward, update):
    start = spans.mark()
    device.given += forward
    middle = spans.mark()
    device.given += update
    end = spans.mark()
    spans.add("forward", start, middle, last=False)
    spans.add("update", middle, end, last=True)


def test_spans_of_a_lagging_device_are_complete_when_it_arrives():
    device = Device()
    spans = Spans(device.mark)
    for i in range(50):
        step(device, spans, 3, 2)
        device.done = max(0, device.given - 12)  # two to three steps behind
        device.given += i % 2  # idle work between steps belongs to none
    device.done = device.given
    assert spans.take() == {"forward": 150.0, "update": 100.0}
    assert spans.take() == {}
    assert device.made < 20  # marks are used again


def test_what_the_device_has_not_done_yet_counts_the_next_time():
    device = Device()
    spans = Spans(device.mark)
    step(device, spans, 3, 2)
    device.done = 4  # inside the update
    assert spans.take() == {"forward": 3.0}
    device.done = 5
    assert spans.take() == {"update": 2.0}


@pytest.mark.gpu
def test_events_of_a_gpu_measure_its_work():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spans = Spans(lambda: torch.cuda.Event(enable_timing=True))
    x = torch.ones(4096, 4096, device="cuda")
    start = spans.mark()
    for _ in range(20):
        x = x @ x * 1e-4
    middle = spans.mark()
    end = spans.mark()
    torch.cuda.synchronize()
    spans.add("work", start, middle, last=False)
    spans.add("nothing", middle, end, last=True)
    seconds = spans.take()
    assert seconds["work"] > 10 * seconds["nothing"]
