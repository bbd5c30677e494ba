"""The fused kernel counts what the eager bites count, whatever the window and weighting."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange

from tl_posheads import LayerGeometry, counter, kernel
from tl_posheads.contributions import rotate_by
from tl_posheads.counting import Settings, count_document
from tl_posheads.statistics import spearman_of_tables

G = LayerGeometry.from_inv_freq(1000.0 ** (-torch.arange(6) / 6), n_heads=3, n_kv_heads=1)
NAME = "a" * 16


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(kernel, "_refusal", [])


def text(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, 3, 12, generator=generator),
        torch.randn(n, 1, 12, generator=generator) + 0.3,
    )


def counted(n, geometry, settings, grids, worth, monkeypatch):
    monkeypatch.setattr(kernel, "WORTH_COMPILING", worth)
    return count_document(*text(n), geometry, NAME, settings, grids)


def test_exponential():
    x = -torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 120
    x[:3] = torch.tensor([0.0, -1e-6, -126.0])
    found, true = kernel._exp2(x).double(), x.double().exp2()
    assert float(((found - true) / true).abs().max()) < 3e-7
    assert 0 <= float(kernel._exp2(torch.tensor([-1e4]))) < 1e-37


def test_tile_against_loops():
    """Every pair's cell from definitions in numpy: contributions, softmax, bins, blocks."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randn(2, 2, 4, n, generator=generator) for n in (6, 5))
    edges = torch.rand(2, 7, generator=generator, dtype=torch.double).sort(1).values * 2.9
    x = torch.randint(-1, 5, (2, 1, 3, 5), generator=generator)
    block = torch.tensor([1, 1, 3, 0, 3, 1]).view(2, 1, 3, 1), torch.tensor([0, 1, 1, 2, 2])
    shape = tuple(torch.tensor(n) for n in (8, 5, 4, 3))
    banded = rearrange(q * kernel.LOG2_E, "h c p (band row) -> band h c p row", band=2)
    edges[1, 2:6] = 2 + torch.tensor([-1e-9, 0, 1e-9, 2e-9]).double()  # crowd against pair 2
    centred, pair = kernel.centred(edges, 4)
    assert pair.tolist() == [[0, 1, 2, 3], [-2, -1, 0, 1]]
    dominant = kernel.tile_dominant(banded, k, pair)
    cell, small = codes = torch.empty(2, 2, 2, 3, 5, dtype=torch.long)
    kernel.tile_cells(dominant, centred, x, block, shape, 1, codes)
    for h in range(2):
        for i in range(6):
            for j in range(5):
                here = (i // 3, h, i % 3, j)
                c = (q[h, :, :, i] * k[h, :, :, j]).sum(0).double().numpy()
                w = np.exp(c - c.max())
                d = (w * np.arange(4)).sum() / w.sum()
                assert float(dominant[here]) == pytest.approx(d + float(pair[h, 0]), abs=2e-6)
                d_bin, at = int(np.searchsorted(edges[h].numpy(), d)), int(x[i // 3, 0, i % 3, j])
                want = (h * 8 + d_bin) * 5 + at + 1
                number = int(block[0].flatten()[i] + block[1][j])
                want_small = ((number * 2 + h) * 4 + d_bin // 2) * 3 + at // 2 + 1
                assert int(cell[here]) == (want if at >= 0 else 0)
                assert int(small[here]) == (want_small if at >= 0 else 0)


def test_bins_are_those_of_searchsorted():
    generator = torch.Generator().manual_seed(2)
    for n_edges in (255, 200, 3):
        edges = torch.randn(2, n_edges, generator=generator).sort(1).values
        d = torch.randn(1, 2, 40, 50, generator=generator)
        d[0, :, 0, :n_edges] = edges[:, :50]  # on an edge
        found = kernel._bins(
            d, kernel.centred(edges.double(), 1)[0], torch.arange(2)[:, None, None]
        )
        assert torch.equal(found[0].flatten(1).long(), torch.searchsorted(edges, d[0].flatten(1)))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
@pytest.mark.parametrize("window", [None, 150])
@pytest.mark.parametrize("pairs", ["all", "per_distance"])
def test_compiled_counts_as_eager(window, pairs, monkeypatch):
    geometry, settings = replace(G, window=window), Settings(pairs=pairs)
    for n in (300, 513):
        eager, grids = counted(n, geometry, settings, None, 10**15, monkeypatch)
        fused, _ = counted(n, geometry, settings, grids, 1, monkeypatch)
        assert not kernel._refusal
        assert fused.n_pairs == eager.n_pairs
        # Edges are values of D themselves: a pair on one may fall on either side of it.
        for mine, other in (
            (fused.counts, eager.counts),
            *zip(fused.blocks.values(), eager.blocks.values()),
        ):
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            assert float(mine.sum()) == pytest.approx(float(other.sum()), rel=1e-6)
            # What a pair does to either side of an edge.
            assert float((mine.double() - other.double()).abs().sum()) < 0.01 * float(other.sum())
            np.testing.assert_allclose(mine.double().sum(-2), other.double().sum(-2), rtol=1e-5)
        rho = [spearman_of_tables(t.counts.double().numpy()) for t in (fused, eager)]
        np.testing.assert_allclose(*rho, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_a_head_that_rests_on_one_pair_keeps_its_order(monkeypatch):
    """Its D differs from a whole number by 1e-9; eager sums are float64, the kernel's float32."""
    q, k = text(400)
    for x in (q, k):
        x[..., [5, 11]] = torch.tensor([5.0, 0.0])  # the slowest pair, half-split
    q, k = (rotate_by(x, torch.arange(400), G) for x in (q, k))
    tables = []
    grids = None
    for worth in (10**15, 1):
        monkeypatch.setattr(kernel, "WORTH_COMPILING", worth)
        table, grids = count_document(q, k, G, NAME, Settings(), grids)
        tables.append(table.counts)
    near = (grids.dominant.edges - 5).abs().median()
    assert 1e-14 < float(near) < 1e-6
    eager, fused = (spearman_of_tables(t.double().numpy()) for t in tables)
    assert abs(eager).min() > 0.1
    np.testing.assert_allclose(eager, fused, atol=1e-4)


def test_without_a_compiler_the_bites_count(monkeypatch):
    eager, grids = counted(300, G, Settings(), None, 10**15, monkeypatch)

    def broken():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel, "_compiled", broken)
    with pytest.warns(RuntimeWarning, match="C\\+\\+ compiler"):
        fallen, _ = counted(300, G, Settings(), grids, 1, monkeypatch)
    assert torch.equal(fallen.counts, eager.counts)
    assert torch.equal(fallen.blocks[NAME], eager.blocks[NAME])
    assert kernel.compiled_cells(10**15, torch.device("cpu")) is None


def test_short_texts_are_not_compiled(monkeypatch):
    monkeypatch.setattr(kernel, "_compiled", lambda: pytest.fail("compiled"))
    count_document(*text(200), G, NAME, Settings(), None)


def test_tiles_hold_every_place_once():
    x = torch.arange(2 * 3 * 2 * 300.0).view(2, 3, 2, 300)
    tiles = counter._tiles(x)
    assert tiles.shape == (3, 2, 2, 3, kernel.TILE)
    assert torch.equal(tiles[1, 0, 1, 2], x[1, 2, 0, 128:256])
    assert float(tiles[2, ..., 44:].abs().sum()) == 0
