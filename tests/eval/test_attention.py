"""Attention of the class token against the whole matrix, masks against a loop, and the files that are written."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dino_fast.cli import main as cli
from dino_fast.errors import UserError
from dino_fast.eval import attention
from dino_fast.eval.common.backbone import class_attention, open_backbone
from dino_fast.eval.common.frames import fit_to_patches, frame_rate, read_image, read_video, write_video


def mask_by_hand(row, mass):
    """Adds the largest patches, one after the other, until they hold the mass."""
    kept = np.zeros(len(row), dtype=bool)
    total, held = row.sum(), 0.0
    for i in np.argsort(-row, kind="stable"):
        if held >= mass * total:
            break
        kept[i] = True
        held += row[i]
    return kept


@pytest.mark.parametrize("mass", [0.05, 0.6, 0.9, 1.0])
def test_masks_hold_the_mass_with_the_fewest_patches(mass):
    rows = np.random.default_rng(0).random((40, 35)) ** 3
    masks = attention.mass_mask(torch.from_numpy(rows), mass).numpy()
    for row, mask in zip(rows, masks, strict=True):
        assert np.array_equal(mask, mask_by_hand(row, mass))


def test_a_single_patch_and_a_bad_share():
    assert attention.mass_mask(torch.tensor([[0.3]])).tolist() == [[True]]
    assert attention.mass_mask(torch.zeros(4)).sum() == 1
    with pytest.raises(UserError, match=r"0\.6"):
        attention.mass_mask(torch.ones(3), 60.0)


def test_class_attention_is_the_first_row_of_the_matrix(tiny):
    images = torch.randn(3, 3, 40, 24)
    whole = tiny.get_last_selfattention(images)  # [3, 2, 16, 16]
    torch.testing.assert_close(class_attention(tiny, images), whole[:, :, 0, 1:])
    assert not tiny.blocks[-1].attn.qkv._forward_hooks


def test_images_keep_their_ratio_and_lose_nothing():
    image = torch.arange(30 * 52, dtype=torch.int64).remainder(256).byte().view(1, 30, 52)
    assert fit_to_patches(image, 16, 8).shape == (1, 16, 24)  # 52 * 16 / 30 = 27.7, nearer to 24 than to 32
    assert torch.equal(fit_to_patches(torch.zeros(3, 16, 24, dtype=torch.uint8), 16, 8), torch.zeros(3, 16, 24).byte())
    with pytest.raises(UserError, match="smaller than one patch"):
        fit_to_patches(image, 4, 8)


def picture(path, height=30, width=44, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder(tmp_path, checkpoint, tiny, capsys):
    data = tmp_path / "data"
    for name in ("a.png", "b.png", "deep/b.jpg", "a.jpg"):
        picture(data / name)
    (data / "broken.jpg").write_bytes(b"\xff\xd8\xff no more")
    words = ["eval", "attention", "--checkpoint", str(checkpoint), "--data", str(data), "--image-size", "32"]
    assert cli.main([*words, "--out", str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["images"] == 4 and len(printed["left_out"]) == 1 and "broken.jpg" in printed["left_out"][0]
    folders = {"a.png", "a.jpg", "b", "deep/b"}  # a name that two images share keeps its ending
    for folder in folders:
        names = {path.name for path in (tmp_path / "out" / folder).glob("*.png")}
        parts = [f"{head}-{part}.png" for head in ("head0", "head1", "mean") for part in ("map", "overlay", "mask")]
        assert names == {"image.png", "sheet.png", *parts}
    # The mask in the file is the one computed by hand from the attention of the image as it was resized.
    frozen = open_backbone(checkpoint, device="cpu")
    seen = fit_to_patches(read_image(data / "b.png"), 32, 8)
    row = frozen.backbone.get_last_selfattention(frozen.normalize(seen[None]))[0, 1, 0, 1:]
    expected = mask_by_hand(row.double().numpy(), 0.6).reshape(4, -1)
    drawn = np.asarray(Image.open(tmp_path / "out" / "b" / "head1-mask.png"))
    assert np.array_equal(drawn, expected.repeat(8, 0).repeat(8, 1) * 255)
    brightest = np.asarray(Image.open(tmp_path / "out" / "b" / "head1-map.png"))[::8, ::8].sum(-1).argmax()
    assert brightest == row.argmax()


def test_frames_and_the_package_that_mp4_needs(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    for i in range(3):
        picture(tmp_path / "video" / f"{i}.png", seed=i)
    words = ["eval", "attention", "--checkpoint", str(checkpoint), "--image-size", "32", "--out", str(tmp_path / "out")]
    assert cli.main([*words, "--data", str(tmp_path / "video"), "--video"]) == 0
    assert "no mp4 was written: that needs the package av (pip install av)" in capsys.readouterr().out
    sizes = {Image.open(path).size for path in (tmp_path / "out" / "frames").iterdir()}
    assert sizes == {(96, 32)} and len(list((tmp_path / "out" / "frames").iterdir())) == 3
    (tmp_path / "film.mp4").write_bytes(b"film")
    assert cli.main([*words, "--data", str(tmp_path / "film.mp4")]) == 2
    assert "a folder of frames needs nothing" in capsys.readouterr().err
    picture(tmp_path / "video" / "3.png", height=20)
    assert cli.main([*words, "--data", str(tmp_path / "video"), "--video"]) == 2
    assert "is 44x20 and the frames before it 44x30" in capsys.readouterr().err


def test_video_files(tmp_path, checkpoint):
    pytest.importorskip("av", reason="video files need PyAV: pip install av")
    grey = [np.full((34, 48, 3), value, dtype=np.uint8) for value in range(20, 240, 20)]
    film = tmp_path / "film.mp4"
    assert write_video(film, grey, 25) == 11
    frames = list(read_video(film))
    assert len(frames) == 11 and all(
        abs(int(f.float().mean()) - g.mean()) < 4 for f, g in zip(frames, grey, strict=True)
    )
    result = attention.evaluate(checkpoint, film, tmp_path / "out", image_size=32, device="cpu")
    assert result["frames"] == 11 and len(list(read_video(tmp_path / "out" / "attention.mp4"))) == 11
    film.write_bytes(film.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"film\.mp4"):
        list(read_video(film))


def test_davis(davis, checkpoint, tmp_path):
    frames = davis / "JPEGImages" / "480p" / "blackswan"
    result = attention.evaluate(checkpoint, frames, tmp_path / "out", image_size=64, video=True, device="cpu")
    assert result["frames"] == 8
    assert Image.open(tmp_path / "out" / "frames" / "00007.png").size == (2 * 112, 64)  # 854 * 64 / 480 = 113.9


def test_paths_that_hold_nothing(tmp_path, checkpoint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    cases = [
        ("none", "does not exist"),
        ("empty", "holds no images"),
        ("notes.txt", "no image by its name"),
        ("bad", "none of the 1 images can be read"),
    ]
    for name, message in cases:
        with pytest.raises(UserError, match=message):
            attention.evaluate(checkpoint, tmp_path / name, tmp_path / "out")


def half_white(path: Path, frames: int = 12, rate: float = 24) -> None:
    """A film 64 wide and 32 high whose upper half is white."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16] = 255
    write_video(path, [pixels] * frames, rate)


