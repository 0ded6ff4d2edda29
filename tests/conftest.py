"""One Ray for the whole test run, and what several tests build on."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import toy
from hypothesis import settings

torch.set_num_threads(1)  # tiny products gain nothing by two, and beside other work they wait for each other
settings.register_profile("raylp", deadline=None)  # nothing here asserts a time
settings.load_profile("raylp")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # nor do those of Ray's workers, which may have more threads
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of COMET and llm-compressor themselves need their environments, which take minutes to make."""
    from raylp.beside import COMET, COMPRESSOR

    there = {library.name: library.version(library.python()) for library in (COMET, COMPRESSOR)}
    for name, version in there.items():
        skip = pytest.mark.skip(reason=f"no environment for it: make {name}")
        for item in items:
            if version is None and item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray, as a run starts it."""
    import ray

    from raylp.cluster import start
    from raylp.recipe import Resources

    start(Resources())
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def toy_checkpoint() -> Path:
    """A small Llama that translates the toy language; tests/toy.py says which layers it can do without."""
    return toy.toy_model()


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The four splits of the toy language pair."""
    return toy.write_toy_data(tmp_path_factory.mktemp("toy-data"))


def toy_recipe(model: Path, data: dict[str, Path], run_dir: Path, **sections: object) -> dict:
    """A recipe on the toy task, as a mapping."""
    return {
        "model": str(model),
        "data": {"xx-yy": {split: str(file) for split, file in data.items()}},
        "prompt": {"template": toy.TOY_TEMPLATE},
        "run_dir": str(run_dir),
        **sections,
    }
