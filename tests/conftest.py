"""One thread for every test module: sums come in one order, a process may fork, and matrices this small would only make
threads wait for each other, for minutes on a busy machine."""

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
