"""Curation: from raw videos to filtered clips with captions."""
