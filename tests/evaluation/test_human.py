import json
import threading
import urllib.error
import urllib.request
from urllib.parse import quote

import pytest
from drawn_images import write_out_dir
from PIL import Image

from evaluation.human import Study, main, make_pairs, read_choices, results
from evaluation.human_page import serve
from evaluation.sets import SampleSet

TEXTS = ["一件红色的连衣裙", "一双鞋", "帽子"]


@pytest.fixture
def sets(tmp_path):
    """The images of `ours` are red, those of `theirs` green."""

    def image(level: int):
        return lambda text, i: Image.new("RGB", (8, 8), (level, 255 - level, 10 * i + len(text)))

    a = write_out_dir(tmp_path / "ours", TEXTS, 4, image(255))
    b = write_out_dir(tmp_path / "theirs", TEXTS, 4, image(0))
    return [SampleSet.from_out_dir(a, "ours"), SampleSet.from_out_dir(b, "theirs")]


def study_of(sets, path, num_pairs=10, repeat_share=0.5, seed=0):
    return Study(make_pairs(sets, num_pairs, repeat_share, seed), path, seed)


def answer_all(study, rater, choose):
    """`choose(pair id, left, right)`; returns the ids in the order they were asked."""
    asked = []
    while "pair" in (question := study.next(rater)):
        asked.append(question["pair"])
        left, right, _ = study.sides(rater, question["pair"])
        assert study.record(rater, question["pair"], choose(question["pair"], left, right), 1.0)
    return asked


def test_pairs_take_many_texts_and_repeat_some(sets):
    pairs = make_pairs(sets, 6, 0.5, 0)
    once, again = [p for p in pairs if not p.exchanged], [p for p in pairs if p.exchanged]
    assert (len(once), len(again)) == (6, 3)
    assert sorted(p.text for p in once) == sorted(TEXTS * 2)
    assert all(p.first.index == p.second.index and p.names == ("ours", "theirs") for p in pairs)
    assert len({p.id for p in pairs}) == 9
    assert [p.id for p in make_pairs(sets, 6, 0.5, 0)] == [p.id for p in pairs]
    assert len(make_pairs([*sets, SampleSet("third", sets[0].samples)], 4, 0, 0)) == 12
    with pytest.raises(ValueError, match="have no text in common"):
        make_pairs([sets[0].only(TEXTS[:1]), sets[1].only(TEXTS[1:])], 4, 0, 0)


def test_a_rater_who_likes_red_makes_ours_win(sets, tmp_path):
    study = study_of(sets, tmp_path / "c.jsonl")
    sides = []

    def prefer_red(pair, left, right):
        sides.append("left" if left.image.getpixel((0, 0))[0] == 255 else "right")
        return sides[-1]

    asked = answer_all(study, "r1", prefer_red)
    assert len(asked) == len(set(asked)) == 15
    assert {"left", "right"} == set(sides)
    assert not any(study.pairs[i].exchanged for i in asked[:5])
    row = results(list(read_choices(tmp_path / "c.jsonl")))[0]
    assert (row.first, row.wins, row.losses, row.raters) == ("ours", 10, 0, 1)
    assert row.win_rate.value == 1.0 and 0.7 < row.win_rate.low < 0.75  # Wilson of 10 in 10
    assert row.agreement == (5, 5)


def test_a_rater_who_always_says_left_does_not_agree_with_himself(sets, tmp_path):
    study = study_of(sets, tmp_path / "c.jsonl")
    answer_all(study, "r1", lambda *_: "left")
    answer_all(study, "r2", lambda *_: "equal")
    row = results(list(read_choices(tmp_path / "c.jsonl")))[0]
    assert (row.equal, row.wins + row.losses, row.raters) == (10, 10, 2)
    assert row.agreement == (5, 10)  # the one who says equal twice agrees


def test_a_study_goes_on_behind_what_was_chosen(sets, tmp_path):
    path = tmp_path / "c.jsonl"
    study = study_of(sets, path)
    first = study.next("r1")["pair"]
    study.record("r1", first, "equal", 2.0)
    assert not study.record("r1", first, "left", 2.0), "a second answer is not written"
    with path.open("a") as file:
        file.write('{"pair": "half')  # killed in the middle of a line
    later = study_of(sets, path)
    assert later.next("r1")["done"] == 1 and later.next("r1")["pair"] != first
    assert later.next("r2")["done"] == 0
    asked = answer_all(later, "r1", lambda *_: "equal")
    assert first not in asked and len(list(read_choices(path))) == 15


