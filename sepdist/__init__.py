"""sepdist: distributed training of monaural speech separation from object storage."""

__version__ = "0.1.0"
