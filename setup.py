"""What setup.cfg cannot say: folders of the top level that a wheel carries as ``vpeft/shipped``."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "model_zoo")  # named in MANIFEST.in too


class BuildWithFolders(build_py):
    """Copies the folders beside the modules; an editable installation reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for name in SHIPPED:
            target = Path(self.build_lib, "vpeft", "shipped", name)
            shutil.rmtree(target, ignore_errors=True)
            if not Path(name).is_dir():
                raise FileNotFoundError(f"{name}/ is missing beside setup.py: commands of the wheel would fail without it")
            shutil.copytree(name, target)


setup(cmdclass={"build_py": BuildWithFolders})
