"""Turn a post-trained mixture-of-experts model into a dynamic one that skips about half of its expert work."""

__version__ = "0.1.0"
