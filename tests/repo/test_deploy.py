"""What is in `deploy/`: it names what exists, and the programs that read it accept it.

The queries of the dashboard are run by `tests/server/metrics/test_dashboard.py`.
"""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from engine import parse_models, read_yaml
from server.bundle import wheels
from server.metrics.series import PREFIX, SERIES
from server.metrics.snapshot import STATES
from server.settings import ServerSettings, read_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
CONTAINERFILE = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
UNIT = (DEPLOY / "verbatim.service").read_text(encoding="utf-8")


def tool(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} here (Debian: apt-get install {package})")
    return found


# -- the image -------------------------------------------------------------------------------------------------------


def instructions(name: str) -> list[str]:
    """The arguments of every instruction of the Containerfile that has this name."""
    lines = re.sub(r"^#.*\n", "", CONTAINERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ")]


def copied() -> set[str]:
    """What the image takes from the checkout."""
    sources = [line.split()[:-1] for line in instructions("COPY") if not line.startswith("--from")]
    return {name.rstrip("/") for names in sources for name in names}


def test_the_image_is_built_from_what_the_wheel_needs() -> None:
    """`verbatim bundle` builds the wheel from the same files, and its tests install that wheel."""
    assert copied() == {*wheels._SOURCES, *wheels._BUILD_FILES, "deploy/container.yaml"}


def test_the_builder_gets_every_file_of_it_and_no_other() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied()
    left_out = [line.removeprefix("**/") for line in lines[1:] if not line.startswith("!")]
    for name in copied():
        place = ROOT / name
        for file in [place, *place.rglob("*")]:
            if "__pycache__" not in file.parts:
                assert not any(fnmatch.fnmatch(file.name, pattern) for pattern in left_out), file


def test_what_the_image_runs() -> None:
    """It serves the file that is copied into it, as a user with a name, and writes only into its volumes."""
    command = json.loads(instructions("ENTRYPOINT")[0]) + json.loads(instructions("CMD")[0])
    assert command == ["verbatim", "serve", "--config", "/etc/verbatim/models.yaml"]
    assert f"deploy/container.yaml {command[-1]}" in instructions("COPY")
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    volumes = json.loads(instructions("VOLUME")[0])
    assert f"{variables['XDG_CACHE_HOME']}/verbatim" in volumes
    assert variables["HOME"] in volumes
    [user] = instructions("USER")
    assert f"--uid {user} " in CONTAINERFILE
    data = read_yaml(DEPLOY / "container.yaml")
    settings = read_settings(data, "container.yaml")
    assert parse_models(data["models"], base=DEPLOY, where="container.yaml")[0].builtin == "demo"
    assert Path(settings.ledger or "").parent.as_posix() in volumes
    assert not settings.allow_anonymous, "whoever starts it says so"
    assert instructions("EXPOSE") == [str(settings.port)]
    builds = {name[6:-4] for name in (path.name for path in (ROOT / "requirements").glob("torch-*.txt"))}
    assert set(re.findall(r"TORCH=(\w+)", CONTAINERFILE)) <= builds


# -- the unit --------------------------------------------------------------------------------------------------------


def unit(name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)
    return str(value)


def test_systemd_reads_the_unit(tmp_path: Path) -> None:
    """It names every key and value that it does not know."""
    command, *_ = unit("ExecStart").split()
    copy = tmp_path / "verbatim.service"
    copy.write_text(UNIT.replace(f"={command} ", f"={sys.executable} "))
    verify = [tool("systemd-analyze", "systemd"), "verify", "--man=no"]

    def said() -> str:
        done = subprocess.run([*verify, str(copy)], capture_output=True, text=True, check=False)
        return "\n".join(line for line in (done.stdout + done.stderr).splitlines() if copy.name in line)

    assert said() == ""
    copy.write_text(copy.read_text().replace("KillMode=mixed", "KillMode=mixd"))
    assert "kill mode" in said()


def test_the_units_paths_are_those_of_its_guide() -> None:
    program, *arguments = unit("ExecStart").split()
    guide = (ROOT / "docs" / "guides" / "deployment.md").read_text(encoding="utf-8")
    assert arguments == ["serve", "--config", "/etc/verbatim/models.yaml"]
    state = f"/var/lib/{unit('StateDirectory')}"
    for path in (program, arguments[-1], f"ledger: {state}/verbatim.db", f"useradd --system --home-dir {state}"):
        assert path in guide, path
    assert unit("WorkingDirectory") == state
    assert f"HOME={state} XDG_CACHE_HOME=/var/cache " in unit("Environment")
    assert unit("CacheDirectory") == "verbatim", "the folder that the server makes in XDG_CACHE_HOME"
    assert int(unit("TimeoutStopSec")) > 2 * ServerSettings().shutdown_seconds


# -- metrics ---------------------------------------------------------------------------------------------------------

HISTOGRAM = ("_bucket", "_sum", "_count")
NAMES = {
    f"{PREFIX}{series.name}{ending}": {*series.labels, *(["le"] if ending == "_bucket" else [])}
    for series in SERIES
    for ending in (HISTOGRAM if series.kind == "histogram" else ("",))
}
OF_PROMETHEUS = {"job", "instance"}


def queries() -> dict[str, str]:
    """Every query of the dashboard and the rules, with the text that shows its labels."""
    found = {}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            found[target["expr"]] = target["legendFormat"]
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found[variable["query"]] = ""
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"]:
        for rule in group["rules"]:
            found[rule["expr"]] = rule["annotations"]["summary"]
    return found


@pytest.mark.parametrize("query", queries())
def test_a_query_names_metrics_and_labels_that_exist(query: str) -> None:
    metrics = re.findall(r"verbatim:\w+", query)
    assert set(metrics) <= set(NAMES)
    if not metrics:
        assert re.match(r"up\b|process_\w+", query)
    labels = set.intersection(*(NAMES[name] for name in metrics)) if metrics else set()
    lists = [*re.findall(r"by \(([^)]*)\)", query), *re.findall(r"label_values\([^,]+, (\w+)\)", query)]
    used = {label.strip() for text in lists for label in text.split(",")}
    used |= set(re.findall(r"[{,]\s*(\w+)\s*(?:=~|!=|!~|=)", query))
    used |= set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", queries()[query]))
    assert used <= labels | OF_PROMETHEUS
    for state in re.findall(r'state=~"([^"]*)"', query):
        assert set(state.split("|")) <= set(STATES)


def test_the_dashboard_is_one_that_grafana_can_import() -> None:
    """Ids are unique, panels do not overlap, and no data source but the chosen one is named."""
    dashboard = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert {panel["type"] for panel in panels} == {"row", "timeseries", "table"}
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
        assert panel["type"] == "row" or (panel["description"] and panel["targets"]), panel["title"]
    assert dashboard["id"] is None if "id" in dashboard else True
    sources = re.findall(r'"uid": "([^"]*)"', json.dumps({**dashboard, "uid": ""}))
    assert set(sources) <= {"${datasource}", ""}
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(panels)))
    assert used - {"__rate_interval"} <= variables


