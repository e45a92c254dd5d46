"""Slurm templates."""
