"""Servers of the web page with nano, pictures that it reads, and programs that ask."""

import pytest

import mg_fast
from mg_fast.web.limits import Limits
from tests.web.serving import another_client, running


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The page of nano, which draws."""
    # The tests' own folder is made before, or it would lie in the server's folder and be gone with it.
    tmp_path_factory.getbasetemp()
    pytest.importorskip("gradio", reason="gradio is not installed: `make test` installs it")
    with running(mg_fast.load("nano", painter="nano"), Limits(sessions=40), grace_s=0.5) as server:
        yield server


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Files of pictures by the numbers that nano reads in them."""
    from recipes.nano.scenes import draw_scene

    folder, numbers = tmp_path_factory.mktemp("scenes"), ("4083", "275", "61")
    for i, number in enumerate(numbers):
        draw_scene(5, i, split="unseen", number=number).image.save(folder / f"{number}.png")
    return {number: folder / f"{number}.png" for number in numbers}


@pytest.fixture
def client(server, tmp_path):
    client = another_client(server, tmp_path)
    yield client
    client.close()


@pytest.fixture
def broken_painter(server, monkeypatch):
    """Lets the painter of the server fail."""

    def draw(*_, **__):
        raise mg_fast.DrawingError("the paint is empty")

    return lambda: monkeypatch.setattr(server.site.pipeline.painter, "draw", draw)
