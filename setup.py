"""Put the demo model and the lock into the wheel, where the code looks for them. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

LOCK = ("runtime.txt", "torch-cpu.txt", "torch-cu130.txt")
"""What serving needs of the lock, for `verbatim bundle` in an installed copy."""


class BuildWithData(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # then they are found in the checkout
            self._add(sorted(Path("demo/model").iterdir()), Path("engine", "demo_model"))
            self._add([Path("requirements", name) for name in LOCK], Path("server", "bundle", "lock"))

    def _add(self, files: list[Path], folder: Path) -> None:
        target = Path(self.build_lib) / folder
        self.mkpath(str(target))
        for file in files:
            self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": BuildWithData})
