"""mae-scale: masked-autoencoder pre-training of Vision Transformers, from one laptop to a Slurm cluster."""

__version__ = "0.1.0"
