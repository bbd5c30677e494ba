"""Corpora measured by several processes: bit for bit what one process finds, whoever is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import tl_posheads as ph
from helpers import architectures, small_models
from tl_posheads.scoring.distributed.job import Job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus") / "tiny-llama"
    small_models.build(*architectures.ROTARY["Llama"]).save_pretrained(place)
    small_models.tiny_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (100 + i,), generator=generator) for i in range(12)]


@pytest.fixture(scope="module")
def local(folder, documents):
    return ph.score_corpus(folder, documents, qk_pairs=300, progress=False)


def same(scores, other):
    assert scores.document_names == other.document_names
    assert torch.equal(scores.values, other.values)
    facts, others = (
        {k: v for k, v in x.provenance.items() if k != "engine"} for x in (scores, other)
    )
    assert facts == others


def test_local_is_score_heads(folder, documents, local):
    plain = ph.score_heads(ph.load_model(folder), documents, qk_pairs=300, progress=False)
    same(plain, local)
    assert local.provenance["engine"] == "local"
    assert not bool(local.values[:, :, :2].isnan().any())


def test_rows_are_put_together_in_any_order(folder, documents, local):
    job = Job(folder, documents, 0, 0, None, 300, "pair", "none", 0.005, 0, 0, None)
    begun = job.begin()
    rows = [begun.measured([unit]) for unit in begun.units]
    for order in (rows, rows[::-1]):
        together = {name: row for part in order for name, row in part.items()}
        same(begun.scores(together, "elsewhere"), local)
        begun.accumulator.rows.clear()


@pytest.fixture
def ray(monkeypatch):
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed here")
    # Workers of Ray inherit these.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import ray

    ray.init(num_cpus=3, log_to_driver=False, include_dashboard=False)
    yield ray
    ray.shutdown()


def kill_a_worker(started, killed):
    """Kills an actor once ``started()``; notes its name."""
    deadline = time.time() + 120
    while time.time() < deadline and not killed:
        if started():
            for place in Path("/proc").glob("[0-9]*"):
                try:
                    name = (place / "cmdline").read_bytes().strip(b"\0").decode()
                    if name.startswith("ray::") and "_Worker" in name:
                        os.kill(int(place.name), signal.SIGKILL)
                        killed.append(name)
                        return
                except (OSError, ValueError):
                    continue
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc")
def test_ray_with_a_killed_worker(folder, documents, local, ray, tmp_path):
    killed: list[str] = []
    counted = lambda: len(list(tmp_path.rglob("*.safetensors"))) >= 1
    thread = threading.Thread(target=kill_a_worker, args=(counted, killed))
    thread.start()
    scores = ph.score_corpus(
        folder,
        documents,
        engine="ray",
        qk_pairs=300,
        workers=2,
        checkpoint=tmp_path,
        progress=False,
    )
    thread.join()
    assert killed
    same(scores, local)
    assert scores.provenance["engine"] == f"ray {ray.__version__}, 2 workers"


@pytest.mark.slow
def test_torchrun(folder, documents, local, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, tl_posheads as ph\n"
        f"documents = torch.load({str(tmp_path / 'documents.pt')!r})\n"
        f"scores = ph.score_corpus({folder!r}, documents, engine='torchrun', qk_pairs=300,\n"
        "                         progress=False)\n"
        f"scores.save({str(tmp_path)!r} + '/rank' + __import__('os').environ['RANK'])\n"
    )
    torch.save(documents, tmp_path / "documents.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    run = subprocess.run(
        [*command, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-2000:]
    for rank in range(3):
        scores = ph.HeadScores.load(tmp_path / f"rank{rank}")
        same(scores, local)
        assert scores.provenance["engine"] == "torchrun, gloo, 3 processes"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(engine="dask"), "'local', 'ray' or 'torchrun'"),
        (dict(engine="torchrun"), "outside of torchrun"),
        (dict(workers=0), "workers=0"),
        (dict(model=object()), "expected its name"),
        (dict(model_options={"device_map": "auto", "device": "cpu"}), "together with device"),
        (dict(model_options={"n_devices": 64, "cls": "bridge"}), "64"),
    ],
)
def test_refusals(folder, documents, change, said, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ph.PosheadsError, match=said):
        ph.score_corpus(**{"model": folder, "corpus": documents, "progress": False, **change})


def test_without_ray(folder, documents, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ph.PosheadsError, match=r"tl-posheads\[ray\]"):
        ph.score_corpus(folder, documents, engine="ray", progress=False)


def test_device_map_changes_nothing(folder, documents, local):
    pytest.importorskip("accelerate")
    options = {"device_map": {"": "cpu"}, "cls": "bridge"}
    scores = ph.score_corpus(folder, documents, model_options=options, qk_pairs=300, progress=False)
    torch.testing.assert_close(scores.rho, local.rho, atol=1e-6, rtol=0)
