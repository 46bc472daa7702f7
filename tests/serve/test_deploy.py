"""The files of deploy/ fit the service: metrics exist, ports and probes agree, nothing runs with rights."""

import json
import re
from pathlib import Path

import yaml

from serve.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"


def documents(path: Path) -> list[dict]:
    return [d for d in yaml.safe_load_all(path.read_text("utf-8")) if d]


def served_metrics() -> set[str]:
    metrics = Metrics()
    return {sample.name for family in metrics.registry.collect() for sample in family.samples} | {
        f"{family.name}{end}"
        for family in metrics.registry.collect()
        for end in ("", "_total", "_bucket", "_count", "_sum")
    }


def names_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)|\"[^\"]*\"", "", expression)
    words = set(re.findall(r"[a-z_]{4,}", bare))
    return words - {"rate", "increase", "histogram_quantile"}


def test_alerts_and_board_ask_for_metrics_that_exist():
    rules = documents(DEPLOY / "monitoring" / "alerts.yaml")[0]["groups"][0]["rules"]
    board = json.loads((DEPLOY / "monitoring" / "board.json").read_text("utf-8"))
    asked = [rule["expr"] for rule in rules]
    asked += [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) > 15
    known = served_metrics()
    for expression in asked:
        assert names_in(expression) <= known, expression


def test_pods_run_without_rights_and_with_probes_of_the_service():
    workload, service, _ = documents(DEPLOY / "kubernetes" / "service.yaml")
    pod = workload["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    paths = {container[f"{p}Probe"]["httpGet"]["path"] for p in ("startup", "readiness", "liveness")}
    assert paths == {"/readyz", "/healthz"}
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    scaler = documents(DEPLOY / "kubernetes" / "autoscaler.yaml")[0]
    assert scaler["spec"]["metrics"][0]["pods"]["metric"]["name"] in served_metrics()
    assert scaler["spec"]["scaleTargetRef"]["kind"] == workload["kind"]


def test_the_image_of_docker_ends_as_a_user_and_knows_the_flags():
    from common.config import parse_options
    from serve.options import ServeOptions

    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    final = text.rpartition("FROM ")[2]
    assert "USER 10001" in final and "pip install" not in final
    flags = json.loads(final.partition("ENTRYPOINT ")[2].replace("\\\n", ""))[3:]
    options = parse_options(ServeOptions, flags)
    assert options.host == "0.0.0.0" and str(options.audit_dir) == "/state/audit"
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["painter"]
    assert compose["read_only"] and compose["cap_drop"] == ["ALL"]