CASES = """\
rule_files: [RULES]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {series: 'up{job="verbatim", instance="down"}', values: '0x10'}
      - {series: 'up{job="verbatim", instance="good"}', values: '1x10'}
      - {series: 'verbatim:model_state{instance="good", model_name="a", state="dead"}', values: '1x10'}
      - {series: 'verbatim:model_state{instance="good", model_name="b", state="ready"}', values: '1x10'}
      - {series: 'verbatim:model_info{instance="good", model_name="c", reproducible="no"}', values: '1x10'}
      - {series: 'verbatim:model_info{instance="good", model_name="d", system_fingerprint="vb-1"}', values: '1x10'}
      - {series: 'verbatim:model_info{instance="other", model_name="d", system_fingerprint="vb-2"}', values: '1x10'}
      - {series: 'verbatim:model_info{instance="good", model_name="e", system_fingerprint="vb-1"}', values: '1x5 _x5'}
      - {series: 'verbatim:model_info{instance="good", model_name="e", system_fingerprint="vb-2"}', values: '_x6 1x5'}
      - {series: 'verbatim:num_requests_waiting{instance="good", model_name="f"}', values: '3x20'}
      - {series: 'verbatim:generation_tokens_total{instance="good", model_name="f"}', values: '7x20'}
      - {series: 'verbatim:num_requests_waiting{instance="good", model_name="g"}', values: '3x20'}
      - {series: 'verbatim:generation_tokens_total{instance="good", model_name="g"}', values: '0+5x20'}
      - {series: 'verbatim:ledger_up{instance="good"}', values: '0x10'}
      - {series: 'verbatim:ledger_settlements_set_aside{instance="good"}', values: '0x10'}
    promql_expr_test:
      - expr: 'ALERTS{alertstate="firing"}'
        eval_time: 10m
        exp_samples: EXPECTED
"""


def test_each_rule_fires_when_it_should_and_not_else(tmp_path: Path) -> None:
    """By Prometheus's own test of rules; two servers of one model do not count as a changed fingerprint."""
    fire = [
        ("VerbatimDown", "critical", 'instance="down", job="verbatim"'),
        ("VerbatimModelDown", "critical", 'instance="good", model_name="a", state="dead"'),
        ("VerbatimNotReproducible", "warning", 'instance="good", model_name="c", reproducible="no"'),
        ("VerbatimFingerprintChanged", "warning", 'instance="good", model_name="e"'),
        ("VerbatimQueue", "critical", 'instance="good", model_name="f"'),
        ("VerbatimLedger", "critical", 'instance="good"'),
    ]
    samples = [
        {"labels": f'ALERTS{{alertname="{name}", alertstate="firing", severity="{severity}", {labels}}}', "value": 1}
        for name, severity, labels in fire
    ]
    rules = yaml.safe_load((DEPLOY / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    assert {rule["alert"] for rule in rules} == {name for name, *_ in fire}
    text = CASES.replace("RULES", str(DEPLOY / "alerts.yml")).replace("EXPECTED", json.dumps(samples))
    text = text.replace('ALERTS{alertstate="firing"}', 'ALERTS{alertstate="firing"}')
    (tmp_path / "cases.yml").write_text(text)
    command = [tool("promtool", "prometheus"), "test", "rules", str(tmp_path / "cases.yml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_reads_its_configuration() -> None:
    done = subprocess.run(
        [tool("promtool", "prometheus"), "check", "config", str(DEPLOY / "prometheus.yml")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [job] = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"127.0.0.1:{ServerSettings().port}"]}]
