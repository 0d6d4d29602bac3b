"""Tables are kept by their sizes, within a limit and while they are needed; those of a trace are not kept."""

import threading

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mg_fast.runtime.device_tables import cached_on_device, caching_fake_tensors

CPU = torch.device("cpu")


def counted(limit, numbers=25):
    """A function whose tables take four bytes for each number, and the list of its calls."""
    made = []

    @cached_on_device(limit)
    def table(size, device):
        made.append(size)
        return size, [torch.full((numbers,), float(size), device=device)]

    return table, made


def test_what_was_used_longest_ago_goes_first():
    table, made = counted(250)
    for size in (1, 2, 1, 3, 1, 2):
        assert table(size, CPU)[1][0][0] == size
    assert made == [1, 2, 3, 2] and table.store.held_bytes == 200 and len(table.store) == 2


def test_what_is_larger_than_the_limit_is_not_kept():
    table, made = counted(99)
    table(1, CPU), table(1, CPU)
    assert made == [1, 1] and table.store.held_bytes == len(table.store) == 0


def test_without_a_limit_all_is_kept():
    table, made = counted(None)
    for size in [*range(100), *range(100)]:
        table(size, CPU)
    assert made == list(range(100))


def test_fake_tables_are_not_kept():
    table, made = counted(None)
    with FakeTensorMode():
        table(1, CPU)
    assert type(table(1, CPU)[1][0]) is torch.Tensor and made == [1, 1]


def test_fake_tables_are_cached_where_it_is_asked_for():
    table, made = counted(None)
    with FakeTensorMode(), caching_fake_tensors(table) as count:
        table(1, CPU), table(1, CPU)
        assert made == [1] and count() == 1
    with FakeTensorMode():
        table(1, CPU)
    assert made == [1, 1]


def test_tables_of_inference_serve_training():
    table, _ = counted(None)
    with torch.inference_mode():
        table(1, CPU)
    assert not table(1, CPU)[1][0].is_inference()


def test_threads():
    """With many threads and more tables than fit, the results and the count of bytes stay right."""
    table, _ = counted(8 * 400, numbers=100)
    wrong = []

    def work(seed):
        for size in torch.randint(0, 12, (300,), generator=torch.Generator().manual_seed(seed)).tolist():
            if table(size, CPU)[1][0][0] != size:
                wrong.append(size)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and table.store.held_bytes == 400 * len(table.store) <= 8 * 400


@pytest.mark.skipif(not torch.cuda.is_available(), reason="graphs need a GPU")
def test_what_a_graph_reads_stays():
    device = torch.device("cuda", torch.cuda.current_device())
    table, made = counted(250)
    table(1, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = table(1, device)[1][0] * 2
    for size in range(2, 20):
        table(size, device)
    noise = [torch.full((25,), -1.0, device=device) for _ in range(100)]
    graph.replay()
    assert (out == 2).all() and len(noise) == 100 and made.count(1) == 1
