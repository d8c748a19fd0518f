"""The recipes of the shipped weights: autoencoder, encoders, U-Net, what is trained on top of it; and a lesson's."""
