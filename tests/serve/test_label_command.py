"""`python -m serve.label check`: what a file says of itself, and exit codes."""

import numpy as np
import pytest
from PIL import Image

from common.outputs.label import make_label, save_arguments
from serve.label import main


def write(path, changed=False):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    label = make_label(image, "shop", {"seed": 1})
    if changed:
        image.putpixel((0, 0), (1, 2, 3))
    image.save(path, **save_arguments("PNG", label, {"seed": 1}))


def test_a_labelled_file_is_shown_with_its_pixels_compared(tmp_path, capsys):
    write(tmp_path / "a.png")
    main(["check", str(tmp_path / "a.png")])
    said = capsys.readouterr().out
    assert "labelled in XMP and PNG text, all the same" in said
    assert "ContentProducer: shop" in said and "unchanged" in said and "made with seed: 1" in said


def test_changed_pixels_are_told(tmp_path, capsys):
    write(tmp_path / "a.png", changed=True)
    main(["check", str(tmp_path / "a.png")])
    assert "changed since they were labelled" in capsys.readouterr().out


def test_exit_codes(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no image")
    for name, code in (("plain.png", 1), ("text.png", 2), ("missing.png", 2)):
        with pytest.raises(SystemExit) as stop:
            main(["check", str(tmp_path / name)])
        assert stop.value.code == code
