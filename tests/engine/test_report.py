"""Receipts: averages, sums, JSON and the printed table, from numbers that were measured elsewhere."""

import copy
import json
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvprune import CompressionReport, PolicySpec
from kvprune.engine.receipts import LayerReceipt
from kvprune.tokens.layout import AUDIO_FRAME

MIB = 2**20


def receipt(layer_idx=3, **changes):
    fields = {
        "layer_idx": layer_idx,
        "columns": 6404,
        "width": 1601,
        "bytes_held": MIB,
        "bytes_full": 4 * MIB,
        "bytes_of_bookkeeping": 100,
    }
    return LayerReceipt(**(fields | changes))


def new_report():
    spec = PolicySpec("trim", {"k_ratio": 0.25}, 1)
    return CompressionReport(policy=spec, seed=7, requested={"k_ratio": 0.25})


def test_a_new_report_has_nothing_and_says_so():
    report = new_report()
    report.count_encoder_input()
    assert math.isnan(report.kept_fraction)
    assert (report.bytes_held, report.bytes_full, report.bytes_of_bookkeeping) == (0, 0, 0)
    assert str(report) == "trim:k_ratio=0.25: nothing compressed yet (1 encoder inputs seen)"
    assert report.to_dict()["kept_fraction"] is None
    assert report.to_dict()["layers"] == []


def test_kept_fraction_is_the_mean_over_layers_then_samples():
    report = new_report()
    report.add_prefill([receipt(3), receipt(8)], kept=[[5, 2], [10, 2]], visible=[10, 4])
    assert report.kept_per_sample == (0.75, 0.5)
    assert report.kept_fraction == 0.625
    assert report.prefills == 1


def test_kept_fraction_weighs_the_samples_of_all_prefills_alike():
    report = new_report()
    report.add_prefill([receipt()], kept=[[10]], visible=[10])
    report.add_prefill([receipt()], kept=[[1, 2]], visible=[4, 8])
    assert report.kept_fraction == pytest.approx((1 + 0.25 + 0.25) / 3)
    assert report.kept_per_sample == (0.25, 0.25)
    assert report.prefills == 2


def test_samples_that_see_no_image_are_left_out_of_the_mean():
    report = new_report()
    report.add_prefill([receipt()], kept=[[0, 2]], visible=[0, 4])
    assert math.isnan(report.kept_per_sample[0])
    assert report.kept_per_sample[1] == 0.5
    assert report.kept_fraction == 0.5


def test_a_batch_without_any_image_has_no_kept_fraction():
    report = new_report()
    report.add_prefill([receipt()], kept=[[0, 0]], visible=[0, 0])
    assert math.isnan(report.kept_fraction)
    assert report.to_dict()["kept_fraction"] is None
    assert report.to_dict()["kept_per_sample"] == [None, None]


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), min_size=1, max_size=5),
    st.integers(1, 3),
)
def test_a_fraction_kept_everywhere_is_the_kept_fraction(layers, samples, prefills):
    report = new_report()
    for _ in range(prefills):
        report.add_prefill(
            [receipt(layer) for layer in range(layers)],
            kept=[[seen * share for seen, share in samples]] * layers,
            visible=[seen for seen, _ in samples],
        )
    assert report.kept_fraction == pytest.approx(sum(share for _, share in samples) / len(samples))


def test_bytes_are_sums_over_the_layers_of_the_latest_prefill():
    report = new_report()
    report.add_prefill([receipt()], kept=[[1]], visible=[1])
    layers = [receipt(3, bytes_held=10, bytes_full=40, bytes_of_bookkeeping=1), receipt(8, bytes_held=30)]
    report.add_prefill(layers, kept=[[1], [1]], visible=[1])
    assert report.layers == tuple(layers)
    assert report.bytes_held == 40
    assert report.bytes_full == 40 + 4 * MIB
    assert report.bytes_of_bookkeeping == 101


def test_to_dict_is_json_with_everything_in_it():
    report = new_report()
    report.count_encoder_input()
    report.add_prefill([receipt(3), receipt(8)], kept=[[1, 0], [1, 0]], visible=[4, 0])
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data == report.to_dict()
    assert PolicySpec.from_dict(data["policy"]) == report.policy
    assert data["spec"] == "trim:k_ratio=0.25"
    assert (data["seed"], data["encoder_inputs"], data["prefills"]) == (7, 1, 1)
    assert data["kept_fraction"] == 0.25
    assert data["kept_per_sample"] == [0.25, None]
    assert data["bytes_held"] == 2 * MIB
    assert data["bytes_full"] == 8 * MIB
    assert data["bytes_of_bookkeeping"] == 200
    assert [LayerReceipt(**layer) for layer in data["layers"]] == list(report.layers)


def test_the_printed_table_shows_the_fraction_the_bytes_and_every_layer():
    report = new_report()
    report.add_prefill([receipt(3), receipt(38, width=99)], kept=[[1], [1]], visible=[8])
    report.warn("mind this")
    report.warn("mind this")
    first, asked, summary, header, *rows, took, warning = str(report).splitlines()
    assert took == "deciding took 0 s"
    assert first.split() == ["trim:k_ratio=0.25", "seed", "7", "prefills", "1"]
    assert asked.startswith("asked: k_ratio 0.25; kept 12.5% of visible tokens")
    assert "2.00 MiB of 8.00 MiB stock (25.0%)" in summary
    assert header.split()[:4] == ["layer", "decided", "held", "stock"]
    assert [row.split() for row in rows] == [
        ["3", "1", "1601", "6404", "1.000", "4.000"],
        ["38", "1", "99", "6404", "1.000", "4.000"],
    ]
    assert warning == "warning: mind this"
    assert len({len(line) for line in (header, *rows)}) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report))])
def test_a_report_can_be_copied_and_sent_to_another_process(copied):
    report = new_report()
    report.add_prefill([receipt()], kept=[[1]], visible=[2])
    assert copied(report).to_dict() == report.to_dict()


def test_sound_is_told_in_seconds():
    report = new_report()
    report.unit, report.seconds_per_column = AUDIO_FRAME, 0.02
    assert report.kept_seconds is None  # nothing was heard yet
    report.add_prefill([receipt(3)], kept=[[100, 300]], visible=[1500, 500])
    assert report.kept_seconds == pytest.approx((20 * (100 / 1500 + 300 / 500) / 2, 20))
    lines = str(report).splitlines()
    assert "of visible audio frames" in lines[1]
    assert lines[2] == "kept 6.67 s of 20.00 s of sound in the latest prefill"
    assert "seconds_per_column" not in report.to_dict()
    report.seconds_per_column = None  # nobody knows how long a column lasts
    assert "of sound" not in str(report)
