"""The scores that clean filters by: those of the ranker, whole after a kill, taken by the filter."""

import pytest

from data_tools.clean import main as clean_main
from data_tools.images.decode import decode
from data_tools.readers.detect import open_source
from rankers import load_ranker
from rankers.pair_scores import main


def test_each_pair_has_the_score_of_the_ranker(ranker_dir, shards, tmp_path):
    out = tmp_path / "scores.jsonl"
    scores = main([str(ranker_dir), str(shards), str(out), "--batch-size", "7", "--device", "cpu"])
    ranker = load_ranker(ranker_dir, "cpu")
    records = [r for r in open_source(shards) if r.key in scores]
    assert len(scores) == len({r.key for r in records}) > 50
    for record in records[:5]:
        alone = float(ranker.score(record.captions[0], [decode(record.image)])[0])
        assert scores[record.key] == pytest.approx(alone, abs=1e-4)


def test_a_stopped_run_goes_on_and_clean_takes_the_file(ranker_dir, shards, tmp_path):
    out = tmp_path / "scores.jsonl"
    argv = [str(ranker_dir), str(shards), str(out), "--device", "cpu"]
    whole = main(argv)
    data = out.read_bytes()
    out.write_bytes(data[: len(data) // 2])
    assert main(argv) == pytest.approx(whole, abs=1e-5)
    assert len(out.read_text("utf-8").splitlines()) == len(whole)
    middle = sorted(whole.values())[len(whole) // 2]
    flags = ["--scores", str(out), "--min-score", str(middle), "--workers", "0"]
    report = clean_main([str(shards), str(tmp_path / "clean"), *flags])
    assert report["reasons"]["low_score"] == len([s for s in whole.values() if s < middle])


def test_mistakes_are_one_sentence(ranker_dir, shards, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("not scores\n")
    with pytest.raises(SystemExit) as exit_:
        main([str(ranker_dir), str(shards), str(tmp_path / "other.txt")])
    assert exit_.value.code == 2 and "is no file of scores" in capsys.readouterr().err