def test_a_film_of_a_turned_phone_is_shown_upright(tmp_path: Path) -> None:
    """The track's matrix (0, 1, -1, 0) turns pictures clockwise by 90 degrees: what was above is then on the right."""
    pytest.importorskip("av", reason="video files need PyAV: pip install av")
    film = tmp_path / "film.mp4"
    half_white(film)
    data = bytearray(film.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30)
    film.write_bytes(bytes(data))
    for channels in (1, 3):
        frames = list(read_video(film, channels))
        assert len(frames) == 12 and frames[0].shape == (channels, 64, 32)
        assert frames[0][:, :, 20:].min() > 200 and frames[0][:, :, :12].max() < 60


def test_the_film_that_is_written_has_the_rate_of_the_film_that_was_read(tmp_path: Path, checkpoint: Path) -> None:
    pytest.importorskip("av", reason="video files need PyAV: pip install av")
    film = tmp_path / "film.mp4"
    half_white(film, frames=3)
    assert frame_rate(film) == 24
    for given, rate in ((None, 24), (10.0, 10)):
        out = tmp_path / f"out{rate}"
        attention.evaluate(checkpoint, film, out, image_size=32, fps=given, device="cpu")
        assert frame_rate(out / "attention.mp4") == rate


def test_films_that_were_cut(tmp_path: Path) -> None:
    """One cut by its edit list, as editors do without encoding again, shows what is left; half a file is refused."""
    pytest.importorskip("av", reason="video files need PyAV: pip install av")
    film = tmp_path / "film.mp4"
    half_white(film, rate=30)
    whole = film.read_bytes()
    data = bytearray(whole)
    edit, scale = data.index(b"elst"), struct.unpack(">I", data[data.index(b"mdhd") + 16 :][:4])[0]
    (media,) = struct.unpack(">i", data[edit + 16 :][:4])
    data[edit + 16 : edit + 20] = struct.pack(">i", media + 6 * scale // 30)  # begins six frames later
    film.write_bytes(bytes(data))
    assert 0 < len(list(read_video(film))) < 12
    film.write_bytes(whole[: whole.index(b"moov")])
    with pytest.raises(UserError, match=r"film\.mp4 cannot be read: .*Is it cut off\?"):
        next(read_video(film))
