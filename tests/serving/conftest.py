"""A book that the tests share."""

import pytest

from tests.support.served import IMAGES, METHODS, save_masks, save_task, separate, write_book


@pytest.fixture(scope="package")
def shelf_folder(tmp_path_factory):
    """Checkpoints of three tasks of classes, ``boots``, ``bags`` and ``coats``, and of ``masks``, with a book of all."""
    folder = tmp_path_factory.mktemp("book")
    tasks = {n: save_task(folder / f"{n}.safetensors", m, 3 + i, i).name for i, (n, m) in enumerate(METHODS.items())}
    tasks["masks"] = save_masks(folder / "masks.safetensors").name
    write_book(folder, **tasks)
    return folder


@pytest.fixture(scope="package")
def truth(shelf_folder, tmp_path_factory):
    """What ``vpeft predict`` says of each of ``IMAGES`` by itself, by task."""
    folder = tmp_path_factory.mktemp("images")
    return {name: separate(shelf_folder / f"{name}.safetensors", IMAGES, folder) for name in METHODS}


@pytest.fixture
def book(shelf_folder):
    return shelf_folder / "book.json"
