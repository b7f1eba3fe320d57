"""Tokenizers and exact fast encoders."""
