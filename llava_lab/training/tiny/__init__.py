"""The recipe that made the shipped `tiny`."""
