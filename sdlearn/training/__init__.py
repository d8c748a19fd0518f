"""The recipes of the shipped weights: autoencoder, towers, U-Net."""
