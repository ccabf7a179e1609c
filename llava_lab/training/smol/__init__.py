"""The recipe that made the shipped `smol`."""
