"""Corpora counted by several processes: bit for bit what one process counts, whoever is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import architectures
import pytest
import torch

import tl_posheads as ph
from tl_posheads.engines.job import Job, from_bytes, merged, to_bytes

TABLES = ("counts", "geometry_counts", "n_documents", "n_pairs", "longest")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("corpus") / "tiny-llama"
    architectures.build(*architectures.ROTARY["Llama"]).save_pretrained(place)
    architectures.tiny_tokenizer().save_pretrained(place)
    return str(place)


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 90, (100 + i,), generator=generator) for i in range(12)]


@pytest.fixture(scope="module")
def tables():
    """Tables of the accumulator that made the last scores."""
    last = {}
    scores_of = ph.ScoreAccumulator.scores

    def noted(accumulator, *rest):
        last.update(accumulator.tables)
        return scores_of(accumulator, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ph.ScoreAccumulator, "scores", noted)
        yield last


@pytest.fixture(scope="module")
def local(folder, documents, tables):
    """Scores, and the tables they were made from."""
    scores = ph.score_corpus(folder, documents, progress=False)
    return scores, dict(tables)


def same(scores, tables, local):
    assert scores.to_pandas().equals(local[0].to_pandas())
    assert sorted(tables) == sorted(local[1]) == [0, 1]
    for layer, table in tables.items():
        for name in TABLES:
            assert torch.equal(getattr(table, name), getattr(local[1][layer], name))
        for unit, block in local[1][layer].blocks.items():
            assert torch.equal(table.blocks[unit], block)


def test_local_is_score_heads(folder, documents, local, tables):
    model = ph.load_model(folder)
    plain = ph.score_heads(model, documents, exact=False, progress=False)
    same(plain, tables, local)
    assert local[0].provenance["engine"] == "local"


def test_merging_is_free_of_order(folder, documents):
    job = Job(folder, documents, 0, 0, None, "all", None, 0, 0, None)
    begun = job.begin()
    begun.count(begun.units[:1], begun.accumulator.layers)  # sets the bins
    parts = [to_bytes(begun.count([unit], [0])[0]) for unit in begun.units]
    one, other = from_bytes(merged(parts)), from_bytes(merged(parts[::-1]))
    halves = from_bytes(merged([merged(parts[:5]), merged(parts[5:])]))
    for name, tensor in one.to_tensors().items():
        if tensor.is_floating_point() and name.startswith("null"):
            torch.testing.assert_close(tensor, other.to_tensors()[name])
            continue
        assert torch.equal(tensor, other.to_tensors()[name]), name
        assert torch.equal(tensor, halves.to_tensors()[name]), name


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


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="workers are found in /proc")
def test_ray_with_a_killed_worker(folder, documents, local, tables, ray, tmp_path):
    killed: list[str] = []
    counted = lambda: len(list(tmp_path.rglob("*.safetensors"))) >= 4  # the first, and three more
    thread = threading.Thread(target=kill_a_worker, args=(counted, killed))
    thread.start()
    scores = ph.score_corpus(
        folder, documents, engine="ray", workers=2, checkpoint=tmp_path, progress=False
    )
    thread.join()
    assert killed
    same(scores, tables, local)
    assert scores.provenance["engine"] == f"ray {ray.__version__}, 2 workers"
    assert {k: v for k, v in scores.provenance.items() if k != "engine"} == {
        k: v for k, v in local[0].provenance.items() if k != "engine"
    }


def test_torchrun(folder, documents, local, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, tl_posheads as ph\n"
        f"documents = torch.load({str(tmp_path / 'documents.pt')!r})\n"
        f"scores = ph.score_corpus({folder!r}, documents, engine='torchrun', progress=False)\n"
        f"scores.save({str(tmp_path)!r} + '/rank' + __import__('os').environ['RANK'])\n"
    )
    torch.save(documents, tmp_path / "documents.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    run = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    for rank in range(3):
        scores = ph.HeadScores.load(tmp_path / f"rank{rank}")
        assert scores.to_pandas().equals(local[0].to_pandas())
        assert scores.provenance["engine"] == "torchrun, gloo, 3 processes"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(engine="dask"), "'local', 'ray' or 'torchrun'"),
        (dict(engine="torchrun"), "outside of torchrun"),
        (dict(workers=0), "workers=0"),
        (dict(model=object()), "expected its name"),
        (dict(model_options={"device_map": "auto", "device": "cpu"}), "beside device"),
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
    scores = ph.score_corpus(folder, documents, model_options=options, progress=False)
    assert scores.to_pandas()["rho"].to_numpy() == pytest.approx(
        local[0].to_pandas()["rho"].to_numpy(), abs=1e-6
    )
