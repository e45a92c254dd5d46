"""Metrics of every node beside a run's own: two ranks that are told to be on two nodes, and one alone."""

import os
import socket
import subprocess
import sys

import psutil
import pytest
from mlflow import MlflowClient

from mae_scale.tracking.metrics_log import read_metrics
from tests.tiny import arguments

HOST = {
    "cpu_utilization_percentage",
    "system_memory_usage_percentage",
    "network_receive_megabytes_per_second",
    "network_transmit_megabytes_per_second",
}


@pytest.mark.slow
def test_each_node_has_its_own_metrics_once_in_a_while(tmp_path, digits):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mae_scale", "pretrain", "demo", "--out", tmp_path / "run"]
    command += arguments(digits, "schedule.stop_after_steps=6")
    common = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(list(map(str, command)), env=os.environ | common | {"RANK": str(rank)}, stdout=subprocess.PIPE)
        for rank in (0, 1)
    ]
    try:
        for process in ranks:
            process.communicate(timeout=180)
            assert process.returncode == 0
    finally:
        for process in ranks:
            process.kill()
    first, *others = read_metrics(tmp_path / "run" / "metrics.jsonl")
    names = {name for name in first if name.startswith("system/")}
    assert names == {f"system/node_{node}/{name}" for node in (0, 1) for name in HOST}
    assert not any(name.startswith("system/") for row in others for name in row)


def test_a_run_on_one_node_shows_it_in_mlflow_under_mlflows_own_names(tmp_path, digits, mae_scale):
    used_before = psutil.virtual_memory().percent
    done = mae_scale("pretrain", "demo", "--out", tmp_path / "run", *arguments(digits, "schedule.stop_after_steps=3"))
    assert done.returncode == 0, done.stderr
    assert "system" not in done.stdout
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mae-scale").experiment_id])
    found = {name: value for name, value in run.data.metrics.items() if name.startswith("system/")}
    assert found.keys() == {f"system/{name}" for name in HOST}
    assert 0 < found["system/cpu_utilization_percentage"] <= 100
    assert abs(found["system/system_memory_usage_percentage"] - used_before) < 30
