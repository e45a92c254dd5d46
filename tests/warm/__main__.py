"""The zygote: `python -m tests.warm DESCRIPTOR ROOM`, its requests on a socket."""

import gc
import importlib
import os
import pkgutil
import socket
import sys
import tempfile
import warnings
from pathlib import Path

LIBRARIES = (
    "torch",
    "torch.distributed",
    "mlflow",
    "mlflow.store.tracking.sqlalchemy_store",
    "nvidia.dali.fn",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # by its engine, and with it all of torch.compile
    "fairscale",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "sklearn.linear_model",
    "sklearn.pipeline",
    "timm.optim",
)
"""Imported late by what the commands do."""

for name in list(os.environ):  # so that none is left where the kernel put it: that is the forks' /proc/PID/environ
    value = os.environ.pop(name)
    if name != "ROOM":
        os.environ[name] = value
before = dict(os.environ)
# As mae_scale sets them before it imports what reads them.
os.environ.update(TORCH_CPP_LOG_LEVEL="ERROR", DS_ACCELERATOR="cpu", DEEPSPEED_LOG_LEVEL="error")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for library in LIBRARIES:
        importlib.import_module(library)
import data_pipeline  # noqa: E402
import mae_scale  # noqa: E402
from mae_scale.reports.pretraining import loss_curve_figure  # noqa: E402
from tests.warm.fork import execute, serve  # noqa: E402

for package in (data_pipeline, mae_scale):
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

with tempfile.TemporaryDirectory() as folder:  # fonts and the parser of labels, which every start's figure needs
    loss_curve_figure([{"epoch": 1, "train/loss": 1.0, "train/lr": 1e-4}], Path(folder) / "curve.png")

gc.collect()
gc.freeze()
request = serve(socket.socket(fileno=int(sys.argv[1])))
execute(request.argv[1:])
