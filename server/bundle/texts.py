"""The texts of a bundle that people and shells read: README.txt and install.sh. Pure."""

from __future__ import annotations

import platform
import sys

__all__ = ["install_script", "readme"]

_README = """\
verbatim {version}: a local inference server, {what}.

This folder is complete: nothing is downloaded when you check it, install it or serve from it.

Check it
    sha256sum -c checksums.sha256          (on macOS: shasum -a 256 -c checksums.sha256)

    That finds damage. Whoever can change a file can change checksums.sha256, too: to be sure of its origin, compare
    the SHA-256 of checksums.sha256 with the one that was printed when this folder was made, sent another way.
    Where verbatim is installed already, `verbatim bundle check THIS_FOLDER` also finds files that should not be here.

Install it
    sh install.sh VENV

    It needs Python {python} with its module venv, on {platform}. It makes the virtual environment VENV (without an
    argument: verbatim-venv in the current folder) and installs the packages in wheels/ into it, each compared with
    its hash in requirements.txt. PYTHON=/path/to/python before the command names the Python to use.

Serve
    {serve}

What is here
    wheels/             verbatim and every package it needs, for Python {python} on {platform}
    requirements.txt    the releases and the hashes of these packages
{models}\
    checksums.sha256    the SHA-256 of every file
{key}\
    install.sh          the installation
"""

_MODELS = """\
    models/             the models' files, as their publishers wrote them
    models.yaml         which models are served, and how
"""

_SERVE_OWN = """\
VENV/bin/verbatim serve                                 (the demo model, which is part of the software)
    VENV/bin/verbatim serve --model FOLDER_OR_GGUF_FILE
    VENV/bin/verbatim serve --config models.yaml            (a file that names your models)"""

_KEY = "    {name}    the public key with which receipts of these models are checked\n"

_INSTALL = """\
#!/bin/sh
# Install the packages in this folder into a new virtual environment. Nothing is downloaded.
#     sh install.sh [VENV]
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
venv=${{1:-verbatim-venv}}
python=${{PYTHON:-$(command -v python{python} || command -v python3 || echo python3)}}

"$python" -c 'import platform, sys
found = "%d.%d" % sys.version_info[:2], sys.platform + "-" + platform.machine()
sys.exit(found != ("{python}", "{platform}") and "this bundle is for Python {python} on {platform}; this is Python %s \\
on %s. Name another with PYTHON=..." % found)'
if command -v sha256sum >/dev/null; then sum="sha256sum"; else sum="shasum -a 256"; fi
fail() {{ echo "$1; nothing was installed" >&2; exit 1; }}
(cd "$here" && $sum -c checksums.sha256 >/dev/null) || fail "this folder is damaged"
if [ -e "$venv" ]; then fail "$venv exists already"; fi

# No configuration of pip's on this machine may add an index or a constraint.
PIP_CONFIG_FILE=/dev/null
export PIP_CONFIG_FILE
"$python" -m venv "$venv"
"$venv/bin/python" -m pip --isolated --disable-pip-version-check install --quiet --no-cache-dir \\
  --no-index --find-links "$here/wheels" --require-hashes --no-deps --only-binary :all: -r "$here/requirements.txt"
"$venv/bin/python" -m pip --isolated check
echo "installed. Serve with: $venv/bin/verbatim serve {serve}"
"""


def readme(version: str, models: list[str], key: str | None) -> str:
    """Write README.txt. `models`: their ids; none for the software alone. `key`: the name of the file with the public
    key, if there is one."""
    return _README.format(
        version=version,
        what=f"with the models {', '.join(models)}" if models else "without models but the demo",
        serve="VENV/bin/verbatim serve --config THIS_FOLDER/models.yaml" if models else _SERVE_OWN,
        models=_MODELS if models else "",
        python=_python(),
        platform=_platform(),
        key=_KEY.format(name=key) if key else "",
    )


def install_script(*, with_models: bool) -> str:
    """Write install.sh for this Python on this platform."""
    serve = "--config $here/models.yaml" if with_models else "--model FOLDER"
    return _INSTALL.format(python=_python(), platform=_platform(), serve=serve)


def _python() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def _platform() -> str:
    return f"{sys.platform}-{platform.machine()}"