def test_what_is_no_choice_is_refused(sets, tmp_path):
    study = study_of(sets, tmp_path / "c.jsonl")
    pair = study.next("r")["pair"]
    with pytest.raises(ValueError, match="no pair 'x'"):
        study.record("r", "x", "left", 1)
    with pytest.raises(ValueError, match="one of left, right, equal, both_bad, not 'up'"):
        study.record("r", pair, "up", 1)
    (tmp_path / "bad.jsonl").write_text('{"pair": 1}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1 is no choice"):
        study_of(sets, tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="there are no choices yet"):
        results([])


@pytest.fixture
def address(sets, tmp_path):
    study = study_of(sets, tmp_path / "c.jsonl")
    with serve(study, "127.0.0.1", 0, "zh") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def get(url, body=None):
    with urllib.request.urlopen(url, data=body, timeout=10) as answer:
        return answer.read()


def test_the_server_asks_shows_and_records(address, tmp_path):
    assert "哪一张更好" in get(address + "/").decode()
    rater = quote("小王")
    question = json.loads(get(f"{address}/next?rater={rater}"))
    assert question["text"] in TEXTS and question["total"] == 15
    assert not {"ours", "theirs"} & set(json.dumps(question))
    image = get(f"{address}/image?pair={question['pair']}&side=left&rater={rater}")
    assert image.startswith(b"\x89PNG") and b"ours" not in image
    choice = {"rater": "小王", "pair": question["pair"], "choice": "right", "seconds": 1.5}
    assert json.loads(get(address + "/choice", json.dumps(choice).encode())) == {"new": True}
    assert json.loads(get(address + "/choice", json.dumps(choice).encode())) == {"new": False}
    line = next(read_choices(tmp_path / "c.jsonl"))
    assert (line["rater"], line["choice"]) == ("小王", "right")
    assert line["winner"] == line["right"].split("/")[-2], "the winner is whose image stood right"
    assert json.loads(get(f"{address}/next?rater={rater}"))["done"] == 1


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/other", None, 404),
        ("/next", None, 400),
        ("/next?rater=" + "x" * 65, None, 400),
        ("/image?pair=x&side=left&rater=r", None, 400),
        ("/choice", b"no json", 400),
        ("/choice", b"[]", 400),
        ("/choice", b'{"rater": "r", "pair": "x", "choice": "left", "seconds": 1}', 400),
        ("/choice", b'{"rater": "r", "pair": "x", "choice": "left", "seconds": "long"}', 400),
        ("/choice", b"x" * 5000, 413),
        ("/elsewhere", b"{}", 404),
    ],
)
def test_the_server_answers_bad_requests_in_a_sentence(address, path, body, status):
    with pytest.raises(urllib.error.HTTPError) as error:
        get(address + path, body)
    assert error.value.code == status and json.loads(error.value.read())["error"]


def test_the_command_refuses_what_it_cannot_use(sets, tmp_path, capsys):
    ours = tmp_path / "ours"
    for arguments, expected in [
        ([], "two or more sets"),
        ([f"a={ours}"], "two or more sets"),
        ([f"a={ours}", f"a={ours}"], "a name of its own"),
        ([f"a={ours}", f"b={tmp_path}/none"], "no directory of images"),
        ([f"{ours}"], "a system is NAME=PATH"),
        (["--results", f"{tmp_path}/none.jsonl"], "no file of choices"),
        (["--num-pairs", "0"], "num_pairs must be at least 1"),
        (["--repeat-share", "2"], "repeat_share must lie in"),
        (["--port", "70000"], "port must lie in"),
    ]:
        with pytest.raises(SystemExit) as end:
            main(arguments)
        message = capsys.readouterr().err
        assert end.value.code == 2 and expected in message, message


def test_the_command_prints_results(sets, tmp_path, capsys):
    study = study_of(sets, tmp_path / "c.jsonl", repeat_share=0)
    answer_all(study, "r", lambda pair, left, right: "left" if "ours" in str(left.path) else "both_bad")
    rows = main(["--results", str(tmp_path / "c.jsonl")])
    shown = capsys.readouterr().out
    assert rows[0].losses == 0 and rows[0].wins + rows[0].both_bad == 10 and "ours" in shown
