"""The deployment of Ray Serve: its options everywhere, the deployment itself where Ray is installed."""

import base64
import importlib.util
import io
import socket
import time

import httpx
import pytest
from PIL import Image
from ray_nodes import needs_ray

from common.config import from_mapping
from dalle.engines import FastOptions
from dalle.pipeline import TextToImage
from serve.audit import verify
from serve.keys import KeyStore, open_database
from serve.ray_app import RayOptions, deploy

TEXT = "一件红色的连衣裙"
has_ray = importlib.util.find_spec("ray") is not None


def test_options():
    options = from_mapping(RayOptions, {"checkpoint": "c", "audit_dir": "a", "num_replicas": 2})
    own = options.of_service("r1")
    assert own.checkpoint == "c" and str(own.audit_dir) == "a/r1" and not own.open
    with pytest.raises(ValueError, match="max_replicas"):
        RayOptions(min_replicas=3, max_replicas=2)


@pytest.mark.skipif(has_ray, reason="Ray is installed")
def test_without_ray_it_says_what_to_install():
    with pytest.raises(ValueError, match="pip install"):
        deploy({})


@needs_ray
@pytest.mark.slow
def test_a_replica_answers_as_the_service_does(small_generator, tmp_path):
    import ray
    from ray import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    database = f"sqlite:///{tmp_path}/keys.db"
    key, _ = KeyStore(open_database(database)).create("ray")
    arguments = {
        "checkpoint": str(small_generator),
        "ranker": "none",
        "database": database,
        "audit_dir": str(tmp_path / "audit"),
        "image_dir": str(tmp_path / "served"),
        "num_replicas": "1",
        "num_cpus": "1",
    }
    with pytest.raises(ValueError, match="unknown option surprise"):
        deploy({"surprise": 1})
    own = {"include_dashboard": False, "_system_config": {"worker_niceness": 0}}
    ray.init(num_cpus=2, log_to_driver=False, **own)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(deploy(arguments), name="painter", route_prefix="/")
        body = {"prompt": TEXT, "n": 2, "seed": 5, "response_format": "b64_json"}
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        assert httpx.post(url, json=body, timeout=300).status_code == 401
        headers = {"Authorization": f"Bearer {key}"}
        for _ in range(300):
            answer = httpx.post(url, json=body, headers=headers, timeout=300)
            if answer.status_code != 503:  # still loading
                break
            time.sleep(1)
        assert answer.status_code == 200, answer.text
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=60).text
        found = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
    finally:
        serve.shutdown()
        ray.shutdown()
    pipeline = TextToImage.from_pretrained(small_generator, "cpu", FastOptions())
    wanted = [image.tobytes() for image in pipeline(TEXT, 2, seed=5)]
    assert [Image.open(io.BytesIO(data)).tobytes() for data in found] == wanted
    assert 'endpoint="/v1/images/generations"' in metrics
    (log,) = (tmp_path / "audit").iterdir()
    assert verify(log) >= 2
