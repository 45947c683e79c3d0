"""Does it work? `python -m psd.bench image` and `scene` measure the README's tables, `gpu` speed and memory."""
