"""Encoders and decoders: torch modules that take plain numbers."""
