"""Particle datasets on disk, atomic models, simulated images, MRC and STAR files."""
