"""Peaks of a machine, the limits that follow, and the memory that a run adds."""

import time

import pytest
import torch

from headwise.bench.machine import Machine, Work, measure_machine
from headwise.bench.memory import peak_memory

CPU = torch.device("cpu")


@pytest.mark.parametrize(("flops", "read", "limit"), [(6e9, 1e9, 3000.0), (6e9, 5e9, 5000.0)])
def test_the_limit_is_the_longer_of_computing_and_reading(flops, read, limit):
    machine = Machine(bandwidth=1e9, products={torch.float32: 2e9}, memory=0)
    assert machine.limit(Work(flops, read), torch.float32) == limit


def test_a_machine_has_peaks_in_each_dtype():
    machine = measure_machine(CPU, (torch.float32, torch.bfloat16), toy=True)
    assert set(machine.products) == {torch.float32, torch.bfloat16}
    assert min(machine.bandwidth, *machine.products.values()) > 1e6
    assert machine.memory > 2**20


def test_memory_is_what_a_run_holds_at_its_peak():
    def run() -> None:
        held = torch.ones(67, 2**18)
        both = held, held + 1
        time.sleep(0.1)  # where others use the cores, too, the watcher waits for its turn
        del both

    assert 2 * 67 <= peak_memory(run, CPU) < 3 * 67
