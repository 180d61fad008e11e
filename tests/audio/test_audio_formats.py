"""What recordings are written in: every length by decoding, damage by one policy, joins unheard."""

import io
import os
import threading

import av
import numpy as np
import pytest
import soundfile

from goose_mm.audio import load_audio, read_blocks
from goose_mm.audio.formats import BLOCK

RATE = 16000


def tone(seconds: float, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype("f4")


def noise(seconds: float) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, round(seconds * RATE)).astype(np.float32)


def written(samples: np.ndarray, kind: str, subtype: str | None = None, rate: int = RATE) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, subtype=subtype)
    return file.getvalue()


def encoded(samples: np.ndarray, kind: str, codec: str, bit_rate: int = 64000, **options) -> bytes:
    """Through FFmpeg, for what soundfile does not write."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        stream.bit_rate = bit_rate
        frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
        frame.sample_rate, frame.pts = RATE, 0
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return file.getvalue()


def mp3(samples: np.ndarray, bit_rate: int, header: bool = False) -> bytes:
    options = {"write_xing": str(int(header)), "id3v2_version": "0"}
    return encoded(samples, "mp3", "libmp3lame", bit_rate, **options)


def patched(data: bytes, mark: bytes, offset: int, value: bytes) -> bytes:
    at = data.index(mark) + offset
    return data[:at] + value + data[at + len(value) :]


def loudness(samples: np.ndarray) -> np.ndarray:
    """RMS of every tenth of a second."""
    return np.sqrt(np.square(samples[: len(samples) // 1600 * 1600].reshape(-1, 1600)).mean(1))


# MPEG audio


def test_mp3_of_changing_bit_rate_without_a_header():
    silence, sound = mp3(np.zeros(3 * RATE, np.float32), 8000), mp3(noise(4), 160_000)
    for data, loud in ((silence + sound, [0, 1]), (sound + silence, [1, 0])):
        got = load_audio(data, RATE)
        assert 7.0 <= len(got) / RATE < 7.3
        halves = [loudness(half).mean() > 0.1 for half in np.array_split(got, 2)]
        assert halves == loud


def test_mp3_with_a_header_is_exact_and_joined_ones_are_both_read(caplog):
    data = mp3(noise(2), 64000, header=True)
    assert len(load_audio(data, RATE)) == 2 * RATE and not caplog.messages
    assert 4.0 <= len(load_audio(data + data, RATE)) / RATE < 4.2


def test_mp3_cut_off_ends_where_it_was_cut(caplog):
    data = mp3(noise(4), 64000, header=True)
    got = load_audio(data[: len(data) // 2], RATE)
    assert 1.8 < len(got) / RATE <= 2.0 and loudness(got)[1:].min() > 0.1
    assert "cut off" in caplog.messages[0]


def test_mp3_tags_are_no_sound(caplog):
    tag = b"ID3\3\0\0" + bytes([0, 0, 2, 0]) + b"TIT2" + (200).to_bytes(4) + bytes(2)
    data = mp3(noise(1), 64000, header=True)
    assert len(load_audio(tag + b"\0\xfcber".ljust(246, b"\xff") + data, RATE)) == RATE
    assert len(load_audio(data + b"TAG\xfc".ljust(128, b"\0"), RATE)) == RATE
    assert not caplog.messages


def test_one_recording_of_two_rates_is_resampled_in_each():
    file = io.BytesIO()
    soundfile.write(file, np.zeros(8000), 8000, format="MP3")
    got = load_audio(file.getvalue() + mp3(tone(1), 64000), RATE)
    assert (
        2.0 <= len(got) / RATE < 2.4 and loudness(got)[:9].max() < 0.01 < loudness(got)[12:].min()
    )


# chained Ogg


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_chained_ogg_is_read_to_the_end(subtype, caplog):
    links = [written(np.zeros(RATE), "OGG", subtype), written(noise(2.5), "OGG", subtype)]
    got = load_audio(b"".join([*links, links[0]]), RATE)
    assert len(got) == 4.5 * RATE and not caplog.messages
    assert np.array_equal(loudness(got) > 0.1, [0] * 10 + [1] * 25 + [0] * 10)


def test_links_may_differ_in_rate_channels_and_codec():
    stereo = written(np.stack([tone(1, 300), tone(1, 700)], 1)[: 22050 // 2], "OGG", rate=22050)
    got = load_audio(stereo + written(tone(1), "OGG", "OPUS") + written(tone(1), "OGG"), RATE)
    assert len(got) == 2.5 * RATE


def test_links_join_without_a_click():
    whole = tone(4)
    parts = [written(part, "OGG", "VORBIS") for part in np.split(whole, [2 * RATE])]
    got = load_audio(b"".join(parts), RATE)
    assert np.abs(np.diff(got[1000:-1000])).max() < 1.5 * np.abs(np.diff(whole)).max()


def test_a_damaged_link_costs_only_itself(caplog):
    good, other = written(noise(1), "OGG"), bytearray(written(noise(1), "OGG"))
    other[60:1500] = bytes(1440)  # its headers
    assert len(load_audio(good + bytes(other) + good, RATE)) >= 2 * RATE
    assert "damaged" in caplog.messages[0] and len(caplog.messages) == 1


# headers that were never finished


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize("kind", ["WAV", "WAVEX"])
@pytest.mark.parametrize("size", [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\0\0\x7f"])
def test_wav_whose_size_was_never_written(kind, subtype, size, caplog):
    want = noise(0.5)
    data = patched(patched(written(want, kind, subtype), b"data", 4, size), b"RIFF", 4, size)
    data = data.replace(b"data", b"LIST\5\0\0\0abcde\0data", 1)
    np.testing.assert_allclose(load_audio(data, RATE), want, atol=0.01)
    assert not caplog.messages


def test_rf64_and_w64_whose_sizes_were_never_written():
    want = noise(0.5)
    w64 = b"data\xf3\xac\xd3\x11"
    for data in (
        patched(written(want, "RF64", "PCM_16"), b"ds64", 8, bytes(24)),
        patched(written(want, "W64", "PCM_16"), w64, 16, bytes(8)),
        patched(written(want, "W64", "PCM_16"), w64, 16, b"\xff" * 7 + b"\x7f"),
        patched(written(want, "W64", "PCM_16"), w64, 16, b"\xff" * 8),
    ):
        np.testing.assert_allclose(load_audio(data, RATE), want, atol=1e-4)


def test_flac_whose_length_was_never_written(caplog):
    data = bytearray(written(noise(6), "FLAC"))
    data[21] &= 0xF0  # STREAMINFO: samples altogether, unknown
    data[22:26] = bytes(4)
    np.testing.assert_allclose(load_audio(bytes(data), RATE), noise(6), atol=1e-4)
    assert not caplog.messages


# other formats


def test_gsm_in_wav():
    data = written(tone(2), "WAV", "GSM610")
    assert abs(len(load_audio(data, RATE)) - 2 * RATE) <= 320


@pytest.mark.parametrize(
    ("kind", "codec", "slack"),
    [
        ("mp4", "aac", 1024),
        ("matroska", "aac", 2048),
        ("adts", "aac", 2048),
        ("asf", "wmav2", 1024),
        ("ogg", "libspeex", 640),
        ("voc", "pcm_s16le", 0),  # in several blocks
    ],
)
def test_what_only_ffmpeg_reads(kind, codec, slack):
    got = load_audio(encoded(tone(2), kind, codec), RATE)
    assert abs(len(got) - 2 * RATE) <= slack and loudness(got)[2:19].min() > 0.3


def film(samples: np.ndarray | None) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        picture = container.add_stream("mpeg4", rate=5, width=32, height=32)
        track = (
            container.add_stream("aac", rate=RATE, layout="mono") if samples is not None else None
        )
        for packet in [*picture.encode(av.VideoFrame(32, 32, "yuv420p")), *picture.encode(None)]:
            container.mux(packet)
        if track:
            frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
            frame.sample_rate = RATE
            for packet in [*track.encode(frame), *track.encode(None)]:
                container.mux(packet)
    return file.getvalue()


def test_the_sound_of_a_film():
    assert abs(len(load_audio(film(tone(1)), RATE)) - RATE) <= 2048
    with pytest.raises(ValueError, match=r"the recording: cannot decode \(there is no sound in it"):
        load_audio(film(None), RATE)


def test_a_playlist_opens_no_other_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    soundfile.write("secret.wav", noise(1), RATE)
    for text in ("ffconcat version 1.0\nfile secret.wav\n", "#EXTM3U\n#EXTINF:1,\nsecret.wav\n"):
        with pytest.raises(ValueError, match="cannot decode"):
            load_audio(text.encode(), RATE)


# damage


@pytest.mark.parametrize(
    "data",
    [
        written(noise(2), "WAV"),
        written(noise(2), "AIFF"),
        written(noise(2), "FLAC"),
        written(noise(2), "OGG", "VORBIS"),
        written(noise(2), "OGG", "OPUS"),
        written(noise(2), "WAV", "GSM610"),
        mp3(noise(2), 64000, header=True),
        encoded(noise(2), "matroska", "aac"),
        encoded(
            noise(2), "mp4", "aac", movflags="frag_keyframe+empty_moov", frag_duration="100000"
        ),
    ],
    ids=["wav", "aiff", "flac", "vorbis", "opus", "gsm", "mp3", "mka", "m4a"],
)
def test_of_a_file_cut_off_what_is_there_is_used_and_said(data, caplog):
    got = load_audio(data[: len(data) * 3 // 4], RATE, "half.x")
    assert 0.8 < len(got) / RATE < 1.6 and loudness(got)[1:-1].min() > 0.05
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("half.x: damaged (")


@pytest.mark.parametrize(("kind", "noticed"), [("FLAC", 1), ("MP3", 1), ("OGG", 0)])
def test_behind_a_hole_reading_goes_on(kind, noticed, caplog):
    sound = np.concatenate([noise(6), tone(2)])
    data = written(sound, kind)
    hole = len(data) // 3
    got = load_audio(data[:hole] + bytes(3000) + data[hole + 3000 :], RATE)
    assert len(got) > 4 * RATE and len(caplog.messages) == noticed
    assert np.abs(loudness(got)[-12:-2] - 0.5 / 2**0.5).max() < 0.05  # the tone is heard


def test_what_follows_a_recording_does_not_matter(caplog):
    for kind in ("WAV", "FLAC", "OGG", "AIFF"):
        assert len(load_audio(written(noise(1), kind) + b"\1appended" * 99, RATE)) == RATE
    assert not caplog.messages


def test_nothing_of_it_can_be_decoded(caplog):
    flac = written(noise(1), "FLAC")
    for data in (flac[:200], written(noise(1), "OGG")[:200], b"\xff\xfb\x90\x64" * 30, bytes(999)):
        with pytest.raises(ValueError, match="the recording: cannot decode") as error:
            load_audio(data, RATE)
        assert "\n" not in str(error.value)
    assert not caplog.messages


# where it comes from


def test_bytes_and_open_files_are_read_from_their_beginning(tmp_path):
    data = written(noise(1), "FLAC")
    (tmp_path / "a.flac").write_bytes(data)
    stored = io.BytesIO(data)
    stored.seek(0, os.SEEK_END)
    with (tmp_path / "a.flac").open("rb") as file, (tmp_path / "a.flac").open() as text:
        for source in (data, bytearray(data), stored, file, file, text, tmp_path / "a.flac"):
            np.testing.assert_allclose(load_audio(source, RATE), noise(1), atol=1e-4)
        assert not file.closed


def test_text_is_no_recording():
    with pytest.raises(ValueError, match="is text"):
        load_audio(io.StringIO("sound"), RATE)


@pytest.mark.parametrize(
    "data",
    [written(noise(1), "FLAC"), written(noise(1), "WAV"), encoded(noise(1), "mp4", "aac")],
    ids=["flac", "wav", "m4a"],
)
def test_a_pipe_is_read_like_a_file(tmp_path, data):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(data,))
    writer.start()
    got = load_audio(tmp_path / "pipe", RATE)
    writer.join()
    np.testing.assert_array_equal(got, load_audio(data, RATE))


def test_a_name_that_is_not_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/na\xefve.wav"
    with open(name, "wb") as file:
        file.write(written(noise(1), "WAV"))
    assert len(load_audio(os.fsdecode(name), RATE)) == RATE
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_audio(os.fsdecode(name + b"x"), RATE)


def test_frames_of_any_size_come_in_blocks():
    for data in (mp3(noise(9), 64000, header=True), written(noise(9), "FLAC")):
        sizes = [len(block) for block in read_blocks(data, RATE)]
        assert sizes == [BLOCK, BLOCK, 9 * RATE - 2 * BLOCK]
