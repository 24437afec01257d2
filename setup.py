"""Put the demo model into the wheel, beside the engine, which looks for it there. All else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithModel(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # then the engine finds demo/model in the checkout
            target = Path(self.build_lib) / "engine" / "demo_model"
            self.mkpath(str(target))
            for file in sorted(Path("demo/model").iterdir()):
                self.copy_file(str(file), str(target / file.name))


setup(cmdclass={"build_py": BuildWithModel})
