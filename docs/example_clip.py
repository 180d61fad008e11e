"""Makes the example clip, waves on a beach: python docs/example_clip.py OUT.wav

Nothing but shaped noise, so it belongs to nobody and is in no training set: a deep swell that
rises and falls, and a bright wash each time a wave breaks.
"""

import sys

import numpy as np
import soundfile

RATE, SECONDS = 16000, 6
BREAKS = (0.9, 4.1)  # seconds at which a wave breaks


def noise(random: np.random.Generator, low: float, high: float, slope: float) -> np.ndarray:
    """Noise between two frequencies in Hz; its amplitude falls as frequency ** -slope."""
    spectrum = np.fft.rfft(random.standard_normal(RATE * SECONDS))
    hertz = np.fft.rfftfreq(RATE * SECONDS, 1 / RATE)
    shape = np.where((hertz > low) & (hertz < high), np.maximum(hertz, 1.0) ** -slope, 0.0)
    sound = np.fft.irfft(spectrum * shape)
    return sound / sound.std()


def main(path: str) -> None:
    random = np.random.default_rng(7)
    time = np.arange(RATE * SECONDS) / RATE
    swell, wash = np.full_like(time, 0.35), np.full_like(time, 0.05)
    for start in BREAKS:
        since = time - start
        swell += np.where(since < 0, np.exp(since / 0.6), np.exp(-since / 1.2))
        wash += np.where(since < 0, np.exp(since / 0.25), np.exp(-since / 1.1))
    sound = swell * noise(random, 60, 1500, 0.8) + 0.5 * wash * noise(random, 400, 7000, 0.35)
    soundfile.write(path, 0.5 * sound / np.abs(sound).max(), RATE, subtype="PCM_16")


if __name__ == "__main__":
    main(sys.argv[1])
