"""The recipes of the shipped weights: autoencoder, towers, U-Net, what is trained on top of it; and a lesson's."""
